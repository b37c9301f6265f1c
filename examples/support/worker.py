"""One `celery worker`: started, watched, sampled, and stopped with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from support import interruption, memory
from support.connection import Client, Outcome
from support.errors import WorkerFailed
from support.interruption import Interrupted

EXAMPLES = Path(__file__).resolve().parent.parent

#: Celery's warm shutdown lets running tasks finish; after this it has had its chance.
STOP_GRACE = 15.0
#: Somebody pressed Ctrl-C and waits.
INTERRUPTED_GRACE = 4.0
#: For the processes below a worker that has ended.
ORPHAN_GRACE = 3.0

#: How often it is looked whether there is an outcome, in seconds.
LOOK_INTERVAL = 0.05
#: Without an outcome for this long, the worker counts as hung.
STALL_TIMEOUT = 180.0


def command(app: str, *options: str) -> list[str]:
    """The worker's command line: what anybody would type, less the chatter among workers."""
    line = [sys.executable, "-m", "celery", "-q", "-A", app, "worker", "--loglevel", "WARNING"]
    line += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    return [*line, *options]


class Worker:
    """A worker that lives as long as the `with` block, and not a moment longer.

    Args:
        label: What to call it.
        line: What to run.
        environment: Variables to add to this process's own.
        folder: For its log, and for the temporary files of its whole tree.
    """

    def __init__(
        self, label: str, *, line: list[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        self._label = label
        self._line = line
        self._log = folder / "worker.log"
        path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
        # TMPDIR: whatever a killed worker could not remove goes with the folder.
        self._environment = {
            **os.environ, **environment, "PYTHONPATH": path, "TMPDIR": str(folder)
        }  # fmt: skip

    def __enter__(self) -> Worker:
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C at the terminal reaches this command alone, which then
            # stops the worker in good order.
            self._process = subprocess.Popen(
                self._line,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._main = psutil.Process(self._process.pid)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        grace = INTERRUPTED_GRACE if isinstance(error, Interrupted) else STOP_GRACE
        self._stop(grace)

    def _stop(self, grace: float) -> None:
        """Ask with SIGTERM, wait, then SIGKILL what is left of the worker and of its tree."""
        tree = self._below()
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            tree = list({*tree, *self._below()})
            self._process.kill()
            self._process.wait()
        # They follow the worker by themselves. psutil signals none whose pid was given to another
        # process meanwhile: it compares the times at which they were started.
        for orphan in psutil.wait_procs(tree, timeout=ORPHAN_GRACE)[1]:
            orphan.kill()
        psutil.wait_procs(tree, timeout=ORPHAN_GRACE)

    def _below(self) -> list[psutil.Process]:
        try:
            return self._main.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def check(self) -> None:
        """See that the worker is still there.

        Raises:
            WorkerFailed: It is not.
        """
        code = self._process.poll()
        if code is not None:
            how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
            raise self.failure(f"ended early, {how}")

    def failure(self, what: str) -> WorkerFailed:
        """An error to raise that says what the worker did and ends with the tail of its log."""
        return WorkerFailed(f"the worker of '{self._label}' {what}", log=self._log)

    def processes(self) -> list[psutil.Process]:
        """The main process and all that are below it, now."""
        return [self._main, *self._below()]

    def sample(self) -> memory.Sample:
        """The RSS of the whole tree, now."""
        return memory.sample(self.processes())

    def pss(self) -> dict[int, int]:
        """The PSS of each process of the tree, by pid, now."""
        return memory.pss(self.processes())

    def holds(self, pid: int) -> bool:
        """Whether a process is one of the tree, now."""
        return pid in (process.pid for process in self.processes())

    def waiting(self, what: str) -> Iterator[None]:
        """Yield again and again, for a loop that ends when it has found what it waits for.

        Raises:
            WorkerFailed: The worker has ended, or it took too long.
        """
        deadline = time.monotonic() + STALL_TIMEOUT
        while time.monotonic() < deadline:
            yield
            interruption.check()
            self.check()
            time.sleep(LOOK_INTERVAL)
        raise self.failure(f"gave no {what} for {STALL_TIMEOUT:.0f} s")

    def outcomes(self, client: Client, calls: Iterable[str]) -> list[Outcome]:
        """Wait for the outcomes of calls, which `client.send` has named."""
        found = []
        for call in calls:
            for _ in self.waiting("outcome"):
                if (outcome := client.outcome(call)) is not None:
                    found.append(outcome)
                    break
        return found

    def fail_early(self, client: Client, calls: Iterable[str]) -> None:
        """See that none of the calls has failed yet."""
        for outcome in map(client.outcome, calls):
            if outcome is not None and not outcome.succeeded:
                raise self.failure(f"failed a task: {outcome.result!r}")

    def results(self, client: Client, calls: Iterable[str]) -> list[Any]:
        """Wait for the results of calls, none of which may fail."""
        found = []
        for outcome in self.outcomes(client, calls):
            if not outcome.succeeded:
                raise self.failure(f"failed a task: {outcome.result!r}")
            found.append(outcome.result)
        return found
