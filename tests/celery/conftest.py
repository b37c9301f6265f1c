"""Real workers on real brokers."""

from harness.fixtures import *  # noqa: F403  # pytest finds a fixture by its name in a conftest.py
