"""How soon another child is worth a try, where those before went without having begun anything.

Whatever it is (the system is out of processes, of memory, of descriptors, a module that crashes in
every fork), trying at once and for ever would make it worse. The first failure may be a fluke;
after each further one there is a longer pause, for all slots of the process together. Once several
in a row have failed the breaker is *open*: then one slot tries after each pause, for all. The first
child that begins a body closes it.

No I/O happens here; `Children` asks, and waits.
"""

from __future__ import annotations

import threading
import time

__all__ = ["OPEN_FROM", "Breaker"]

#: So many failures in a row open it.
OPEN_FROM = 5

#: After the second failure in a row, in seconds; then twice as much each time, up to the last.
FIRST_PAUSE = 0.05
LAST_PAUSE = 30.0


class Breaker:
    """Counts failures in a row. Safe to use from several threads."""

    def __init__(self) -> None:
        self.failures = 0
        #: Those of them in which there was a child, which has not come to a body.
        self.stillborn = 0
        #: What the last one was, in words.
        self.reason = ""
        self._next_at = 0.0
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether so many have failed in a row that it is no fluke."""
        return self.failures >= OPEN_FROM

    @property
    def pause(self) -> float:
        """How long nobody tries after the last failure, in seconds."""
        if self.failures < 2:
            return 0.0
        # No more than 20 doublings: the power has to fit a float.
        return min(LAST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.failures - 2, 20))

    def claim(self) -> float:
        """Take the next try.

        Returns:
            0 if it is the caller's; else in how many seconds to ask again.
        """
        with self._lock:
            now = time.monotonic()
            if now < self._next_at:
                return self._next_at - now
            # Whoever comes next sees first how this one ends.
            self._next_at = now + self.pause
            return 0.0

    def failed(self, reason: str, *, is_stillborn: bool = False) -> None:
        """A try has failed."""
        with self._lock:
            self.failures += 1
            self.stillborn += is_stillborn
            self.reason = reason
            self._next_at = time.monotonic() + self.pause

    def succeeded(self) -> None:
        """A child has begun."""
        # Asked without the lock: it is so with each call.
        if self.failures:
            with self._lock:
                self.failures = self.stillborn = 0
                self._next_at = 0.0
