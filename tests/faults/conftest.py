"""Each test of a fault is searched for what it left behind, and the next call has to work."""

from harness.fixtures import apps, open_workplace  # noqa: F401  # pytest finds them by their names here
from harness.process_fixtures import *  # noqa: F403  # pytest finds a fixture by its name here
