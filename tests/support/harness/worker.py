"""A real `celery worker` as a process of its own, and everything that it prints."""

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import celery.apps.worker
import psutil
import pytest
from celery import Celery
from celery.app.defaults import NAMESPACES
from celery.result import AsyncResult

from harness import marks
from harness.network import Machine, wait_for_child

#: A worker that is not ready after this long is stuck; a cold start takes 1 to 3 s on two cores.
START_TIMEOUT = 45.0
#: A warm shutdown with nothing to do takes 1 to 2 s.
STOP_TIMEOUT = 20.0

#: Each pool by the name that the tests use for it.
POOLS = ("prefork", "prefork-spawn", "threads", "gevent", "eventlet", "solo")


def pool_arguments(pool: str) -> tuple[list[str], dict[str, Any]]:
    """Return the options of `celery worker` and the settings that select a pool.

    Where this Celery lacks the pool, the test is skipped.
    """
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}")
    if pool != "prefork-spawn":
        return ["--pool", pool], {}
    if "pool_start_method" not in NAMESPACES["worker"]:
        pytest.skip("this Celery cannot spawn its pool processes (worker_pool_start_method)")
    return ["--pool", "prefork"], {"worker_pool_start_method": "spawn"}


class WorkerError(Exception):
    """A worker did not do what the test waited for; the message ends with its log."""


