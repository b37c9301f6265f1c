"""Real workers with other people's libraries in them."""

from harness.fixtures import *  # noqa: F403  # pytest finds a fixture by its name in a conftest.py
