"""What the audit costs a plain task: ``make bench-audit`` prints what docs/how-to say.

Two workers, with and without it, run the same light task in turns, and each chunk of one is
compared with the chunk of the other beside it; of a chunk, the median task counts. No figure here
decides a test: the machine may be shared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from bench.workers import Variant, per_task, started
from celery import Celery

from harness.services import redis_service
from isolated_tasks import audit


def show(what: str, values: Sequence[float], unit: str) -> None:
    """One line of the table."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    print(
        f"{what:48} {statistics.median(ordered):8.3f} {unit:8}"
        f" [{ordered[quarter]:.3f} … {ordered[-1 - quarter]:.3f}]"
    )


def compare(chunks: int, tasks: int, pool: str) -> None:
    """Measure two workers in turns."""
    plain = Variant(f"plain, {pool}", "bench.app.plain", pool)
    audited = dataclasses.replace(plain, name=f"audited, {pool}", arguments=("--memory-audit",))
    found: dict[str, list[float]] = {plain.name: [], audited.name: []}
    with tempfile.TemporaryDirectory() as folder, started([plain, audited], Path(folder)):
        for number in range(chunks):
            pair = (plain, audited) if number % 2 else (audited, plain)
            for variant in pair:
                found[variant.name].append(statistics.median(per_task(variant, tasks)))
    for name, values in found.items():
        show(name, values, "ms/task")
    pairs = list(zip(*found.values(), strict=True))
    show("  audited - plain", [with_it - without for without, with_it in pairs], "ms/task")
    show("  audited / plain", [with_it / without for without, with_it in pairs], "")


def parts(url: str, calls: int) -> None:
    """Measure what is done around one call, in this process."""
    with Celery("parts", broker=url, set_as_current=False) as app:
        task = SimpleNamespace(name="t", request=SimpleNamespace(is_eager=False))
        meter = audit.Meter(app, "parts@bench")

        def begin() -> None:
            meter.begin(task_id="1", task=task)

        def end() -> None:
            meter.end(task_id="1", task=task)

        usual: list[float] = []
        sampled: list[float] = []
        for number in range(1, calls + 1):
            spent = seconds(begin) + seconds(end)
            is_sampled = number in audit.SAMPLED or number % audit.SAMPLED_EVERY == 0
            (sampled if is_sampled else usual).append(1e3 * spent)
    show("around a call, its event included", usual, "ms")
    show("around a call that is sampled", sampled, "ms")


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@contextlib.contextmanager
def environment(url: str) -> Iterator[None]:
    """What the app of the benchmark is told its Redis by."""
    os.environ["BENCH_URL"] = url
    yield
    del os.environ["BENCH_URL"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=20, help="of each worker (default 20)")
    parser.add_argument("--tasks", type=int, default=200, help="in each chunk (default 200)")
    options = parser.parse_args()
    with redis_service() as url, environment(url):
        print(f"{os.cpu_count()} cores, {options.chunks} chunks of {options.tasks} tasks")
        print(f"{'':48} {'median':>8} {'':8} [quartiles]")
        for pool in ("prefork", "solo"):
            compare(options.chunks, options.tasks, pool)
        parts(url, 2000)


if __name__ == "__main__":
    main()
