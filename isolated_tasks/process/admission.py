"""Which children may start: those whose memory limits, all together, fit into a budget.

What counts is what a child may use and not what it uses now: twenty children that have just begun
use little, and would take the machine down a minute later. Whoever finds no room waits, in order,
also behind one that needs more than the next; else a large one would wait for ever. A child without
a limit counts nothing, and never waits.

No I/O happens here; the forkserver asks.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Hashable

__all__ = ["Admission", "Answer"]


class Answer(enum.Enum):
    """What may be done about a child."""

    START = "start"
    WAIT = "wait"
    #: Its limit alone is above the budget.
    NEVER = "never"


#: Who has taken what is reserved.
_OTHERS = object()


class Admission:
    """The budget, who has taken what of it, and who waits.

    Args:
        budget_bytes: What the limits may come to; None is no bound.
    """

    def __init__(self, budget_bytes: int | None) -> None:
        self.budget_bytes = budget_bytes
        self.taken_bytes = 0
        self._taken: dict[Hashable, int] = {}
        self._waiting: collections.OrderedDict[Hashable, int] = collections.OrderedDict()

    def ask(self, who: Hashable, limit_bytes: int | None) -> Answer:
        """Take part of the budget for a child, or a place in the queue."""
        needed = limit_bytes or 0
        if self.budget_bytes is None or not needed:
            return Answer.START
        if needed > self.budget_bytes:
            return Answer.NEVER
        if self._waiting or self.taken_bytes + needed > self.budget_bytes:
            self._waiting[who] = needed
            return Answer.WAIT
        self.take(who, needed)
        return Answer.START

    def take(self, who: Hashable, limit_bytes: int | None) -> None:
        """Note a child that runs whether there is room or not: its forkserver has died."""
        self._taken[who] = limit_bytes or 0
        self.taken_bytes += limit_bytes or 0

    def reserve(self, size_bytes: int) -> None:
        """Leave this much to children of others; it takes the place of what was said before."""
        self.give_back(_OTHERS)
        self.take(_OTHERS, size_bytes)

    def give_back(self, who: Hashable) -> None:
        """A child is gone, or one that waits is not wanted any more."""
        self._waiting.pop(who, None)
        self.taken_bytes -= self._taken.pop(who, 0)

    def next(self) -> Hashable | None:
        """Who may start now, after `give_back`; ask until it is None."""
        for who, needed in self._waiting.items():
            if self.taken_bytes + needed > (self.budget_bytes or 0):
                return None
            del self._waiting[who]
            self.take(who, needed)
            return who
        return None
