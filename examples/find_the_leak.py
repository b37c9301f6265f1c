#!/usr/bin/env python3
"""Four tasks on one plain worker: which of them should be isolated?

    python examples/find_the_leak.py

starts a real `celery worker --memory-audit`, calls four plain tasks in turns, and lets `celery
isolated audit` say what it thinks of each:

* `clean` needs next to nothing;
* `peaks_and_frees` needs 80 MB for a moment, and the kernel gets them back;
* `leaks` keeps 1 MB of each call;
* `fragments` frees all but a thousandth of its 40 MB, and the kernel gets next to nothing back,
  because what it keeps, for as long as until its next call, lies all over them.

No broker is needed: messages and events go through files in a temporary folder. The exit code is
that of `celery isolated audit`, or 1 if the worker could not be started.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from celery import Celery

from support import files

VARIABLE = "FIND_THE_LEAK_FOLDER"
MEGABYTE = 1_000_000

#: The worker has so long to run all calls, in seconds.
PATIENCE = 120


app = Celery("find_the_leak", broker=files.URL)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_ignore_result=True,
    worker_enable_remote_control=False,
    # What is fetched ahead is put back at the end, file by file.
    worker_prefetch_multiplier=1,
)


if VARIABLE in os.environ:
    app.conf.broker_transport_options = files.options(os.environ[VARIABLE])


# ── the tasks ───────────────────────────────────────────────────────────────────────────────────

leaked: list[bytes] = []
cache: list[bytes] = []


@app.task(name="clean")
def clean() -> int:
    return sum(range(10_000))


@app.task(name="peaks_and_frees")
def peaks_and_frees() -> int:
    return len(b"x" * (80 * MEGABYTE))


@app.task(name="leaks")
def leaks() -> None:
    leaked.append(b"x" * MEGABYTE)


@app.task(name="fragments")
def fragments() -> None:
    pieces = [bytes(400) for _ in range(100_000)]
    cache[:] = pieces[::1000]


TASKS = (clean, peaks_and_frees, leaks, fragments)


# ── the program ─────────────────────────────────────────────────────────────────────────────────


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", choices=["prefork", "solo"], default="prefork")
    parser.add_argument("--calls", type=int, default=15, help="of each task; 9 are needed")
    parser.add_argument("--json", action="store_true", help="as `celery isolated audit --json`")
    options = parser.parse_args()
    if options.calls < 1:
        parser.error(f"argument --calls: {options.calls} is not above 0")
    with tempfile.TemporaryDirectory(prefix="find-the-leak-") as folder:
        return find(Path(folder), options)


def find(folder: Path, options: argparse.Namespace) -> int:
    files.create(folder)
    app.conf.broker_transport_options = files.options(str(folder))
    # A queue's file that is there already is never read half written.
    with app.connection_for_write() as link:
        app.amqp.queues[app.conf.task_default_queue](link.default_channel).declare()
    environment = {
        **os.environ,
        VARIABLE: str(folder),
        "PYTHONPATH": str(Path(__file__).resolve().parent),
        "TMPDIR": str(folder),
    }
    audit = ["isolated", "audit", "--calls", str(options.calls), "--seconds", str(PATIENCE)]
    audit += [part for task in TASKS for part in ("--task", task.name)]
    audit += ["--json"] if options.json else []
    auditor = subprocess.Popen(
        celery(*audit), env=environment, stderr=subprocess.PIPE, text=True, cwd=folder
    )
    assert auditor.stderr is not None
    with auditor, auditor.stderr:
        # Events that are sent before somebody listens are lost.
        for line in auditor.stderr:
            if line.startswith("listening"):
                break
            print(line, end="", file=sys.stderr)
        log = folder / "worker.log"
        with running(celery("worker", *worker_options(options)), environment, log) as worker:
            for _ in range(options.calls):
                for task in TASKS:
                    task.delay()
            code = wait(auditor, worker)
            print(auditor.stderr.read(), end="", file=sys.stderr)
    if code:
        print(log.read_text(errors="replace"), file=sys.stderr)
    return code


def celery(*arguments: str) -> list[str]:
    print("$ celery -A find_the_leak", *arguments, file=sys.stderr, flush=True)
    return [sys.executable, "-m", "celery", "-A", "find_the_leak", *arguments]


def worker_options(options: argparse.Namespace) -> list[str]:
    return ["--memory-audit", "--pool", options.pool, "--concurrency", "1", "--without-gossip"]


@contextmanager
def running(
    command: list[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        worker = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent
        )
    try:
        yield worker
    finally:
        worker.terminate()
        worker.wait()


def wait(auditor: subprocess.Popen[str], worker: subprocess.Popen[bytes]) -> int:
    """Wait for the advice; without a worker there will be none."""
    while True:
        try:
            return auditor.wait(0.5)
        except subprocess.TimeoutExpired:
            if worker.poll() is not None:
                auditor.terminate()
                auditor.wait()
                return 1


if __name__ == "__main__":
    sys.exit(main())
