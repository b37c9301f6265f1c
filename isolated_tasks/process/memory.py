"""How much memory a tree of processes holds, how much there is, and when the kernel ran out of it.

The resident memory of a process (RSS) counts pages that it shares with others in full, and those of
a forked child are shared with the forkserver and among siblings. The proportional one (PSS) divides
them by the number of those who share, and so adds up; but the kernel has to walk all page tables
for it, which takes milliseconds for each GiB. So a look asks for RSS, which costs next to nothing,
and for PSS only where RSS says that there may be too much.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from pathlib import Path, PurePosixPath

import psutil

from isolated_tasks.process import descendants, system
from isolated_tasks.process.system import read_file

__all__ = [
    "ControlGroup",
    "OOMKills",
    "available_bytes",
    "control_groups",
    "find_control_groups",
    "next_look",
    "oom_kills",
    "total_bytes",
    "tree_bytes",
    "tree_rss_bytes",
]

_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

#: The rate at which a body may allocate, in bytes a second, for which the next look is planned.
EXPECTED_RATE = 2e9
#: A child that was killed because memory ran out is reaped this soon after it, in seconds.
OOM_KILL_SECONDS = 1.0

#: The shortest and the longest time between two looks, in seconds.
SHORTEST, LONGEST = 0.02, 0.2


# ── a tree of processes ─────────────────────────────────────────────────────────────────────────


def tree_bytes(pid: int, *, above: int | None = None) -> int:
    """The memory that a process and all its descendants hold, in bytes.

    Args:
        pid: The process.
        above: Up to here the sum of RSS will do, which is never below that of PSS.

    Returns:
        The sum of PSS, where it can be read; else, or if it is not above, that of RSS. A process
        that ends meanwhile counts 0.

        Memory that is shared on purpose (``shm_open``, ``multiprocessing.shared_memory``) counts
        for those who have touched it: PSS divides it among them, also those outside of this tree,
        and what is in ``/dev/shm`` while nobody maps it counts for no process.
    """
    pids = descendants.tree(pid)
    total = sum(map(_rss_bytes, pids))
    if above is not None and total <= above:
        return total
    # RSS is read again where there is no PSS: one that has ended since has none of it either.
    return sum(_rss_bytes(one) if (size := _pss_bytes(one)) is None else size for one in pids)


def tree_rss_bytes(pid: int) -> int:
    """The same by RSS alone, which costs next to nothing: what is shared counts for each sharer."""
    return sum(map(_rss_bytes, descendants.tree(pid)))


def next_look(headroom_bytes: int) -> float:
    """When to look again, in seconds: before a fast body has taken half of what is left."""
    return min(LONGEST, max(SHORTEST, headroom_bytes / 2 / EXPECTED_RATE))


def _rss_bytes(pid: int) -> int:
    if not system.IS_LINUX:
        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(pid).memory_info().rss)
        return 0
    fields = read_file(f"/proc/{pid}/statm", 256).split()
    return int(fields[1]) * _PAGE_SIZE if len(fields) > 1 else 0


def _pss_bytes(pid: int) -> int | None:
    for line in read_file(f"/proc/{pid}/smaps_rollup", 4096).splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return None


# ── what there is ───────────────────────────────────────────────────────────────────────────────


def total_bytes() -> int:
    """What this process may use: the machine's memory, or what a control group limits it to."""
    limits = [limit for group in control_groups() if (limit := group.limit_bytes()) is not None]
    return min([*limits, int(psutil.virtual_memory().total)])


def available_bytes() -> int:
    """What of it nobody uses now. Caches that the kernel would drop are not in use."""
    left = [int(psutil.virtual_memory().available)]
    for group in control_groups():
        limit, used = group.limit_bytes(), group.used_bytes()
        if limit is not None and used is not None:
            left.append(limit - used)
    return max(0, min(left))


def oom_kills() -> int | None:
    """How many processes the kernel has killed for want of memory, of which a child may be one.

    That of the innermost control group, in which children are as well, where it counts: a kill
    elsewhere on the machine proves nothing. It counts by victim, whether the group had run out, one
    further up or the machine; in version 2 with the groups below (``memory.events``), in version 1
    without them (``memory.oom_control``). Where no group counts, the machine does
    (``/proc/vmstat``, Linux 4.13), which is weak evidence, and the best there is.

    Returns:
        The count; only its rising means something. None where nobody counts.
    """
    for group in control_groups():
        count = group.oom_kills()
        if count is not None:
            return count
    return _number(read_file("/proc/vmstat"), b"oom_kill ")


def oom_counter() -> str:
    """Where `oom_kills` reads its count."""
    for group in control_groups():
        if group.oom_kills() is not None:
            return str(group.folder)
    return "/proc/vmstat"


#: How often the count is read while children end in order, in seconds.
LOOK_SECONDS = 0.2


