"""Descriptors, memory and files while nothing runs: what grows from one rest to the next."""

import collections
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.leaks import descriptors_of
from soak.members import Member, census

#: What a requester holds for each child.
OF_A_CHILD = {
    "/memfd:isolated_tasks-crash (deleted)": 1,
    "anon_inode:[pidfd]": 1,
    "anon_inode:[eventpoll]": 1,
    "pipe": 1,
    "socket": 2,
}

#: After so many seconds of load a process has what it needs.
WARM_SECONDS = 600.0

#: The roles that live longer than a call.
LASTING = ("main process", "pool process", "forkserver")


@dataclass(frozen=True)
class Sample:
    """One process at rest."""

    member: str
    role: str
    #: Seconds since the soak began.
    at: float
    #: Seconds since it was started.
    age: float
    #: By what they are of, without those for children.
    descriptors: Mapping[str, int]
    #: Children that it holds descriptors for: the last of each slot and a spare that no call has
    #: come for, until a call needs another.
    children: int
    rss_bytes: int


@dataclass(frozen=True)
class Growth:
    """How one process has changed from its first rest to its last."""

    member: str
    role: str
    seconds: float
    descriptors: int
    #: By what they are of.
    new_descriptors: Mapping[str, int]
    #: Of its last rest, see `Sample`.
    children: int
    rss_bytes: int
    #: At each rest.
    rss_mib: Sequence[float]
    #: Whether the first rest is one of a process that has all that it needs.
    is_warm: bool


class Scales:
    """The samples of all processes, by who they are."""

    def __init__(self) -> None:
        self._samples: dict[psutil.Process, list[Sample]] = {}

    def weigh(self, members: Sequence[Member], at: float) -> None:
        """Take a sample of each lasting process."""
        for mark, family in census(members).items():
            member = next(one for one in members if one.mark == mark)
            for role in LASTING:
                for process in family.by_role[role]:
                    try:
                        children, descriptors = _descriptors(process.pid)
                        rss = process.memory_info().rss
                        age = time.time() - process.create_time()
                        sample = Sample(member.name, role, at, age, descriptors, children, rss)
                    except (psutil.Error, OSError):
                        continue
                    self._samples.setdefault(process, []).append(sample)

    def growths(self) -> list[Growth]:
        """Of each process that has been weighed twice."""
        found = []
        for samples in self._samples.values():
            warm = [one for one in samples if one.age > WARM_SECONDS]
            first, last = (warm or samples)[0], samples[-1]
            if first is last:
                # Too young to have been at rest twice since; what there is has to do.
                first = samples[0]
            if first is not last:
                new = collections.Counter(last.descriptors)
                new.subtract(first.descriptors)
                found.append(
                    Growth(
                        first.member,
                        first.role,
                        last.at - first.at,
                        sum(new.values()),
                        {name: count for name, count in new.items() if count},
                        last.children,
                        last.rss_bytes - first.rss_bytes,
                        [round(one.rss_bytes / 2**20, 1) for one in samples],
                        first.age > WARM_SECONDS,
                    )
                )
        return found


def _descriptors(pid: int) -> tuple[int, Mapping[str, int]]:
    """The children that a process holds descriptors for, and its other descriptors."""
    # Without the kernel's numbers: socket, pipe, anon_inode:[pidfd], /dev/null.
    found = collections.Counter(re.sub(r":\[\d+\]$", "", at) for at in descriptors_of(pid))
    children = found["/memfd:isolated_tasks-crash (deleted)"]
    found.subtract({name: count * children for name, count in OF_A_CHILD.items()})
    return children, found


#: What Python prints of an exception that ends a process: a module that was run, or a child.
_CRASH = re.compile(r'in _run_module_as_main$|process/child\.py", line \d+, in main$', re.MULTILINE)


def crashes(log: Path) -> int:
    """How many processes have ended with a traceback, by what they have printed."""
    return len(_CRASH.findall(log.read_text(errors="replace"))) if log.exists() else 0


def shared_memory() -> set[str]:
    """The names in /dev/shm."""
    try:
        return set(os.listdir("/dev/shm"))
    except FileNotFoundError:
        return set()


def folders(temporary: Path) -> Mapping[str, list[str]]:
    """What workers have put into their temporary folder, by whose it is."""
    names = sorted(os.listdir(temporary))
    return {
        "ours": [name for name in names if name.startswith("isolated_tasks-")],
        # Of billiard; a killed main process cannot remove it.
        "celery's": [name for name in names if name.startswith("pymp-")],
        "others": [name for name in names if not name.startswith(("isolated_tasks-", "pymp-"))],
    }
