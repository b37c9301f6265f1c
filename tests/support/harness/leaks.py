"""Tells what a test left behind: open descriptors, processes, temporary files."""

import gc
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.marks import describe, kill, marked_processes, wait

#: A process that was told to go may still be on its way; this long it may take.
GRACE = 2.0


@dataclass(frozen=True)
class Snapshot:
    """What was there before the test.

    Args:
        mark: stands in the environment of what the test starts.
        folder: the temporary folder of the test.
        descriptors: number and target of each open descriptor of this process.
        processes: the processes that this one had started, directly or not.
        files: what the folder held.
    """

    mark: str
    folder: Path
    descriptors: frozenset[tuple[int, str]]
    processes: frozenset[psutil.Process]
    files: frozenset[Path]

    @classmethod
    def take(cls, *, mark: str, folder: Path) -> "Snapshot":
        """Look around before the test."""
        gc.collect()  # what an earlier test dropped must not be closed during this one
        return cls(mark, folder, _descriptors(), _processes(mark), _files(folder))

    def leaks(self) -> list[str]:
        """One line for each thing that is there now and was not before.

        Processes that are left are killed, so that one leak fails one test and not those after it.
        """
        processes = self._lasting_processes()
        lines = [describe(process) for process in processes]
        kill(processes)
        # After the processes: they may have removed their files on their way out.
        gc.collect()
        lines += [f"descriptor {n} -> {at}" for n, at in _new(_descriptors(), self.descriptors)]
        lines += [f"file {path}" for path in _new(_files(self.folder), self.files)]
        return lines

    def _lasting_processes(self) -> list[psutil.Process]:
        new = _processes(self.mark) - self.processes
        alive = wait(new, timeout=GRACE)
        # Those that ended may have started others meanwhile.
        return sorted({*alive, *(_processes(self.mark) - self.processes)}, key=lambda p: p.pid)


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


def _processes(mark: str) -> frozenset[psutil.Process]:
    # Children that were forked without an exec show the environment that pytest itself was started
    # with, so the mark alone would miss them.
    return frozenset([*psutil.Process().children(recursive=True), *marked_processes(mark)])


def _files(folder: Path) -> frozenset[Path]:
    return frozenset(folder.rglob("*"))
