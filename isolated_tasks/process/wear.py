"""When it is time for another forkserver.

Each fork copies the page tables of the forkserver, and what a module of the app leaks at a fork
stays in it for ever. And what it has loaded may itself be why children fail: a lock that was held
when it forked for the first time is held in all of them.
"""

from __future__ import annotations

from isolated_tasks.process import system
from isolated_tasks.process.breaker import OPEN_FROM

__all__ = ["Wear"]

#: It is worn when it holds so much more than after it had loaded, by factor and at least in bytes.
DRIFT_FACTOR = 1.5
DRIFT_BYTES = 64 << 20
#: It looks at that once in so many starts.
DRIFT_STARTS = 50


class Wear:
    """What a forkserver has been through since it has loaded.

    Args:
        max_starts: After so many children it is worn; None for never.
    """

    def __init__(self, max_starts: int | None) -> None:
        self._max_starts = max_starts
        self._starts = 0
        self._loaded_bytes = system.rss_bytes()
        self._is_told = False

    def started(self, failures: int) -> str | None:
        """It has started one more child.

        Args:
            failures: How many children before that have failed in a row to begin a body.

        Returns:
            Why it wants to be replaced, in words, the first time that it does.
        """
        self._starts += 1
        reason = self._reason(failures)
        if reason is None or self._is_told:
            return None
        self._is_told = True
        return reason

    def _is_drift(self, now: int) -> bool:
        return now > max(self._loaded_bytes * DRIFT_FACTOR, self._loaded_bytes + DRIFT_BYTES)

    def _reason(self, failures: int) -> str | None:
        if self._max_starts is not None and self._starts >= self._max_starts:
            return f"it has started {self._starts} children (isolated_forkserver_max_calls)"
        if failures >= OPEN_FROM <= self._starts:
            return f"{failures} children in a row went before they had begun a body"
        if self._starts % DRIFT_STARTS == 0:
            then, now = self._loaded_bytes, system.rss_bytes()
            if self._is_drift(now):
                # The kernel's quick counts are off by up to some pages for each CPU (proc(5)).
                now = system.exact_rss_bytes()
            if self._is_drift(now):
                return f"it has grown from {then / 2**20:.0f} to {now / 2**20:.0f} MiB"
        return None
