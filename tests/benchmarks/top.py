"""What `celery isolated top` costs a worker: ``make bench-top``.

A worker runs some bodies that wait. Its main process and its forkserver are watched for a while
without anybody who looks, and for as long with the view in a terminal; the difference is what it
costs. The last line is what each call costs so that there is something to see.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from harness.app import Settings, close_app, make_app
from harness.frames import SAMPLES
from harness.processes import Mailbox, Word
from harness.services import delete_redis_keys, redis_service
from harness.worker import Worker, start_worker
from harness.workplace import SUPPORT
from isolated_tasks.process import board
from isolated_tasks.process.protocol import Spawn

APPS = Path(__file__).parents[1] / "celery" / "apps"


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process, all of its threads, to the nanosecond (proc(5), schedstat)."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


@contextlib.contextmanager
def looking(environment: dict[str, str], interval: float) -> Iterator[None]:
    """Somebody has the view open."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "celery", "-A", "seen", "isolated", "top"]
    process = subprocess.Popen(
        [*command, "--interval", str(interval), "--timeout", "0.5"],
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    shown = threading.Event()

    def read() -> None:
        # The terminal fails when the program has gone (EIO).
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                if b"q quits" in data:
                    shown.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        if not shown.wait(30):
            raise TimeoutError("the view shows nothing")
        yield
    finally:
        os.write(ours, b"q")
        os.close(theirs)
        process.wait(30)


def measure(processes: dict[str, int], seconds: float) -> dict[str, float]:
    """Of each process, how much of a core it has taken, in percent."""
    before = {name: cpu_seconds(pid) for name, pid in processes.items()}
    time.sleep(seconds)
    return {
        name: 100 * (cpu_seconds(pid) - before[name]) / seconds for name, pid in processes.items()
    }


def watch(worker: Worker, environment: dict[str, str], seconds: float, children: int) -> None:
    """Print what looking at a worker costs it, at some intervals."""
    forkserver = int(worker.wait_for_log(r"forkserver pid=(\d+) loaded")[1])
    processes = {"main process": worker.pid, "forkserver": forkserver}
    for interval in (1.0, 2.0):
        with looking(environment, interval):
            busy = measure(processes, seconds)
        # Beside it: what else the machine does is no constant.
        idle = measure(processes, seconds)
        costs = {name: busy[name] - idle[name] for name in processes}
        line = "  ".join(f"{name} {cost:6.3f} %" for name, cost in costs.items())
        print(f"{children:3} children, every {interval:g} s: {line}", flush=True)


def run(url: str, children: int, seconds: float) -> None:
    """Measure a worker with so many bodies that wait."""
    settings = Settings(url, url, f"bench-top-{os.getpid()}")
    app = make_app("client", settings)
    with TemporaryDirectory() as name:
        folder = Path(name)
        mailbox = Mailbox(folder)
        environment = {
            **os.environ,
            **settings.environ(),
            "PYTHONPATH": os.pathsep.join([str(APPS), str(SUPPORT)]),
            "COLUMNS": "200",
            "TERM": "xterm",
        }
        worker = start_worker(
            "seen",
            pool="prefork",
            concurrency=children,
            app=app,
            env=settings.environ(),
            path=[APPS, SUPPORT],
            cwd=folder,
        )
        try:
            worker.wait_until_ready()
            words = [Word(folder) for _ in range(children)]
            for word in words:
                worker.call("seen.hold_and_wait", 1 << 20, mailbox.path, word.path)
                mailbox.read()
            watch(worker, environment, seconds, children)
            for word in words:
                word.give()
        finally:
            worker.close()
            mailbox.close()
            close_app(app)
            delete_redis_keys(url, settings.name)


def cost_of_a_call(spawn: Spawn, calls: int = 100_000) -> float:
    """What a child does for the board in one call, in seconds."""
    entry = board.Board().enter(spawn)
    board.adopt(entry.place)
    began = time.perf_counter()
    for _ in range(calls):
        board.begin(1)
        board.name_call("ad0f1d2e-4d5e-4f0c-9f67-6d1f5ea1b4a0")
        board.end()
    return (time.perf_counter() - began) / calls


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each line (default 30)")
    parser.add_argument("--children", type=int, nargs="+", default=[1, 20], help="(default 1 20)")
    chosen = parser.parse_args()
    print(f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB")
    with redis_service() as url:
        for children in chosen.children:
            run(url, children, chosen.seconds)
    (spawn,) = (one for one in SAMPLES if isinstance(one, Spawn))
    print(f"a call, for the board: {1e6 * cost_of_a_call(spawn):.2f} µs")


if __name__ == "__main__":
    main()
