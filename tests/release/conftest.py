"""What is released, and whether a newcomer gets along with it."""