class OOMKills:
    """Tells the deaths that the kernel's out-of-memory killer has dealt from others, as they come.

    The kernel counts, and does not name. So each rise of the count explains one death by SIGKILL
    that is seen soon after it.
    """

    def __init__(self) -> None:
        self._count = oom_kills()
        self._unexplained = 0
        self._rose_at = self._looked_at = 0.0
        #: The last rise, in words.
        self.evidence = ""

    def look(self, *, at_once: bool = True) -> None:
        """Note how many there were since the last look; those of long ago explain nothing.

        Args:
            at_once: Else only where the last look is a moment ago.
        """
        now = time.monotonic()
        if not at_once and now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        before, self._count = self._count, oom_kills()
        if now - self._rose_at > OOM_KILL_SECONDS:
            self._unexplained = 0
        if before is not None and self._count is not None and self._count > before:
            self._unexplained += self._count - before
            self._rose_at = now
            self.evidence = f"oom_kill of {oom_counter()} rose from {before} to {self._count}"

    def explain_one(self) -> bool | None:
        """Whether a death just now was one, and not another one's; None where nobody counts."""
        if self._count is None:
            return None
        if not self._unexplained:
            return False
        self._unexplained -= 1
        return True


class ControlGroup:
    """One control group, as far as memory goes.

    Args:
        folder: Where it is.
        version: 2, or 1 for a group of the memory hierarchy.
    """

    def __init__(self, folder: Path, version: int) -> None:
        self.folder = folder
        self.version = version
        self._is_v2 = version == 2

    def limit_bytes(self) -> int | None:
        """What its processes may use together; None where nothing is said."""
        if self._is_v2:
            limit = self._bytes("memory.max")
        else:
            # Version 1 also tells of limits further up, which a container does not see.
            above = _number(self._read("memory.stat"), b"hierarchical_memory_limit ")
            limits = (self._bytes("memory.limit_in_bytes"), above)
            limit = min((one for one in limits if one is not None), default=None)
        # "max", or in version 1 a number beyond all memory.
        return limit if limit is not None and limit < 1 << 60 else None

    def used_bytes(self) -> int | None:
        """What they use, without the caches that the kernel drops first; None if nobody tells."""
        used = self._bytes("memory.current" if self._is_v2 else "memory.usage_in_bytes")
        if used is None:
            return None
        name = b"inactive_file " if self._is_v2 else b"total_inactive_file "
        return used - (_number(self._read("memory.stat"), name) or 0)

    def peak_bytes(self) -> int | None:
        """The most they have used at a time; None where nobody tells: in version 2 Linux 5.19."""
        return self._bytes("memory.peak" if self._is_v2 else "memory.max_usage_in_bytes")

    def oom_kills(self) -> int | None:
        """How many of them the kernel has killed for want of memory; None where nobody counts."""
        events = self._read("memory.events" if self._is_v2 else "memory.oom_control")
        return _number(events, b"oom_kill ")

    def _bytes(self, name: str) -> int | None:
        text = self._read(name).strip()
        return int(text) if text.isdigit() else None

    def _read(self, name: str) -> bytes:
        return read_file(os.path.join(self.folder, name))


@functools.cache
def control_groups() -> tuple[ControlGroup, ...]:
    """The control groups of this process that may know of memory, innermost first (cgroups(7))."""
    listing = read_file("/proc/self/cgroup").decode(errors="replace")
    return find_control_groups(listing, read_file("/proc/self/mountinfo").decode(errors="replace"))


def find_control_groups(listing: str, mountinfo: str) -> tuple[ControlGroup, ...]:
    """What `control_groups` finds in ``/proc/PID/cgroup`` and ``/proc/PID/mountinfo``."""
    found: list[ControlGroup] = []
    for line in listing.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        mounted = _mount_of(version, mountinfo)
        if mounted is None:
            continue
        mount, root = mounted
        inside = mount
        # In a container the path may be that of the host, and its own group the mount's root.
        if PurePosixPath(path).is_relative_to(root) and ".." not in path.split("/"):
            below = mount / PurePosixPath(path).relative_to(root)
            inside = below if below.is_dir() else mount
        steps = [inside, *inside.parents]
        found += [ControlGroup(step, version) for step in steps[: steps.index(mount) + 1]]
    return tuple(found)


def _mount_of(version: int, mountinfo: str) -> tuple[Path, str] | None:
    """Where the hierarchy is mounted, and which of its groups is there (proc(5))."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        is_v1 = kind == "cgroup" and "memory" in options.split(" ")[-1].split(",")
        if (kind == "cgroup2") if version == 2 else is_v1:
            fields = before.split(" ")
            return Path(fields[4]), fields[3]
    return None


def _number(text: bytes, name: bytes) -> int | None:
    """The number after a name at the beginning of a line."""
    for line in text.splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return None
