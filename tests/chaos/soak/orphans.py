"""Finds what lives on after the end of what it belonged to."""

import contextlib
import os
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

import psutil

from harness import marks
from soak.kinds import CHILD_VARIABLE, start_time
from soak.members import Member, census

#: Nothing that belonged to a process is there so long after its end, in seconds.
ORPHAN_SECONDS = 1.0


@dataclass(frozen=True)
class Orphan:
    """A process that was there when it should have been gone."""

    of: str
    description: str
    #: Seconds after the end of what it belonged to.
    age: float


class Orphans:
    """All that were found so far; each is ended, so that it is found once."""

    def __init__(self) -> None:
        self.found: list[Orphan] = []
        #: How many are none of ours, see `_has_escaped`.
        self.escaped = 0
        #: Children that were killed, or whose requester was, and those whose forkserver was; as
        #: `CHILD_VARIABLE` has them.
        self._killed: set[str] = set()
        self._without_forkserver: set[str] = set()
        #: What bodies have started and is without their child, by pid and start, since when.
        self._bereaved: dict[tuple[int, int], float] = {}

    def note_killed(self, children: Iterable[psutil.Process]) -> None:
        """These children are about to be killed, or their requester is."""
        self._killed |= _identities(children)

    def note_without_forkserver(self, forkserver: psutil.Process) -> None:
        """This forkserver is about to be killed."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._without_forkserver |= _identities(forkserver.children())

    def look_at(self, of: str, processes: Iterable[psutil.Process], age: float) -> None:
        """Those that live should not.

        Args:
            of: what they belonged to.
            processes: which.
            age: since how many seconds that is no more.
        """
        for process in processes:
            if marks.is_alive(process):
                self._add(of, process, age)

    def look_for_bereaved(
        self,
        members: Sequence[Member],
        *,
        stopped: Container[int] = (),
        awake_since: Callable[[str], float] = lambda mark: 0.0,
    ) -> None:
        """Look for what bodies have started whose child has ended; to be called now and then.

        Args:
            members: whose.
            stopped: pids of forkservers that cannot end anything now.
            awake_since: until when those of the worker with this mark could not.
        """
        now = time.monotonic()
        by_mark = {member.mark: member for member in members}
        seen = {}
        for process in marks.every_process():
            try:
                environment = process.environ()
                mark = environment.get(marks.VARIABLE)
                child = environment.get(CHILD_VARIABLE)
                if mark is None or mark not in by_mark or child is None or _is_there(child):
                    continue
                key = process.pid, start_time(process.pid)
            except (psutil.Error, OSError):
                continue  # gone, or another user's
            member = by_mark[mark]
            seen[key] = self._bereaved.get(key, now)
            age = now - max(seen[key], awake_since(mark))
            if age > ORPHAN_SECONDS and not any(pid in stopped for pid in _forkservers(member)):
                self._add(f"child {child} of {member.name}", process, age)
        self._bereaved = seen

    def _add(self, of: str, process: psutil.Process, age: float) -> None:
        if self._has_escaped(process):
            self.escaped += 1
        else:
            self.found.append(Orphan(of, marks.describe(process), age))
        marks.kill([process])

    def _has_escaped(self, process: psutil.Process) -> bool:
        """Whether only its forkserver could have ended it, and was dead when the child was killed.

        A child that ends in order takes everything along; one that is killed its group.
        """
        try:
            child = process.environ().get(CHILD_VARIABLE)
            group = os.getpgid(process.pid)
        except (psutil.Error, OSError):
            return False
        if child is None or child not in self._without_forkserver & self._killed:
            return False
        return group != int(child.partition(":")[0])


def _is_there(child: str) -> bool:
    """Whether this child lives; one that is only to be reaped does not."""
    pid, _, started = child.partition(":")
    try:
        return start_time(int(pid)) == int(started) and not _is_zombie(int(pid))
    except OSError:
        return False


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _forkservers(member: Member) -> list[int]:
    return [one.pid for one in census([member])[member.mark].by_role["forkserver"]]


def _identities(processes: Iterable[psutil.Process]) -> set[str]:
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            found.add(f"{process.pid}:{start_time(process.pid)}")
    return found
