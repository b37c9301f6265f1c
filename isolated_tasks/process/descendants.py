"""The descendants of a process: who they are, and their end."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Iterator

import psutil

from isolated_tasks.process import system
from isolated_tasks.process.system import read_file

__all__ = ["children", "kill_below", "listed_children", "tree"]

#: How often `kill_below` looks whether there are others by now.
_ROUNDS = 5


def children(pid: int) -> list[int]:
    """The processes of which a process is the parent; zombies too.

    For who must not miss one: always by a pass over all processes. The kernel's own list of them,
    which `tree` uses, skips some while others exit (proc(5)).
    """
    return _parents_to_children().get(pid, [])


def tree(pid: int) -> list[int]:
    """A process and all its descendants, as they are now; one may be missing while others exit."""
    # What the kernel's lists cost does not grow with what else runs on the machine, as a pass does.
    table = None if _kernel_lists_children() else _parents_to_children()
    found = [pid]
    # No process twice: it may change its parent, or its number its process, while we look.
    seen = {pid}
    for one in found:
        below = (listed_children(one) or []) if table is None else table.get(one, [])
        new = [child for child in below if child not in seen]
        seen.update(new)
        found.extend(new)
    return found


def kill_below(pid: int) -> None:
    """Send SIGKILL to all descendants of a process, wherever they have gone; never waits.

    For who is their ancestor, or knows that nobody else looks after them. Each is signalled through
    a descriptor that was opened between two sightings, so that no number can be a stranger's.
    """
    killed: set[int] = set()
    for _ in range(_ROUNDS):
        new = [one for one in tree(pid)[1:] if one not in killed]
        if not new:
            return
        killed.update(new)
        pidfds = {one: system.open_pidfd(one) for one in new}
        still = set(tree(pid))
        for one, pidfd in pidfds.items():
            if pidfd is None:
                # No kernel of today's; then there is but its number.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(one, signal.SIGKILL)
                continue
            if one in still:
                system.signal_pidfd(pidfd, signal.SIGKILL, to_group=False)
            os.close(pidfd)


def listed_children(pid: int) -> list[int] | None:
    """The children of a process as the kernel lists them, at once; None where it does not.

    They are listed with the thread that forked them. Some may be missing while others exit
    (proc(5)).
    """
    if not _kernel_lists_children():
        return None
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    lists = [read_file(f"/proc/{pid}/task/{thread}/children") for thread in threads]
    return [int(child) for numbers in lists for child in numbers.split()]


@functools.cache
def _kernel_lists_children() -> bool:
    """Whether proc(5) has ``/proc/PID/task/TID/children`` (CONFIG_PROC_CHILDREN)."""
    return os.path.exists("/proc/thread-self/children")


def _parents_to_children() -> dict[int, list[int]]:
    """One pass over all processes."""
    below: dict[int, list[int]] = {}
    for pid, parent in _parents():
        below.setdefault(parent, []).append(pid)
    return below


def _parents() -> Iterator[tuple[int, int]]:
    if not system.IS_LINUX:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                yield process.pid, process.ppid()
        return
    try:
        names = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        # Where /proc is not mounted nobody tells, psutil included.
        return
    for name in names:
        # proc(5), /proc/PID/stat: the name, in parentheses, may hold anything; state and parent
        # follow. Any process may be gone by now.
        stat = read_file(f"/proc/{name}/stat", 512)
        fields = stat.rpartition(b")")[2].split()
        if len(fields) > 1:
            yield int(name), int(fields[1])
