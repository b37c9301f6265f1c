"""To be imported by a forkserver."""

import os

pid = os.getpid()
