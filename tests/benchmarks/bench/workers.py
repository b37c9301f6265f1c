"""Workers to measure: Celery's, in several ways, and RQ's."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import redis

from bench import bodies

#: Nothing that is measured takes so long, in seconds.
TIMEOUT = 120.0
#: Of each chunk so much does not count: meanwhile it is still being sent.
SENDING = 1 / 3


@dataclass(frozen=True)
class Variant:
    """One way to run a light task."""

    name: str
    #: Of the app; RQ has no such thing.
    task: str = ""
    pool: str = "prefork"
    concurrency: int = 1
    arguments: Sequence[str] = ()
    #: Its tasks take about a second each.
    is_slow: bool = False

    @property
    def queue(self) -> str:
        """Of this variant alone."""
        return "bench-" + "".join(char if char.isalnum() else "-" for char in self.name)

    def command(self) -> list[str]:
        """What starts the worker."""
        return [
            *(sys.executable, "-m", "celery", "--quiet", "-A", "bench.app", "worker"),
            *("--pool", self.pool, "--concurrency", str(self.concurrency)),
            *("--queues", self.queue, "--hostname", f"{self.queue}@bench"),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            *("--loglevel", "WARNING", *self.arguments),
        ]

    def run(self, count: int) -> list[float]:
        """Have so many tasks done; when each was, in seconds, in order."""
        app = importlib.import_module("bench.app").app
        task = app.tasks[self.task]
        results = [task.apply_async(queue=self.queue) for _ in range(count)]
        for result in results[-self.concurrency :]:
            result.get(timeout=TIMEOUT)
        done = []
        for result in results:
            result.get(timeout=TIMEOUT)
            done.append(result.date_done.timestamp())
            result.forget()
        return sorted(done)


@dataclass(frozen=True)
class RQVariant(Variant):
    """RQ's worker, which forks for each job."""

    def command(self) -> list[str]:
        """What starts the worker."""
        rq = Path(sys.executable).with_name("rq")
        return [str(rq), "worker", "--quiet", "--url", os.environ["BENCH_URL"], self.queue]

    def run(self, count: int) -> list[float]:
        """Have so many jobs done; when each was, in seconds, in order."""
        import rq

        # Newer clients of Redis lose patience after 5 s, also where they wait on purpose.
        client = redis.Redis.from_url(os.environ["BENCH_URL"], socket_timeout=2 * TIMEOUT)
        with contextlib.closing(client) as connection:
            queue = rq.Queue(self.queue, connection=connection)
            jobs = [queue.enqueue(bodies.nothing) for _ in range(count)]
            jobs[-1].latest_result(timeout=int(TIMEOUT))
            done = []
            for job in jobs:
                job.refresh()  # type: ignore[no-untyped-call]
                ended: datetime | None = job.ended_at
                assert ended is not None
                done.append(ended.timestamp())
            return sorted(done)


def per_task(variant: Variant, count: int) -> list[float]:
    """From one end of a task to the next, in ms, once all are sent."""
    done = variant.run(count)
    done = done[int(len(done) * SENDING) :]
    return [1e3 * (after - before) for before, after in itertools.pairwise(done)]


@contextlib.contextmanager
def started(variants: Sequence[Variant], folder: Path) -> Iterator[dict[str, int]]:
    """Start a worker for each, and wait until each has done a task; their pids by name."""
    with contextlib.ExitStack() as stack:
        pids = {}
        for number, variant in enumerate(variants):
            log = stack.enter_context((folder / f"worker-{number}.log").open("wb"))
            process = subprocess.Popen(
                variant.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(_stop, process)
            pids[variant.name] = process.pid
        for variant in variants:
            variant.run(2)
        yield pids


def _stop(process: subprocess.Popen[Any]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Spent:
    """What a part of a worker has spent so far."""

    cpu_seconds: float
    page_faults: int

    def since(self, before: Spent) -> Spent:
        """What was spent meanwhile."""
        return Spent(self.cpu_seconds - before.cpu_seconds, self.page_faults - before.page_faults)


def spent(pid: int) -> dict[str, Spent]:
    """Of a prefork worker with one slot: main process, slot, forkserver and all its children."""
    main = psutil.Process(pid)
    found = {"main process": _spent(main, of_children=False)}
    for process in main.children():
        if "isolated_tasks.process.forkserver" in process.cmdline():
            found["forkserver"] = _spent(process, of_children=False)
            found["children"] = _spent(process, of_children=True)
        elif "celery" in process.cmdline():
            found["slot"] = _spent(process, of_children=False)
    return found


def _spent(process: psutil.Process, *, of_children: bool) -> Spent:
    # proc(5), /proc/PID/stat: fields 10 and 11, counted from behind the name.
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    times = process.cpu_times()
    if of_children:
        return Spent(times.children_user + times.children_system, int(fields[8]))
    return Spent(times.user + times.system, int(fields[7]))


@contextlib.contextmanager
def kept_busy(variant: Variant, folder: Path) -> Iterator[None]:
    """All its slots are busy."""
    app = importlib.import_module("bench.app").app
    folder.mkdir()
    task = app.tasks[f"{variant.task}_wait"]
    results = [
        task.apply_async((str(folder),), queue=variant.queue) for _ in range(variant.concurrency)
    ]
    deadline = time.monotonic() + TIMEOUT
    while len(list(folder.glob("runs-*"))) < variant.concurrency:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{variant.name}: its slots do not get busy")
        time.sleep(0.02)
    yield
    (folder / "go").touch()
    for result in results:
        result.get(timeout=TIMEOUT)
