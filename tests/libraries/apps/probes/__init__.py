"""Tasks that tell what they find."""
