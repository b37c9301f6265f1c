"""Finds every process that a test has started, however it was started.

A list of children is not enough: a process whose parent died belongs to init, and the forkserver
leads a session of its own. What all of them keep is the environment that they were exec'd with, so
each test puts a mark there.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator

import psutil

#: The environment variable that holds the mark.
VARIABLE = "ISOLATED_TASKS_TEST_MARK"


def every_process() -> Iterator[psutil.Process]:
    """Each process that is there now."""
    # Not psutil.process_iter: it remembers processes by their pids, and does not see that one is
    # another's by now, which then passes for one that has ended.
    for pid in psutil.pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            yield psutil.Process(pid)


def marked_processes(mark: str) -> list[psutil.Process]:
    """Living processes, zombies aside, whose environment holds `mark`, without this one."""
    return [process for process in every_process() if _has_mark(process, mark)]


def _has_mark(process: psutil.Process, mark: str) -> bool:
    if process.pid == os.getpid():
        return False
    try:
        return process.environ().get(VARIABLE) == mark
    except (psutil.Error, OSError):
        return False  # gone, a zombie, or another user's


def is_alive(process: psutil.Process) -> bool:
    """Whether it can still do anything; a zombie only waits for its parent, or init, to reap it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait(processes: Iterable[psutil.Process], *, timeout: float) -> list[psutil.Process]:
    """Wait until none of them is alive, and return those that still are."""
    _, left = psutil.wait_procs(processes, timeout=timeout)
    return [process for process in left if is_alive(process)]


def kill(processes: Iterable[psutil.Process], *, timeout: float = 5.0) -> None:
    """Send each process SIGKILL and wait until all are gone."""
    doomed = list(processes)
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    wait(doomed, timeout=timeout)


def describe(process: psutil.Process) -> str:
    """One line that tells a reader which process this is."""
    try:
        with process.oneshot():
            command = " ".join(process.cmdline()) or process.name()
            return f"process {process.pid} ({process.status()}, parent {process.ppid()}): {command}"
    except psutil.Error:
        return f"process {process.pid} (gone by now)"
