"""A control group of its own for each child: the kernel itself holds the memory limit.

Whoever looks at the memory of a process from time to time misses what it allocates in between. In
a control group with a limit the allocation itself fails or is paid for with a kill, whichever of
the processes in the group makes it (cgroups(7)). For that a part of the hierarchy has to be ours to
make groups in; `Delegation.find` tells whether one is. Where none is, there is the look.

A group counts what its processes were the first to touch: memory, files in memory (``/dev/shm``),
what the kernel holds for them. Not what a child shares with its forkserver; a look counts that too.

What the groups of version 2 and those of version 1 do differently:

=================== =================================== =====================================
..                  version 2                           version 1
=================== =================================== =====================================
made in             a group that holds no processes     the group of this process
at the limit dies   the whole group                     the process with the most memory
the limit holds     memory; nothing is swapped          memory and swap together
`Group.kill`        one write (Linux 5.14)              a signal for each process
=================== =================================== =====================================
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from isolated_tasks.process import descendants, memory

__all__ = ["Delegation", "Group", "Groups", "NoPlaceError", "is_full"]

#: What the names of our groups begin with. The pid of the process that made it follows, so that
#: another one can tell whether that is still there.
PREFIX = "isolated-"
_NAME = re.compile(rf"{PREFIX}(\d+)-\w+")
#: Where the processes of a worker go that have to leave the group above.
_WORKER = "isolated_worker"
#: How often to look whether any have been forked while they went.
_ROUNDS = 10
#: There is one if systemd runs (sd_booted(3)): then groups are its own unless it says otherwise.
_SYSTEMD = Path("/run/systemd/system")
#: What the kernel kills for if there is no room for it: up to 8 pages (PAGE_ALLOC_COSTLY_ORDER).
_LARGEST_BYTES = 8 * os.sysconf("SC_PAGE_SIZE")


class NoPlaceError(Exception):
    """No groups can be made; says why."""


# ── one group ───────────────────────────────────────────────────────────────────────────────────


class Group(memory.ControlGroup):
    """The group of one child and its descendants, which nobody leaves by accident.

    `limit_bytes`, `used_bytes`, `peak_bytes` and `oom_kills` tell of it what `memory.ControlGroup`
    tells of any. Files that its processes read or write count as used and in the peak as long as
    they are cached; but the kernel drops those before it kills. The count of kills begins with 0,
    and says whether, not how many: the first of a whole group that is killed counts twice.
    """

    @classmethod
    def at(cls, folder: str | None) -> Group | None:
        """The group that is there, for another process than its maker; None for None."""
        return None if folder is None else cls(Path(folder), _version_of(Path(folder)))

    def add(self, pid: int) -> None:
        """Move a process into the group; 0 is the one that calls.

        What it forks from now on is in the group too. Memory that it has touched before stays with
        the group that it comes from, so a child has to be moved before its body begins. The first
        move in a while waits for all processors (RCU; 5 to 8 ms), those that follow do not.

        Raises:
            OSError: It cannot be moved, or is gone.
        """
        _write(self.folder / "cgroup.procs", str(pid))

    def join(self) -> bool:
        """Move this process, which has one thread, into the group; whether it went."""
        try:
            # Version 1 moves a thread without that wait.
            _write(self.folder / ("tasks" if self.version == 1 else "cgroup.procs"), "0")
        except OSError:
            return False
        return True

    def limit_hit(self) -> bool:
        """Whether the kernel has killed for the limit of this group, and not for one above it."""
        if not self.oom_kills():
            return False
        if self.version == 2:
            events = _words(self.folder / "memory.events")
            return events[events.index("oom") + 1] != "0" if "oom" in events else False
        # Not by memory.failcnt, which newer kernels leave at 0. Where memory and swap are counted
        # together, that may be the limit that was met.
        limit = self.limit_bytes()
        peaks = (self._bytes(f"memory.{kind}max_usage_in_bytes") for kind in ("", "memsw."))
        return limit is not None and any(is_full(peak, limit) for peak in peaks)

    def pids(self) -> list[int]:
        """The processes in it, and in groups that they have made below; no zombies."""
        return [pid for folder, _, _ in os.walk(self.folder) for pid in _pids(Path(folder))]

    def kill(self) -> None:
        """Send SIGKILL to all processes in it; returns before they are gone."""
        try:
            _write(self.folder / "cgroup.kill", "1")
        except OSError:
            # Version 1, or before Linux 5.14. Who is to be killed cannot fork any more, so there is
            # an end to those who were forked between the listing and the signal.
            told: set[int] = set()
            while new := set(self.pids()) - told:
                told |= new
                for pid in new:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)

    def remove(self) -> bool:
        """Remove the group, and those that its processes have made below.

        Returns:
            Whether it is gone; it is not while there are processes in it other than zombies.
        """
        for folder, _, _ in os.walk(self.folder, topdown=False):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                pass
            except OSError:
                return False
        return True


def is_full(peak_bytes: int | None, limit_bytes: int) -> bool:
    """Whether a group that held so much had no room for what a process may ask for at once."""
    return peak_bytes is not None and peak_bytes > limit_bytes - _LARGEST_BYTES


def _version_of(folder: Path) -> int:
    return 1 if (folder / "memory.oom_control").exists() else 2


# ── those of one forkserver ─────────────────────────────────────────────────────────────────────


class Groups:
    """The groups that one forkserver makes for its children.

    Args:
        complain: Told, once, that a group could not be made or joined: then that limit is kept by
            looking alone.
    """

    def __init__(self, complain: Callable[..., object]) -> None:
        self._complain = complain
        self._names = itertools.count(1)
        self._busy: list[Group] = []
        # Those with processes that are to live.
        self._kept: list[Group] = []
        self._delegation: Delegation | None = None
        try:
            self._delegation = found = Delegation.find()
        except NoPlaceError as exc:
            #: How memory limits are kept, for the log.
            self.description = (
                f"by looking at processes every {memory.SHORTEST:g} to {memory.LONGEST:g} s "
                f"(no control groups: {exc})"
            )
        else:
            self.description = f"cgroup v{found.version} groups below {found.folder}"

    def make(self, limit_bytes: int | None) -> Group | None:
        """A new group with this limit; None where no limit is asked for, or none can be made."""
        if self._delegation is None or limit_bytes is None:
            return None
        try:
            return self._delegation.create(str(next(self._names)), limit_bytes)
        except OSError as exc:
            self._complain_once(f"cannot be made: {exc}")
            return None

    def adopt(self, folder: str | None) -> Group | None:
        """The group that a dead forkserver has made; None if it is not one of those."""
        if self._delegation is None or folder is None:
            return None
        path = Path(folder)
        is_one = path.parent == self._delegation.folder and _NAME.fullmatch(path.name)
        return Group(path, self._delegation.version) if is_one else None

    def finish(self, group: Group | None, *, kill: bool = True) -> None:
        """End what is left in a group, or let it live, and remove it as soon as that is gone."""
        if group is not None and kill:
            group.kill()
            self._busy.append(group)
        elif group is not None:
            self._kept.append(group)
        self.tidy()

    def tidy(self) -> bool:
        """Remove what could not be removed before; whether all is gone that is to go."""
        self._busy = [group for group in self._busy if not group.remove()]
        self._kept = [group for group in self._kept if not group.remove()]
        return not self._busy

    def check_joined(self, group: Group | None) -> None:
        """Complain if a child that has ended in order was never in its group."""
        if group is not None and group.peak_bytes() == 0:
            self._complain_once(f"cannot be joined: {group.folder}")

    def _complain_once(self, reason: str) -> None:
        self._complain("a control group %s; a memory limit is kept by looking alone", reason)
        self._complain = lambda *_: None


# ── where they are made ─────────────────────────────────────────────────────────────────────────


class Delegation:
    """A place in the hierarchy in which we may make groups.

    Args:
        folder: Where it is.
        version: Of control groups, 1 or 2.
    """

    def __init__(self, folder: Path, version: int) -> None:
        self.folder = folder
        self.version = version

    @classmethod
    def find(cls) -> Delegation:
        """The place for the children of this process, a forkserver.

        In version 2 a group that holds processes cannot pass on the control of memory to groups
        below it, the root's excepted. So it is the group above that of this process, if it was
        delegated (systemd's ``Delegate=memory`` and ``DelegateSubgroup=``), and holds no processes.
        Else it is our own, if the worker is alone in it: then all of it moves down one step. What
        is not the worker's is never moved.

        Groups that an earlier process has left behind there, and that are empty, are removed.

        Raises:
            NoPlaceError: There is none.
        """
        refusals = []
        for version in (2, 1):
            lineage = [one.folder for one in memory.control_groups() if one.version == version]
            # In a container the path may be that of the host, and what is there not our group.
            if not lineage or os.getpid() not in _pids(lineage[0]):
                continue
            for folder in lineage[1::-1] if version == 2 else lineage[:1]:
                delegation = cls(folder, version)
                try:
                    delegation._prepare(lineage)
                    delegation._try()
                except (NoPlaceError, OSError) as exc:
                    refusals.append(f"{folder}: {exc}")
                    continue
                delegation._sweep()
                return delegation
        raise NoPlaceError("; ".join(refusals) or "they are not mounted")

    def create(self, name: str, limit_bytes: int) -> Group:
        """Make a group with a limit.

        Args:
            name: Which no other group of this process has while there is one of that name.
            limit_bytes: What its processes may use together.

        Raises:
            OSError: The kernel refuses; nothing is left behind.
        """
        folder = self.folder / f"{PREFIX}{os.getpid()}-{name}"
        folder.mkdir()
        group = Group(folder, self.version)
        try:
            if self.version == 2:
                _write(folder / "memory.max", str(limit_bytes))
                # Linux 4.19. Without it a part of the group might go on.
                _write(folder / "memory.oom.group", "1")
                _write(folder / "memory.swap.max", "0", optional=True)
            else:
                _write(folder / "memory.limit_in_bytes", str(limit_bytes))
                # Never below the one of memory, so after it. Only where swap is accounted for.
                _write(folder / "memory.memsw.limit_in_bytes", str(limit_bytes), optional=True)
        except OSError:
            group.remove()
            raise
        return group

    def _prepare(self, lineage: Sequence[Path]) -> None:
        """Make sure that it is ours to use, and have it limit groups below.

        Args:
            lineage: Our own group and those above it.
        """
        own = lineage[0]
        above = lineage[lineage.index(self.folder) :]
        if self.version == 1:
            # What it has delegated, systemd says in version 2 alone.
            if _SYSTEMD.exists():
                raise NoPlaceError("it is systemd's")
            # A group takes over from the one above whether it kills at all.
            control = _words(self.folder / "memory.oom_control")
            if control[:2] != ["oom_kill_disable", "0"] or "oom_kill" not in control:
                raise NoPlaceError("nobody is killed at a limit there, or nobody counts")
            return
        if "memory" not in _words(self.folder / "cgroup.controllers"):
            raise NoPlaceError("without the memory controller")
        is_delegated = own == self.folder / _WORKER or _is_delegated(above)
        if not is_delegated and (self.folder != own or _SYSTEMD.exists()):
            raise NoPlaceError("it is not delegated")
        if self.folder != own and memory.ControlGroup(own, 2).limit_bytes() is not None:
            raise NoPlaceError(f"groups in it would not be in {own}, which has a limit")
        # Moving a process takes the right to write here, above where it comes from and where it
        # goes.
        if not os.access(self.folder / "cgroup.procs", os.W_OK):
            raise NoPlaceError("it is not writable")
        if (self.folder / "cgroup.type").exists() and _words(self.folder / "cgroup.procs"):
            if self.folder != own:
                raise NoPlaceError("it holds processes itself")
            self._move_down()
        if "memory" not in _words(self.folder / "cgroup.subtree_control"):
            _write(self.folder / "cgroup.subtree_control", "+memory")

    def _move_down(self) -> None:
        """Empty our own group into one below it, if it has none but the worker's processes."""
        below = self.folder / _WORKER
        for _ in range(_ROUNDS):
            pids = {int(pid) for pid in _words(self.folder / "cgroup.procs")}
            if not pids:
                # What was our own group counts those below it as well.
                memory.control_groups.cache_clear()
                return
            strangers = pids - set(descendants.tree(os.getppid()))
            if strangers:
                raise NoPlaceError(f"it holds processes that are not the worker's ({strangers})")
            below.mkdir(exist_ok=True)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    _write(below / "cgroup.procs", str(pid))
        raise NoPlaceError("it gets new processes all the time")

    def _try(self) -> None:
        """Make a group: permissions and read-only mounts tell."""
        self.create("probe", 1 << 30).remove()

    def _sweep(self) -> None:
        for folder in self.folder.glob(f"{PREFIX}*"):
            match = _NAME.fullmatch(folder.name)
            # One with our own pid is from before we had it.
            if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
                # One with processes stays: calls outlive their forkserver.
                Group(folder, self.version).remove()


def _is_delegated(lineage: Sequence[Path]) -> bool:
    """Whether somebody has left the first of these groups, and what is below, to us.

    That root may write there says nothing: a service that runs as root would make groups in
    ``system.slice``, which is systemd's, and outside of its own limits.
    """
    folder = lineage[0]
    for attribute in ("user.delegate", "trusted.delegate"):
        # systemd marks what it delegates; the second is for root alone, and older.
        with contextlib.suppress(OSError):
            if os.getxattr(folder, attribute) == b"1":
                return True
    if len(lineage) == 1:
        # The uppermost that we see. Only the machine's root has no limit; this is a container's.
        return (folder / "memory.max").exists()
    # Delegated by giving it away (cgroups(7), "Delegation"): where the owner changes is the border.
    # Below it, a session of systemd's may rule.
    user = os.geteuid()
    return user != 0 and folder.stat().st_uid == user != lineage[1].stat().st_uid


# ── files of the kernel's ───────────────────────────────────────────────────────────────────────


def _pids(folder: Path) -> list[int]:
    """The processes of one group. One of a namespace that we do not see is 0, which is left out."""
    return [int(pid) for pid in _words(folder / "cgroup.procs") if pid != "0"]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _write(path: Path, text: str, *, optional: bool = False) -> None:
    """Write to a file of the kernel's, which is never made; one that is optional may be missing."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if optional:
            return
        raise
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
