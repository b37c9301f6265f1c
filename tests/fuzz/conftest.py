"""Each test of real processes is searched for what it left behind."""

from harness.process_fixtures import *  # noqa: F403  # pytest finds a fixture by its name here
