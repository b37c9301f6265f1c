"""What a tree of processes holds."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

import psutil

MEGABYTE = 1_000_000


class Sample(NamedTuple):
    """A worker's process tree at one moment.

    Attributes:
        at: Seconds, by the monotonic clock.
        rss_bytes: Summed over the tree. Pages that processes share count once for each, which
            makes a tree of forked processes look larger than it is.
        processes: How many there are, the worker's main process among them.
    """

    at: float
    rss_bytes: int
    processes: int


def sample(tree: Iterable[psutil.Process]) -> Sample:
    """The RSS of a tree, now."""
    sizes = [size for size in map(_rss, tree) if size]
    return Sample(time.monotonic(), sum(sizes), len(sizes))


def _rss(process: psutil.Process) -> int:
    """0 for a process that has exited, whether or not its parent knows yet."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def pss(tree: Iterable[psutil.Process]) -> dict[int, int]:
    """The PSS of each process of a tree, by pid.

    A page that n processes share counts as an nth of a page in each, so that the sum is what the
    tree really takes of the machine. Linux adds it up in `/proc/<pid>/smaps_rollup`.
    """
    return {process.pid: size for process in tree if (size := _pss(process))}


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


def has_pss() -> bool:
    """Whether this system tells a PSS at all."""
    return hasattr(psutil.Process().memory_full_info(), "pss")
