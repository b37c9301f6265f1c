"""What is to be done to one body from outside, and when: its clocks, its memory, the stop ladder.

No I/O but the look at the memory of its processes. The supervisor asks what is `due`, does it, and
waits no longer than `wait` says.
"""

from __future__ import annotations

import logging
import signal
import time

from isolated_tasks.process import memory, stopping
from isolated_tasks.process.options import CallOptions, ProcessOptions
from isolated_tasks.process.stopping import Ladder, Rung

__all__ = ["KILLED_SECONDS", "Enforcer"]

logger = logging.getLogger(__name__)

#: How long a child that was killed may take to be gone before its call goes on without it.
KILLED_SECONDS = 1.0

#: Where there is no limit, memory is looked at first so many seconds after a body has begun, and at
#: least so often; most bodies are over by then.
FIRST_LOOK, LONGEST_PAUSE = 0.1, 1.0


class Enforcer:
    """Watches over one call."""

    def __init__(self, options: ProcessOptions, call: CallOptions) -> None:
        self._options = options
        self._call = call
        #: Why the body is stopped, if it is.
        self.ladder: Ladder | None = None
        #: The soft time limit was exceeded, and the body told.
        self.soft_signal_sent = False
        self._soft_deadline: float | None = None
        self._deadline: float | None = None
        self._next_look: float | None = None
        self._pause = 0.0
        #: Memory of the child and its descendants as it was last seen, and the most of it that was
        #: ever seen, in bytes; None before a look.
        self.last_bytes: int | None = None
        self.peak_bytes: int | None = None
        self._over_at: float | None = None

    def accepted(self) -> None:
        """The child has the call: from now on its memory is watched."""
        if self._options.memory_limit_bytes is not None:
            self._next_look = time.monotonic()

    def begun(self) -> None:
        """The body begins: so do the clocks."""
        now = time.monotonic()
        if self._next_look is None:
            # Just to know: what its descendants hold nobody else can tell.
            self._pause = FIRST_LOOK
            self._next_look = now + self._pause
        if self._call.soft_time_limit is not None:
            self._soft_deadline = now + self._call.soft_time_limit
        if self._call.time_limit is not None:
            self._deadline = now + self._call.time_limit

    def stop(self, ladder: Ladder) -> None:
        """Bring the body to an end; the first reason stands."""
        if self.ladder is None:
            self.ladder = ladder

    @property
    def is_over(self) -> bool:
        """Whether all rungs are behind it and there is nothing left to wait for."""
        return self._over_at is not None and time.monotonic() >= self._over_at

    def wait(self) -> float | None:
        """Until something may be due, in seconds; None while nothing will be."""
        now = time.monotonic()
        times = [self._over_at]
        if self.ladder is None:
            times += [self._soft_deadline, self._deadline, self._next_look]
        waits = [max(0.0, at - now) for at in times if at is not None]
        if self.ladder is not None and (wait := self.ladder.wait(now)) is not None:
            waits.append(wait)
        return min(waits, default=None)

    def due(self, pid: int | None) -> Rung | None:
        """The next signal that is to be sent now; None if there is none."""
        now = time.monotonic()
        if self.ladder is None:
            if self._soft_deadline is not None and now >= self._soft_deadline:
                self._soft_deadline = None
                self.soft_signal_sent = True
                # Celery's own words, as its prefork pool would have them in the log.
                logger.warning(
                    "Soft time limit (%ss) exceeded for %s[%s]",
                    self._call.soft_time_limit,
                    self._call.name,
                    self._call.title,
                )
                return Rung(signal.SIGUSR1, to_group=False, patience=0)
            self._look_at_clock(now)
            self._look_at_memory(pid, now)
        if self.ladder is None:
            return None
        # Not as of before the look, which is before the ladder: its first rung is due now.
        now = time.monotonic()
        rung = self.ladder.due(now)
        if rung is not None and rung.signal == signal.SIGKILL:
            self._over_at = now + KILLED_SECONDS
        return rung

    def _look_at_clock(self, now: float) -> None:
        limit = self._call.time_limit
        if limit is not None and self._deadline is not None and now >= self._deadline:
            logger.error(
                "Hard time limit (%ss) exceeded for %s[%s]",
                limit,
                self._call.name,
                self._call.title,
            )
            self.stop(stopping.on_time_limit(limit, self._options.term_grace))

    def _look_at_memory(self, pid: int | None, now: float) -> None:
        limit = self._options.memory_limit_bytes
        if pid is None or self._next_look is None or now < self._next_look:
            return
        held = memory.tree_rss_bytes(pid) if limit is None else memory.tree_bytes(pid, above=limit)
        self.last_bytes = held
        self.peak_bytes = max(held, self.peak_bytes or 0)
        if limit is None:
            self._pause = min(LONGEST_PAUSE, 1.5 * self._pause)
            self._next_look = time.monotonic() + self._pause
        elif held > limit:
            self.stop(stopping.on_memory_limit(limit, held))
        else:
            # From the end of the look: a large process takes its time to be looked at.
            self._next_look = time.monotonic() + memory.next_look(limit - held)
