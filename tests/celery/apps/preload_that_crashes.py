"""Crashes the interpreter when it is imported."""

from harness import bodies

bodies.crash_in_c()
