"""Slots that run callables in children, and other processes that tests have to do with."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psutil
import pytest

from harness import marks
from isolated_tasks.process import pickling
from isolated_tasks.process.children import Children
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.options import ProcessOptions
from isolated_tasks.process.outcome import Outcome

P = ParamSpec("P")
T = TypeVar("T")

#: Something that does not happen within this many seconds does not happen: a machine that is busy
#: with other things needs some.
PATIENCE = 30.0

#: What was killed has to be gone after this many seconds.
KILL_TIME = 5.0


class Slot:
    """What a pool process or a thread of a worker is to its children.

    Args:
        address: of the forkserver's socket.
        slots: how many calls may run at a time.
        spares: how many children may be there ahead.
        options: of the processes.
    """

    def __init__(self, address: str, *, slots: int = 1, spares: int = 0, **options: Any) -> None:
        self.address = address
        self.spares = spares
        self.children = Children(slots)
        self.options = ProcessOptions(**{"name": "test", **options})

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the function in a child; return its result, or raise what it raised."""
        result: T = self.outcome(self.options, function, *args, **kwargs).result()
        return result

    def outcome(
        self, options: ProcessOptions, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Outcome:
        """Run the function in a child with these options."""
        pickled = pickling.dumps((function, args, kwargs))
        return self.children.call(pickled, options, lambda: self.address, spares=self.spares)

    def close(self) -> None:
        self.children.close()


class Background:
    """A call in a thread of its own: ``with Background(slot.run, body) as call: call.result()``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._function = function
        self._args = args
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Background":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the call does not end"

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._result = self._function(*self._args)
        except BaseException as exc:
            self._error = exc

    def result(self) -> Any:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the call does not end"
        if self._error is not None:
            raise self._error
        return self._result


class Interrupted(Exception):
    """What a signal handler raises in the middle of a wait, as Celery's time limits do."""


#: For tests that interrupt. An exception may come as a socket is made, before anybody has it; then
#: Python closes it, and warns.
INTERRUPTS = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


class Mailbox:
    """Where processes tell the test something (`bodies.report`), whoever they belong to."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / f"mailbox-{os.urandom(4).hex()}")
        os.mkfifo(self.path)
        # For writing too, so that it never ends.
        self._descriptor = os.open(self.path, os.O_RDWR)
        self._data = b""

    def read(self) -> list[Any]:
        """The next message, once it is there."""
        while b"\n" not in self._data:
            ready, _, _ = select.select([self._descriptor], [], [], PATIENCE)
            assert ready, "nobody has reported"
            self._data += os.read(self._descriptor, 65536)
        line, self._data = self._data.split(b"\n", 1)
        message: list[Any] = json.loads(line)
        return message

    @property
    def is_empty(self) -> bool:
        """Whether there is no message now."""
        return not self._data and not select.select([self._descriptor], [], [], 0)[0]

    def close(self) -> None:
        os.close(self._descriptor)


class Word:
    """Lets bodies wait for the test: `bodies.wait_for_word`."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / f"word-{os.urandom(4).hex()}")
        os.mkfifo(self.path)

    def give(self, word: str = "go") -> None:
        """Give it to one body; waits until that is there."""
        with open(self.path, "w") as file:
            file.write(word)


@contextlib.contextmanager
def program(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``python -m module`` with this process's import path; kill it at the end."""
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def survivors(pids: Iterable[int], *, timeout: float = KILL_TIME) -> set[int]:
    """Those that are still alive when they have had time enough to go.

    A zombie is not: orphans are reaped by init, whenever it likes.
    """
    deadline = time.monotonic() + timeout
    return {pid for pid in pids if not _has_ended(pid, deadline)}


def _has_ended(pid: int, deadline: float) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        ready, _, _ = select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
        return bool(ready)
    finally:
        os.close(pidfd)


def wait_gone(pids: Iterable[int]) -> None:
    """Wait for processes that end by themselves."""
    left = survivors(pids, timeout=PATIENCE)
    assert not left, f"still there: {left}"


class NoSuchRightError(Exception):
    """This process may not choose pids."""


@contextlib.contextmanager
def stranger(pid: int) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that has to do with nobody and has this pid, which must be free, and a child.

    Raises:
        NoSuchRightError: The kernel lets nobody like us choose.
    """
    command = ["sh", "-c", "sleep 1000 & exec sleep 1000"]
    tick = threading.Event()
    for _ in range(1000):
        try:
            # proc(5), ns_last_pid: the next process gets the number after this one, unless somebody
            # else on this machine is faster.
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        except OSError as exc:
            raise NoSuchRightError(str(exc)) from exc
        with subprocess.Popen(command, start_new_session=True) as process:
            try:
                if process.pid == pid:
                    while not psutil.Process(pid).children():
                        tick.wait(0.005)
                    yield process
                    return
            finally:
                os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"somebody else has the pid {pid}")


def wait_status(pid: int, *statuses: str) -> None:
    """Wait until a process of somebody else sleeps, is stopped, is a zombie."""
    process = psutil.Process(pid)
    # Nobody but its parent is told, so there is no event to wait for.
    tick = threading.Event()
    for _ in range(int(PATIENCE / 0.005)):
        if process.status() in statuses:
            return
        tick.wait(0.005)
    raise AssertionError(f"it never was {statuses}: {marks.describe(process)}")


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process of somebody else does not run."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_status(pid, psutil.STATUS_STOPPED)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def settle(launcher: Launcher) -> None:
    """Wait until the forkserver has done with all that happened before."""
    # Three times: a signal is seen by the round after the one that it comes in, and in that one
    # our connection may be served first.
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(launcher.address)
            connection.send(b"nonsense, which it answers by closing")
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""


def wait_connected(address: str, *, more_than: int = 1) -> None:
    """Wait until somebody waits for the forkserver to accept a connection.

    Args:
        address: of the forkserver.
        more_than: the listener itself, and the connections that are accepted.
    """
    tick = threading.Event()
    for _ in range(int(PATIENCE / 0.005)):
        # unix(7): each connection is listed under the address of the listener; st 03 is connected,
        # and the first line is the listener itself.
        with open("/proc/net/unix") as file:
            if sum(line.rstrip().endswith(address) for line in file) > more_than:
                return
        tick.wait(0.005)
    raise AssertionError("nobody connects")
