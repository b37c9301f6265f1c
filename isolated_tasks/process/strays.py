"""Processes that children have left behind, which become the forkserver's, and go.

A process that has lost its parent becomes the child of the next subreaper above it (prctl(2)): of
the child that runs the body while that lives, then of the forkserver. So whatever is a child of the
forkserver and was not started by it is a stray, unless a preload has started it, or it was left
behind on purpose (``keep_children``).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Container

from isolated_tasks.process import descendants, system

__all__ = ["Strays"]


class Strays:
    """Those of one forkserver.

    Args:
        children: The processes that it has started and not reaped.
    """

    def __init__(self, children: Container[int]) -> None:
        self._children = children
        system.become_subreaper()
        # What a preload has started, which is there for its forkserver alone.
        self._preloaded = frozenset(descendants.children(os.getpid()))
        self._spared = set(self._preloaded)

    @property
    def spares_any(self) -> bool:
        """Whether there is anybody beside children and strays."""
        return bool(self._spared)

    def spares(self, pid: int) -> bool:
        """Whether this one lives on purpose; then what it leaves does too."""
        return pid in self._spared

    def end_preloaded(self) -> None:
        """Kill what a preload has started: what would have ended it is not run."""
        for pid in self._preloaded & self._spared:
            # First: what that has started itself becomes a stray, which may live on, as it ends.
            descendants.kill_below(pid)
            system.signal_child(pid, signal.SIGKILL, to_group=False)

    def spare(self) -> None:
        """Let those live that are here now."""
        self._spared.update(self._find())

    def reaped(self, pid: int) -> None:
        """This one is gone; its number may be another's."""
        self._spared.discard(pid)

    def are_seen(self) -> bool:
        """Whether there are any, at a glance; without a pass over all processes."""
        return any(map(self._is_one, descendants.listed_children(os.getpid()) or ()))

    def end(self) -> bool:
        """Kill them; whether there was anybody.

        What they have started themselves becomes a stray when they have ended.
        """
        found = self._find()
        for pid in found:
            # A child of ours that is not reaped keeps its number.
            system.signal_child(pid, signal.SIGKILL, to_group=False)
        return bool(found)

    def _find(self) -> list[int]:
        return [pid for pid in descendants.children(os.getpid()) if self._is_one(pid)]

    def _is_one(self, pid: int) -> bool:
        return pid not in self._children and pid not in self._spared
