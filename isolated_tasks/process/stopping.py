"""The stop ladder: how a body that is not to go on is brought to an end, rung by rung.

One for all reasons. A soft signal, where one is due, that the body can handle; SIGTERM to the whole
group, on which ``finally:`` blocks run; after some patience SIGKILL to the group and, by the
forkserver, to whatever has left it. A hard limit is shorter of patience than a revocation, and
memory has no time to lose.
"""

from __future__ import annotations

import enum
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from isolated_tasks.process.limits import TERMINATING

__all__ = [
    "Cause",
    "Ladder",
    "Rung",
    "on_hang_up",
    "on_memory_limit",
    "on_request",
    "on_time_limit",
]

#: What a hard time limit leaves for ``finally:`` blocks, in seconds: the soft one is for cleaning
#: up. Celery's prefork pool leaves 0.1 (billiard/pool.py, ``_trywaitkill``).
TIME_LIMIT_GRACE = 0.2


MIB = 1 << 20


class Cause(enum.Enum):
    """Why a body is stopped."""

    TIME_LIMIT = "time limit"
    MEMORY_LIMIT = "memory limit"
    REQUEST = "request"
    #: It has closed the socket that its outcome would come by.
    HANG_UP = "hang-up"


@dataclass(frozen=True)
class Rung:
    """One step."""

    signal: int
    #: To the whole group, not only to the child.
    to_group: bool
    #: Until the next step, in seconds.
    patience: float


class Ladder:
    """The rungs that are left, and when the next one is due.

    Args:
        cause: Why.
        why: The same in words, for the log.
        rungs: The last is SIGKILL.
        after: Until the first rung, in seconds.
    """

    def __init__(
        self, cause: Cause, why: str, rungs: Sequence[Rung], *, after: float = 0.0
    ) -> None:
        self.cause = cause
        self.why = why
        self._rungs = list(rungs)
        self._next_at = time.monotonic() + after

    def due(self, now: float) -> Rung | None:
        """The rung to step on now; None if it is not time, or none is left."""
        if not self._rungs or now < self._next_at:
            return None
        rung = self._rungs.pop(0)
        self._next_at = now + rung.patience
        return rung

    def wait(self, now: float) -> float | None:
        """Until the next rung, in seconds; None if none is left."""
        return max(0.0, self._next_at - now) if self._rungs else None


_KILL = Rung(signal.SIGKILL, to_group=True, patience=0)


def on_time_limit(limit: float, grace: float) -> Ladder:
    """A hard time limit, in seconds; ``grace`` is the most patience there may be."""
    terminate = Rung(signal.SIGTERM, to_group=True, patience=min(grace, TIME_LIMIT_GRACE))
    return Ladder(Cause.TIME_LIMIT, f"hard time limit ({limit:g} s) exceeded", [terminate, _KILL])


def on_memory_limit(limit: int, now: int) -> Ladder:
    """A memory limit, and what is held, in bytes."""
    why = f"memory limit ({limit / MIB:.0f} MiB) exceeded: {now / MIB:.0f} MiB are held"
    return Ladder(Cause.MEMORY_LIMIT, why, [_KILL])


def on_hang_up(timeout: float) -> Ladder:
    """No outcome can come any more; so long, in seconds, it may take to exit, as most do."""
    return Ladder(Cause.HANG_UP, "it has closed its call socket", [_KILL], after=timeout)


def on_request(number: int, grace: float, why: str) -> Ladder:
    """Somebody has asked for this signal, as ``revoke(terminate=True, signal=…)`` does."""
    terminate = Rung(signal.SIGTERM, to_group=True, patience=grace)
    if number == signal.SIGKILL:
        rungs = [_KILL]
    elif number == signal.SIGTERM:
        rungs = [terminate, _KILL]
    else:
        # One that ends a body needs no patience of its own: the body ends once.
        patience = 0 if number in TERMINATING else grace
        rungs = [Rung(number, to_group=False, patience=patience), terminate, _KILL]
    return Ladder(Cause.REQUEST, why, rungs)
