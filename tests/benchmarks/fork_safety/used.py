"""A preload that uses the library."""

import os

from fork_safety import uses

uses.first = uses.use(os.environ["FORK_SAFETY_LIBRARY"])
