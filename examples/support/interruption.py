"""Signals that ask for an end; noted when they come, raised where it is safe.

An exception from a signal handler could come between the start of a worker and the line that
remembers it, or in the middle of its stop, and would leave a process behind. Everything that
waits here waits in short steps, and checks.
"""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_received: list[int] = []


class Interrupted(BaseException):
    """A signal asked for an end; like KeyboardInterrupt, it is not an Exception."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def note_signals() -> None:
    """From now on SIGNALS end nothing by themselves; `check()` tells of them."""
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(number)


def check() -> None:
    """Raise Interrupted if one of SIGNALS has come."""
    if _received:
        raise Interrupted(_received[0])
