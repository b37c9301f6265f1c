"""A forkserver of ours for one measurement, and what memory processes hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import psutil

from isolated_tasks.process.launcher import Launcher, Plan

MIB = 1 << 20


@contextlib.contextmanager
def forkserver(*preload: str, setup: str = "", argument: str = "") -> Iterator[Launcher]:
    """One that has loaded these modules.

    Args:
        preload: Their names.
        setup: ``"module:function"``, called before with the argument, encoded.
        argument: That.

    Raises:
        ImportError: It has not.
    """
    plan = Plan(preload, setup=setup, setup_name=setup, setup_argument=argument.encode())
    launcher = Launcher(plan)
    launcher.start()
    try:
        launcher.wait_loaded(60)
        (loaded,) = launcher.loaded()
        for entry in loaded.entries:
            if entry["error"]:
                raise ImportError(entry["error"])
        yield launcher
    finally:
        launcher.stop()


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def pss_mib(processes: Iterable[psutil.Process]) -> float:
    """Their share of memory, each page counted once, in MiB."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total / MIB


def rss_mib(pid: int | None = None) -> float:
    """What one process holds, in MiB."""
    return float(psutil.Process(pid).memory_info().rss) / MIB
