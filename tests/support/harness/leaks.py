"""Tells what a test left behind: descriptors, processes, zombies, files, shared memory."""

import gc
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from harness.marks import describe, is_alive, kill, marked_processes, wait

T = TypeVar("T")

#: What was told to go may still be on its way; this long it may take.
GRACE = 2.0

#: Where shared memory and semaphores are, which are files (shm_overview(7), sem_overview(7)).
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Snapshot:
    """What was there before the test.

    Args:
        mark: stands in the environment of what the test starts.
        folders: the temporary folders of the test.
        descriptors: number and target of each open descriptor of this process.
        processes: the processes that this one had started, directly or not.
        zombies: those of them that nobody had reaped.
        files: what the folders held.
        shared: names of shared memory and semaphores, whoever made them.
        servers: what other processes had open that outlive the test, by pid.
    """

    mark: str
    folders: Sequence[Path]
    descriptors: frozenset[tuple[int, str]]
    processes: frozenset[psutil.Process]
    zombies: frozenset[psutil.Process]
    files: frozenset[Path]
    shared: frozenset[str]
    servers: dict[int, Counter[str]]

    @classmethod
    def take(cls, *, mark: str, folders: Sequence[Path], servers: Iterable[int] = ()) -> "Snapshot":
        """Look around before the test.

        Args:
            mark: see the class.
            folders: see the class.
            servers: pids of forkservers that several tests share.
        """
        gc.collect()  # what an earlier test dropped must not be closed during this one
        return cls(
            mark=mark,
            folders=folders,
            descriptors=_descriptors(),
            processes=_processes(mark),
            zombies=_zombies(),
            files=_files(folders),
            shared=_shared(),
            servers={pid: _kinds(pid) for pid in servers},
        )

    def leaks(self) -> list[str]:
        """One line for each thing that is there now and was not before.

        Processes that are left are killed, so that one leak fails one test and not those after it.
        """
        # First: to wait for a child of ours is to reap it.
        lines = [f"zombie {describe(one)}" for one in self._lasting_zombies()]
        processes = self._lasting_processes()
        lines += [describe(process) for process in processes]
        kill(processes)
        # After the processes: they may have removed their files on their way out.
        gc.collect()
        lines += [f"descriptor {n} -> {at}" for n, at in _new(_descriptors(), self.descriptors)]
        lines += [f"file {path}" for path in _new(_files(self.folders), self.files)]
        lines += [f"shared memory {name}" for name in _lasting(self._new_shared)]
        lines += _lasting(self._leaks_of_servers)
        return lines

    def _lasting_zombies(self) -> list[psutil.Process]:
        lasting = _lasting(lambda: _zombies() - self.zombies)
        for one in lasting:
            if one.ppid() == os.getpid():
                os.waitpid(one.pid, os.WNOHANG)
        return sorted(lasting, key=lambda process: process.pid)

    def _lasting_processes(self) -> list[psutil.Process]:
        new = _processes(self.mark) - self.processes
        alive = wait(new, timeout=GRACE)
        # Those that ended may have started others meanwhile.
        others = filter(is_alive, _processes(self.mark) - self.processes)
        return sorted({*alive, *others}, key=lambda process: process.pid)

    def _new_shared(self) -> list[str]:
        names = _shared() - self.shared
        return sorted(names - _strangers(names)) if names else []

    def _leaks_of_servers(self) -> list[str]:
        lines = []
        for pid, before in self.servers.items():
            if not psutil.pid_exists(pid):
                lines.append(f"forkserver {pid} is gone")
                continue
            for kind, count in (_kinds(pid) - before).items():
                lines.append(f"forkserver {pid} has {count} more of {kind}")
        return lines


def _lasting(look: Callable[[], Collection[T]]) -> Collection[T]:
    """What is still found when it has had time enough to go; nobody tells us when it does."""
    deadline = time.monotonic() + GRACE
    tick = threading.Event()
    while (found := look()) and time.monotonic() < deadline:
        tick.wait(0.005)
    return found


def _new(after: Iterable[tuple[int, str]] | Iterable[Path], before: frozenset) -> list:  # type: ignore[type-arg]
    return sorted(set(after) - before)


def _descriptors() -> frozenset[tuple[int, str]]:
    found = set()
    with os.scandir("/proc/self/fd") as entries:
        for entry in entries:
            try:
                found.add((int(entry.name), os.readlink(entry.path)))
            except FileNotFoundError:
                pass  # closed since it was listed
    # The descriptor of this very listing is among them; it is closed by now.
    return frozenset((n, at) for n, at in found if at != f"/proc/{os.getpid()}/fd")


def _kinds(pid: int) -> Counter[str]:
    """What another process has open, by kind: its numbers change from call to call."""
    return Counter(re.sub(r"\[\d+\]", "", target) for target in _targets(pid))


def _processes(mark: str) -> frozenset[psutil.Process]:
    # Children that were forked without an exec show the environment that pytest itself was started
    # with, so the mark alone would miss them.
    return frozenset([*psutil.Process().children(recursive=True), *marked_processes(mark)])


def _zombies() -> frozenset[psutil.Process]:
    """Those that this process or one of its descendants has to reap.

    What init has to is its business.
    """
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                found.add(process)
        except psutil.NoSuchProcess:
            pass  # reaped since it was listed
    return frozenset(found)


def _files(folders: Sequence[Path]) -> frozenset[Path]:
    return frozenset(path for folder in folders for path in folder.rglob("*"))


def _shared() -> frozenset[str]:
    return frozenset(path.name for path in SHARED_MEMORY.glob("*"))


def _strangers(names: Collection[str]) -> set[str]:
    """Those that a process has mapped, or has in their names, that is not ours.

    They are the whole machine's, and other tests may run on it. joblib and loky name theirs after
    their pids.
    """
    ours = {process.pid for process in psutil.Process().children(recursive=True)} | {os.getpid()}
    found = set()
    for pid in set(psutil.pids()) - ours:
        try:
            mapped = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            mapped = ""  # gone, or another user's
        found |= {one for one in names if f"{SHARED_MEMORY}/{one}" in mapped}
        found |= {one for one in names if str(pid) in re.findall(r"\d+", one)}
    return found


def descriptors_of(pid: int) -> list[str]:
    """What another process has open; sockets and pipes by the kernel's own numbers.

    Without connections to servers: Celery opens those when it first needs them, and keeps them.
    """
    found = _targets(pid)
    remote = _internet_sockets(pid)
    return [at for at in found if at not in remote]


def _targets(pid: int) -> list[str]:
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            pass  # closed since it was listed
    return found


def _internet_sockets(pid: int) -> set[str]:
    """Those of the network that a process is in."""
    found: set[str] = set()
    for name in ("tcp", "tcp6"):
        # proc(5), /proc/net/tcp: the tenth column is the inode.
        lines = Path(f"/proc/{pid}/net", name).read_text().splitlines()[1:]
        found.update(f"socket:[{line.split()[9]}]" for line in lines)
    return found
