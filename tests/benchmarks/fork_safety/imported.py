"""A preload that imports the library."""

import os

from fork_safety import uses

uses.load(os.environ["FORK_SAFETY_LIBRARY"])
