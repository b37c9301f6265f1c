"""A preload that hangs, in C and with the GIL held, where it is told to."""

import ctypes
import os

from harness import bodies

if "HANG_IN_PRELOAD" in os.environ:
    bodies.report(os.environ["HANG_IN_PRELOAD"], os.getpid())
    ctypes.PyDLL(None).sleep(1000)
