"""The workers, each in a place of its own where it is started again, and their processes."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from harness import marks
from harness.app import Settings
from harness.worker import pool_arguments
from soak import ledger

#: What a process of a worker is.
ROLES = ("main process", "pool process", "forkserver", "child", "grandchild")

FOLDERS = [Path(__file__).parents[1], Path(__file__).parents[2] / "support"]


class Member:
    """The place of one worker.

    Args:
        broker: the name of its broker.
        pool: one of the harness's.
        settings: of its app.
        folder: for its log and its temporary files.
        path: of the ledger.
        environment: further variables.
    """

    def __init__(
        self,
        broker: str,
        *,
        pool: str,
        settings: Settings,
        folder: Path,
        path: str,
        environment: Mapping[str, str],
        concurrency: int = 4,
    ) -> None:
        self.name = f"{broker}-{pool}"
        self.broker = broker
        self.pool = pool
        self.settings = settings
        self.log = folder / f"{self.name}.log"
        self._folder = folder
        self._path = path
        self._environment = environment
        self._concurrency = concurrency
        self._process: subprocess.Popen[bytes] | None = None
        #: Of the worker that is there now: stands in the environment of its processes.
        self.mark = ""
        #: Celery's name of it, the same in the ledger.
        self.worker = ""

    def __repr__(self) -> str:
        return f"{self.name} ({self.worker})"

    @property
    def pid(self) -> int | None:
        """The main process; None before the first."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start a worker; it is ready when the ledger says so."""
        self.mark = f"soak-{os.urandom(6).hex()}"
        self.worker = f"{self.mark}@localhost"
        options, _ = pool_arguments(self.pool)
        command = [sys.executable, "-m", "celery", "-A", "soak.app", "worker", "-n", self.worker]
        command += [
            *options,
            "-c",
            str(self._concurrency),
            "-l",
            "WARNING",
            "--prefetch-multiplier=1",
        ]
        command += ["--without-heartbeat", "--without-gossip", "--without-mingle"]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command,
                env={
                    **os.environ,
                    **self.settings.environ(),
                    "PYTHONPATH": os.pathsep.join(map(str, FOLDERS)),
                    "C_FORCE_ROOT": "1",
                    **self._environment,
                    ledger.VARIABLE: self._path,
                    marks.VARIABLE: self.mark,
                },
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        values = {"worker": self.worker, "broker": self.broker, "pool": self.pool}
        ledger.append(self._path, "started", **values)

    @property
    def is_up(self) -> bool:
        """Whether the main process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def has_ended(self) -> bool:
        """Whether a worker was started, and its main process has ended."""
        return self._process is not None and self._process.poll() is not None

    def stop(self, timeout: float) -> bool:
        """Ask for a warm shutdown; whether it came about in time. Then nothing is left."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout)
            in_time = True
        except subprocess.TimeoutExpired:
            in_time = False
            self._process.kill()
            self._process.wait()
        return in_time

    def reap(self) -> None:
        """Wait for a main process that was killed."""
        assert self._process is not None
        self._process.wait()

    def start_again(self) -> None:
        """Start another worker where one has ended by itself, as a service manager does."""
        assert self._process is not None
        values = {"worker": self.worker, "code": self._process.returncode}
        ledger.append(self._path, "exited", **values)
        self.start()


@dataclass
class Family:
    """The processes of one worker that live now, by their role."""

    by_role: dict[str, list[psutil.Process]] = field(
        default_factory=lambda: {role: [] for role in ROLES}
    )

    def all(self) -> list[psutil.Process]:
        return [process for processes in self.by_role.values() for process in processes]


def census(members: Iterable[Member]) -> dict[str, Family]:
    """Look at all processes; those of each member's worker, by its mark."""
    by_mark = {member.mark: member for member in members}
    families = {mark: Family() for mark in by_mark}
    for process in marks.every_process():
        try:
            mark = process.environ().get(marks.VARIABLE)
            if mark in by_mark:
                families[mark].by_role[_role(process, by_mark[mark])].append(process)
        except (psutil.Error, OSError):
            continue  # gone, a zombie, or another user's
    for family in families.values():
        for processes in family.by_role.values():
            processes.sort(key=lambda process: (process.create_time(), process.pid))
    return families


def _role(process: psutil.Process, member: Member) -> str:
    if process.pid == member.pid:
        return "main process"
    command = " ".join(process.cmdline())
    if process.ppid() == member.pid:
        if "isolated_tasks.process.forkserver" in command:
            return "forkserver"
        return "pool process" if member.pool == "prefork" else "grandchild"
    # A child, forked or spawned, leads a group; what a body forks is in that one.
    if "isolated_tasks.process." in command and os.getpgid(process.pid) == process.pid:
        return "child"
    return "grandchild"


def children_of(pid: int) -> list[psutil.Process]:
    """The children that a requester has asked for: it holds a pidfd of each."""
    found = []
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/fdinfo").iterdir():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                for line in path.read_text().splitlines():
                    # proc(5): only pidfds have it; -1 is a process that has been reaped.
                    if line.startswith("Pid:") and int(line.split()[1]) > 0:
                        found.append(psutil.Process(int(line.split()[1])))
    return found


def send_signal(process: psutil.Process, number: signal.Signals) -> bool:
    """Send a signal to this very process and to no other one that has its pid by now."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        # Asked when the number cannot change hands any more.
        if not marks.is_alive(process):
            return False
        signal.pidfd_send_signal(pidfd, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)


def kill_everything(members: Sequence[Member]) -> list[str]:
    """End whatever of these workers still lives; a line for each."""
    used = [member.mark for member in members if member.mark]
    left = [process for mark in used for process in marks.marked_processes(mark)]
    lines = [marks.describe(process) for process in left]
    for process in left:
        send_signal(process, signal.SIGCONT)
    marks.kill(left)
    return lines
