"""One `celery worker`: started, watched, sampled, and stopped with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil

from rss_comparison.errors import WorkerFailed
from rss_comparison.figures import Sample
from rss_comparison.interruption import Interrupted
from rss_comparison.options import Options, Variant

EXAMPLES = Path(__file__).resolve().parent.parent

#: Celery's warm shutdown lets running tasks finish; after this it has had its chance.
STOP_GRACE = 15.0
#: Somebody pressed Ctrl-C and waits.
INTERRUPTED_GRACE = 4.0
#: For the processes below a worker that has ended.
ORPHAN_GRACE = 3.0


def command(variant: Variant, options: Options) -> list[str]:
    """The worker's command line: what anybody would type, less the chatter among workers."""
    line = [sys.executable, "-m", "celery", "-q", "-A", "rss_comparison.app", "worker"]
    line += ["--hostname", f"{variant.name}@compare-rss", "--loglevel", "WARNING"]
    line += ["--pool", options.pool, "--concurrency", str(options.concurrency)]
    line += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    if variant.max_tasks_per_child is not None:
        line += ["--max-tasks-per-child", str(variant.max_tasks_per_child)]
    return line


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

    def sample(self) -> Sample:
        """The RSS of the whole tree, now."""
        sizes = [size for size in map(_rss, [self._main, *self._below()]) if size]
        return Sample(time.monotonic(), sum(sizes), len(sizes))

    def holds(self, pid: int) -> bool:
        """Whether a process is one of the tree, now."""
        return pid in (process.pid for process in [self._main, *self._below()])


def _rss(process: psutil.Process) -> int:
    """0 for a process that has exited, whether or not its parent knows yet."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
