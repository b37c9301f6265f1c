"""What one process used, as the forkserver saw it when the process was reaped."""

from __future__ import annotations

import resource
from dataclasses import dataclass

from isolated_tasks.process import system

__all__ = ["Usage"]


@dataclass(frozen=True)
class Usage:
    """The resources of one process over its whole life."""

    #: The highest resident memory, in bytes. The child resets the mark that it inherits from the
    #: forkserver (`system.reset_peak_rss`), so this is its own.
    peak_rss_bytes: int
    #: CPU time in user mode, in seconds, with that of the children it waited for.
    user_seconds: float
    #: CPU time in the kernel, in seconds, likewise.
    system_seconds: float

    @classmethod
    def from_rusage(cls, rusage: resource.struct_rusage) -> Usage:
        """Take what ``os.wait4`` reports; see getrusage(2)."""
        return cls(
            peak_rss_bytes=rusage.ru_maxrss * system.MAXRSS_UNIT_BYTES,
            user_seconds=rusage.ru_utime,
            system_seconds=rusage.ru_stime,
        )