@dataclass
class _Output:
    """What a process has printed so far, and whether it still runs, under one condition."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    data: bytes = b""
    exited: bool = False

    def wait(self, predicate: Callable[[], Any], timeout: float) -> Any:
        with self.changed:
            return self.changed.wait_for(predicate, timeout)

    def text(self) -> str:
        return self.data.decode(errors="replace")

    def follow(self, pipe: IO[bytes], pidfd: int) -> None:
        """Collect until the process has exited and nobody holds the pipe any more."""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            selector.register(pidfd, selectors.EVENT_READ)  # readable when the process has exited
            while selector.get_map():
                for key, _ in selector.select():
                    if not self._read(key.fd, is_pidfd=key.fd == pidfd):
                        selector.unregister(key.fileobj)

    def _read(self, fd: int, *, is_pidfd: bool) -> bool:
        data = b"" if is_pidfd else os.read(fd, 65536)
        with self.changed:
            self.data += data
            self.exited = self.exited or is_pidfd
            self.changed.notify_all()
        return bool(data)


class Worker:
    """A running worker.

    Args:
        command: what to run.
        env: the whole environment of the worker.
        cwd: where to run it.
        app: the client's end: an app with the same settings, for this process.
        name: Celery's name for this worker.
        pool: one of POOLS.
        enter: what runs the command on another machine, with the main process as its one child.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        app: Celery,
        name: str,
        pool: str,
        enter: Sequence[str] = (),
    ) -> None:
        self.app = app
        #: One of `POOLS`.
        self.pool = pool
        #: Whether the last `stop` had to use SIGKILL.
        self.killed = False
        #: Whether the main process was killed, and could not remove billiard's temporary folder.
        self.was_killed = False
        #: For `destination=` of remote control.
        self.name = name
        # Seconds between the end of the last task and a shutdown, see `stop`.
        self._settle_time = 0.3 if pool.startswith("prefork") else 0.0
        # In Celery 5.5 an idle eventlet worker answers SIGTERM with a green os.write in the hub,
        # and crashes: "do not call blocking functions from the mainloop".
        self._sigterm_crashes = pool == "eventlet" and not hasattr(
            celery.apps.worker, "_original_os_write"
        )
        self._mark = env[marks.VARIABLE]
        self._output = _Output()
        self.process = subprocess.Popen(
            [*enter, *command],
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        #: The pid of the main process, as this machine has it.
        self.pid = wait_for_child(self.process.pid) if enter else self.process.pid
        assert self.process.stdout is not None
        self._pidfd = os.pidfd_open(self.process.pid)
        self._follower = threading.Thread(
            target=self._output.follow,
            args=(self.process.stdout, self._pidfd),
            name=f"log of worker {self.process.pid}",
            daemon=True,  # a leaked grandchild that holds the pipe must not keep pytest from ending
        )
        self._follower.start()

    def call(self, name: str, *args: Any, **kwargs: Any) -> AsyncResult:
        """Send the task `name` with these arguments."""
        return self.app.send_task(name, args, kwargs)

    def log(self) -> str:
        """All that the worker and its processes have printed so far."""
        return self._output.text()

    def wait_for_log(self, pattern: str, timeout: float = 10.0) -> re.Match[str]:
        """Wait until the log matches a regular expression.

        Raises:
            WorkerError: it did not in time, or the worker has exited and will not any more.
        """
        regex = re.compile(pattern)
        found: list[re.Match[str]] = []

        def looked() -> bool:
            found.extend(filter(None, [regex.search(self._output.text())]))
            return bool(found) or self._output.exited

        self._output.wait(looked, timeout)
        if not found:
            raise WorkerError(f"{self._state()}; no {pattern!r} in its log:\n{self.log()}")
        return found[0]

    def wait_until_ready(self) -> None:
        """Wait until the worker takes tasks and hears remote control.

        Raises:
            WorkerError: it does not, or has exited.
        """
        self.wait_for_log(r"@\S+ ready\.", START_TIMEOUT)
        # Over Redis the subscription to remote control follows that line, and what is published
        # before is lost. No answer is no failure: a solo worker may be busy already.
        for _ in range(5):
            # The connection comes from kombu's pool, and may be of a test of long ago, and closed
            # by the broker since. Nobody looks; to send by it is an error, and then it is gone.
            with contextlib.suppress(ConnectionError):
                if self.app.control.ping(destination=[self.name], limit=1, timeout=1.0):
                    return

    def tree(self) -> list[psutil.Process]:
        """Every living process of this worker, the main process first."""
        try:
            main = psutil.Process(self.pid)
            known = [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            known = []
        # Orphans, and processes whose environment was replaced, are in one of the lists only.
        found = dict.fromkeys([*known, *marks.marked_processes(self._mark)])
        return [process for process in found if marks.is_alive(process)]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the main process."""
        if self.process.poll() is None:
            os.kill(self.pid, number)

    def stop(self, timeout: float = STOP_TIMEOUT) -> int:
        """Ask for a warm shutdown, wait, and return the exit code.

        A SIGTERM within milliseconds of a task's end can hang stock prefork for up to a minute:
        the pool process waits to hear that its result was read, by a main process that has left
        its event loop. So this first waits until the log says of each received task that it has
        ended, and a little longer.

        After `timeout` seconds all processes of the worker are killed, and `killed` is true.
        """
        self._settle()
        if self.process.poll() is None:
            self._ask_to_stop()
        self.killed = not self._output.wait(lambda: self._output.exited, timeout)
        if self.killed:
            everything = self.tree()
            self.kill()
            marks.kill(everything)
        return self.process.wait()

    def kill(self) -> int:
        """Send SIGKILL to the main process alone, wait, and return the exit code.

        Popen reaps it, here as everywhere: psutil would swallow the exit code.
        """
        self.was_killed = True
        self.signal(signal.SIGKILL)
        return self.process.wait()

    def close(self) -> list[str]:
        """Stop the worker if it still runs; kill what it left, and return one line for each."""
        if self.process.poll() is None:
            self.stop()
        left = marks.wait(self.tree(), timeout=2.0)
        lines = [marks.describe(process) for process in left]
        marks.kill(left)
        self._follower.join(timeout=5.0)
        assert self.process.stdout is not None
        self.process.stdout.close()
        os.close(self._pidfd)
        return lines

    def _ask_to_stop(self) -> None:
        if self._sigterm_crashes and "ready." in self.log():
            self.app.control.shutdown(destination=[self.name])
            return
        self.signal(signal.SIGTERM)
        # The signal's handler only sets a flag, which an idle main process reads when it next
        # wakes: over AMQP that takes 5 to 10 s, so wake it.
        self.app.control.broadcast("ping")

    def _settle(self) -> None:
        self._output.wait(lambda: self._output.exited or not _unfinished(self.log()), timeout=1.0)
        if _has_run_tasks(self.log()):
            # No event says that the main process has read the last result.
            self._output.wait(lambda: self._output.exited, timeout=self._settle_time)

    def _state(self) -> str:
        code = self.process.poll()
        return f"worker {self.pid} " + ("runs" if code is None else f"exited with {code}")


def start_worker(
    module: str,
    *,
    pool: str,
    concurrency: int,
    app: Celery,
    env: Mapping[str, str],
    path: Sequence[Path],
    cwd: Path,
    loglevel: str = "INFO",
    args: Sequence[str] = (),
    machine: Machine | None = None,
) -> Worker:
    """Start a worker for the app in `module`, which may be the path of a script that runs it.

    The worker may not be ready yet.
    """
    mark = f"worker-{os.urandom(6).hex()}"
    search_path = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
    name = f"celery@{machine.name}" if machine else f"{mark}@localhost"
    options, _ = pool_arguments(pool)
    program = [module] if module.endswith(".py") else ["-m", "celery", "-A", module]
    command = [sys.executable, *program, "worker", "-n", name]
    command += [*options, "-c", str(concurrency), "-l", loglevel]
    command += ["--without-heartbeat", "--without-gossip", "--without-mingle", *args]
    return Worker(
        command,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(search_path),
            # Tests may run as root and accept pickle; Celery refuses that without being told.
            "C_FORCE_ROOT": "1",
            **env,
            marks.VARIABLE: mark,
        },
        cwd=cwd,
        app=app,
        name=name,
        pool=pool,
        enter=machine.enter if machine else (),
    )


_TASK_LINE = re.compile(r"Task \S+?\[([0-9a-f-]{36})\] (\w+)")


def _has_run_tasks(log: str) -> bool:
    return _TASK_LINE.search(log) is not None


def _unfinished(log: str) -> set[str]:
    """Ids of the tasks that were received and of which the log says nothing else yet."""
    lines = _TASK_LINE.findall(log)
    ended = {task_id for task_id, word in lines if word not in ("received", "accepted")}
    return {task_id for task_id, _ in lines} - ended
