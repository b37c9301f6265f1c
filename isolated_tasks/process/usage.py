"""What one call used, and what one process used over its whole life.

Of a call the child itself measures most: only it can begin its high-water mark anew for each call
of a batch, and a counter of the kernel's does not miss what nobody was looking at. The requester
adds what only it knows: when the call was made, how it ended, and what the descendants of the child
held while it looked.
"""

from __future__ import annotations

import enum
import resource
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from isolated_tasks.errors import ProtocolError
from isolated_tasks.process import system

__all__ = ["ExitReason", "Measured", "Meter", "ProcessUsage", "Usage"]


class ExitReason(str, enum.Enum):
    """How a call ended, as far as its process is concerned."""

    #: The body returned.
    RETURNED = "returned"
    #: The body raised; ``retry()`` and ``Ignore`` are exceptions too.
    RAISED = "raised"
    #: Killed for its ``memory_limit``.
    MEMORY_LIMIT = "memory_limit"
    #: Killed as the machine, or a control group around it, had no memory left.
    OUT_OF_MEMORY = "out_of_memory"
    #: Stopped for its ``time_limit``.
    TIME_LIMIT = "time_limit"
    #: Killed for its ``cpu_time_limit``.
    CPU_TIME_LIMIT = "cpu_time_limit"
    #: Stopped since somebody asked for it: revoked, or the worker shuts down.
    STOPPED = "stopped"
    #: The process was gone without an outcome, in any other way.
    LOST = "lost"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Usage:
    """What one call of an isolated task used.

    What is not known is None: of a process that was killed, what it would have measured itself.
    """

    #: Of the process.
    pid: int | None
    #: The most resident memory (RSS) that the process had while the call ran, in bytes. The mark
    #: begins anew for each call, at `baseline_bytes`: it is never that of another process or call.
    peak_bytes: int | None
    #: The same for the process and its descendants together, in bytes. What these held is known by
    #: looks, which begin 0.1 s after the body, and from those that have ended and were waited for.
    tree_peak_bytes: int | None
    #: What the process held when the call came, in bytes: what is shared with the forkserver, and
    #: what calls before it in a batch have left.
    baseline_bytes: int | None
    #: CPU time in user mode, with that of descendants that were waited for, in seconds.
    user_seconds: float | None
    #: CPU time in the kernel, likewise.
    system_seconds: float | None
    #: From the beginning of the body to its end, in seconds; None where it has not begun.
    wall_seconds: float | None
    #: From the call in the slot to the beginning of the body, in seconds, with what it has waited
    #: for memory.
    start_seconds: float
    #: Of the pickled arguments, with the request.
    argument_bytes: int
    #: Of the pickled result, or exception; 0 where there is none.
    result_bytes: int
    #: ``"forkserver"`` or ``"spawn"``.
    start_method: str
    #: In its batch; the first is 1.
    position: int
    #: How it ended.
    exit_reason: ExitReason
    #: Of the file with its memory profile, absolute; None where there is none.
    profile_path: str | None = None

    @property
    def cpu_seconds(self) -> float | None:
        """CPU time in both modes, in seconds."""
        if self.user_seconds is None or self.system_seconds is None:
            return None
        return self.user_seconds + self.system_seconds


@dataclass(frozen=True)
class ProcessUsage:
    """The resources of one process over its whole life, as its forkserver saw it reaped."""

    #: The highest resident memory, in bytes. The child resets the mark that it inherits from the
    #: forkserver (`system.reset_peak_rss`), so this is its own.
    peak_rss_bytes: int
    #: CPU time in user mode, in seconds, with that of the children it waited for.
    user_seconds: float
    #: CPU time in the kernel, in seconds, likewise.
    system_seconds: float

    @classmethod
    def from_rusage(cls, rusage: resource.struct_rusage) -> ProcessUsage:
        """Take what ``os.wait4`` reports; see getrusage(2)."""
        return cls(
            peak_rss_bytes=rusage.ru_maxrss * system.MAXRSS_UNIT_BYTES,
            user_seconds=rusage.ru_utime,
            system_seconds=rusage.ru_stime,
        )


# ── in the child ────────────────────────────────────────────────────────────────────────────────

_MEASURED = struct.Struct("!QQQddd")


@dataclass(frozen=True)
class Measured:
    """What a child has measured of one call; see `Usage`. It travels with the outcome."""

    baseline_bytes: int
    peak_bytes: int
    tree_peak_bytes: int
    user_seconds: float
    system_seconds: float
    wall_seconds: float

    #: In bytes, packed.
    SIZE: ClassVar[int] = _MEASURED.size

    def pack(self) -> bytes:
        """As it travels."""
        return _MEASURED.pack(
            self.baseline_bytes,
            self.peak_bytes,
            self.tree_peak_bytes,
            self.user_seconds,
            self.system_seconds,
            self.wall_seconds,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Measured:
        """The same again.

        Raises:
            ProtocolError: It is not that.
        """
        try:
            return cls(*_MEASURED.unpack(data))
        except struct.error as exc:
            raise ProtocolError(f"what a child has measured cannot be read: {exc}") from exc


class Meter:
    """Measures the calls that this process serves, one after the other.

    Args:
        is_forked: Whether this process was forked. The mark that getrusage(2) tells of one that was
            exec'd is never below that of the process it was exec'd from.
    """

    def __init__(self, *, is_forked: bool) -> None:
        self._is_forked = is_forked
        self._is_fresh = True
        self._baseline = 0
        self._self = self._children = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._began: float | None = None

    def begin(self) -> None:
        """A call is here."""
        if not self._is_fresh:
            # At birth it was done already.
            system.reset_peak_rss()
        self._is_fresh = False
        self._self = resource.getrusage(resource.RUSAGE_SELF)
        self._children = resource.getrusage(resource.RUSAGE_CHILDREN)
        # The mark has just begun anew, so it is what there is.
        self._baseline = self._mark(self._self)
        self._began = None

    def begun(self) -> None:
        """Its body begins."""
        self._began = time.monotonic()

    def ended(self) -> Callable[[], Measured]:
        """Its body has ended.

        Returns:
            To be called when its outcome is pickled, which takes memory too.
        """
        wall = 0.0 if self._began is None else time.monotonic() - self._began
        return lambda: self._measured(wall)

    def _measured(self, wall: float) -> Measured:
        own = resource.getrusage(resource.RUSAGE_SELF)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        peak = tree_peak = max(self._mark(own), self._baseline)
        if children.ru_maxrss > self._children.ru_maxrss:
            # One that was waited for held this, and nobody knows when; this process was there too.
            held = children.ru_maxrss * system.MAXRSS_UNIT_BYTES
            tree_peak = max(peak, system.rss_bytes() + held)
        user = own.ru_utime - self._self.ru_utime
        kernel = own.ru_stime - self._self.ru_stime
        user += children.ru_utime - self._children.ru_utime
        kernel += children.ru_stime - self._children.ru_stime
        return Measured(self._baseline, peak, tree_peak, user, kernel, wall)

    def _mark(self, own: resource.struct_rusage) -> int:
        """The high-water mark of this process, in bytes."""
        if self._is_forked:
            return own.ru_maxrss * system.MAXRSS_UNIT_BYTES
        return system.peak_and_rss_bytes()[0]
