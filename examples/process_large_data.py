#!/usr/bin/env python3
"""Load, compute, store, delete, and still the worker does not shrink.

    python examples/process_large_data.py

A file of orders is made, Parquet or CSV. Then two real Celery workers, one after the other, run
the same task on it several times, one call after the other: `process` below, which loads the file
with pandas, adds up, stores the result, and deletes what it has loaded. It leaves nothing behind,
and calls `gc.collect()`. After each call it is measured what the idle worker holds beyond what it
held after a first one on a thousand orders, so that what any first call loads does not count.

The plain worker keeps much of what its calls have needed. Nobody refers to it any more: it is free
memory, which Arrow's memory pool and glibc's `malloc` keep for the next time. The last line tells
how much of it either of them gives back when it is asked to. The isolated worker is back where it
was, since the kernel takes all that a process had when it exits.

The sizes are PSS: a page that n processes share counts as an nth of a page in each of them, so
that the sum over a worker's processes is what it takes of the machine. No broker is needed:
messages go through files in a temporary folder.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet  # else pandas imports it in the first call, which would count

from isolated_tasks import IsolatedTask
from support.connection import Client, make_app
from support.lab import Lab, as_megabytes, check_memory
from support.memory import MEGABYTE
from support.program import at_least, check_backend, parser, run, writable
from support.worker import Worker

NAME = "process_large_data"

FORMATS = ("parquet", "csv")
#: Orders of the first call.
FEW = 1000

REGIONS = 17
ORDERS_PER_CUSTOMER = 50

#: A call needs more than its data weigh once loaded: the file's pages, keys, copies.
NEEDED_PER_BYTE = 5

#: The peak of a call is the highest of what is measured this often, in seconds.
SAMPLE_INTERVAL = 0.05


# ── the tasks, as the workers import them: `celery -A process_large_data:plain worker` ───────────


def process(source: str, target: str) -> dict[str, Any]:
    """The body, the same for both workers."""
    orders = load(source)
    orders["amount"] = orders["quantity"] * orders["price"]
    turnover = orders.groupby(["customer", "region"], as_index=False)["amount"].sum()
    store(turnover, target)
    result = {"orders": len(orders), "rows": len(turnover), "pid": os.getpid()}
    # What the documentation of every leak advises; and there is really nothing left.
    del orders, turnover
    gc.collect()
    return result


def load(path: str) -> pd.DataFrame:
    return pd.read_parquet(path) if path.endswith("parquet") else pd.read_csv(path)


def store(frame: pd.DataFrame, path: str) -> None:
    if path.endswith("parquet"):
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, index=False)


def release_arrow() -> None:
    """Have Arrow's memory pool give back what it holds and nobody uses."""
    pa.default_memory_pool().release_unused()


def trim_malloc() -> None:
    """Have glibc's `malloc` give back what it holds and nobody uses."""
    ctypes.CDLL(None).malloc_trim(0)


def ping() -> None:
    """Tells that the worker is up."""


# An app for each worker, where a project has one. Celery would share the tasks among them if it
# was not told otherwise.
plain = make_app()
plain.task(name="process", shared=False)(process)

isolated = make_app()
isolated.task(name="process", shared=False, base=IsolatedTask)(process)

for app in (plain, isolated):
    app.task(name="ping", shared=False)(ping)
    app.task(name="release_arrow", shared=False)(release_arrow)
    app.task(name="trim_malloc", shared=False)(trim_malloc)


# ── what is measured ────────────────────────────────────────────────────────────────────────────


@dataclass
class Run:
    """One worker.

    Attributes:
        before_bytes: PSS of all its processes after a call on very few orders.
        after_bytes: The same after each call, with the worker idle.
        peak_bytes: The same at its highest.
        arrow_bytes: What Arrow's memory pool gave back when it was asked for it at the end.
        malloc_bytes: What `malloc` gave back then.
    """

    app: str
    label: str
    before_bytes: int = 0
    after_bytes: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    arrow_bytes: int = 0
    malloc_bytes: int = 0
    samples: list[tuple[float, int]] = field(default_factory=list)

    @property
    def retained_bytes(self) -> list[int]:
        """What the idle worker holds after each call, beyond what it held before them."""
        return [size - self.before_bytes for size in self.after_bytes]


def measure(run: Run, lab: Lab, sources: Sequence[Path]) -> None:
    """Have a worker process one file after the other; the first one is not counted."""
    with lab.worker(run.app, run.label, slots=1) as worker:
        watch = Watch(run, worker, lab.client)
        there = {process.pid for process in worker.processes()}
        for number, source in enumerate(sources):
            target = lab.folder / f"{run.app}-{number}{source.suffix}"
            result = watch.call("process", str(source), str(target))
            # The outcome of an isolated call is there just before its process is gone.
            for _ in worker.waiting("end of the process"):
                if result["pid"] in there or not worker.holds(result["pid"]):
                    break
            if number == 0:
                run.before_bytes = watch.sample()
                continue
            run.after_bytes.append(watch.sample())
            lab.say(f"  call {number}: {as_megabytes(run.retained_bytes[-1], signed=True)} MB")
        run.peak_bytes = max(size for _, size in run.samples)
        if run.app == "plain":
            run.arrow_bytes = watch.released_by("release_arrow")
            run.malloc_bytes = watch.released_by("trim_malloc")


class Watch:
    """Samples a worker while it waits for its calls."""

    def __init__(self, run: Run, worker: Worker, client: Client) -> None:
        self._run = run
        self._worker = worker
        self._client = client
        self._began = time.monotonic()

    def sample(self) -> int:
        size = sum(self._worker.pss().values())
        self._run.samples.append((round(time.monotonic() - self._began, 3), size))
        return size

    def call(self, task: str, *args: str) -> Any:
        call = self._client.send(task, *args)
        for _ in self._worker.waiting("outcome"):
            self.sample()
            if self._client.outcome(call) is not None:
                break
        return self._worker.results(self._client, [call])[0]

    def released_by(self, task: str) -> int:
        before = sum(self._worker.pss().values())
        self._worker.results(self._client, [self._client.send(task)])
        return before - sum(self._worker.pss().values())


def make_file(path: Path, count: int) -> Path:
    store(make_orders(count), str(path))
    return path


def orders_for(megabytes: int) -> int:
    """How many of them weigh so much as a DataFrame."""
    weight = make_orders(FEW).memory_usage(deep=True).sum() / FEW
    return max(FEW, int(megabytes * MEGABYTE / weight))


def make_orders(count: int) -> pd.DataFrame:
    # Seeded, so that every run has the same data.
    random = np.random.default_rng(1)
    customers = random.integers(0, max(1, count // ORDERS_PER_CUSTOMER), count)
    return pd.DataFrame(
        {
            "order": np.arange(count),
            "customer": [f"customer-{number:07}" for number in customers],
            "region": [f"region-{number:02}" for number in random.integers(0, REGIONS, count)],
            "quantity": random.integers(1, 10, count),
            "price": random.integers(1, 100_000, count) / 100,
            "remark": [f"parcel {number}: ring twice, and wait" for number in range(count)],
        }
    )


# ── the command ─────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    options = parse()
    runs = [Run("plain", "plain task"), Run("isolated", "IsolatedTask")]
    with writable(options.output):
        check_memory(options.megabytes * MEGABYTE * NEEDED_PER_BYTE + 300 * MEGABYTE)
        with Lab(NAME, broker=options.broker, backend=options.backend, quiet=options.quiet) as lab:
            count = orders_for(options.megabytes)
            small = make_file(lab.folder / f"few.{options.format}", FEW)
            large = make_file(lab.folder / f"orders.{options.format}", count)
            lab.say(f"{large.name} has {count:,} orders, {options.megabytes} MB once loaded.")
            for each in runs:
                lab.say(f"{each.label}, held after each call beyond what was held before:")
                measure(each, lab, [small] + [large] * options.calls)
            setup = lab.setup()
        setup["pandas"] = f"pandas {pd.__version__}, pyarrow {pa.__version__}"
        show(runs, options)
        write(runs, options, setup)


def parse() -> argparse.Namespace:
    made = parser(NAME, "Load, compute, store, delete: what a worker holds after each call.")
    add, count = made.add_argument, at_least(1)
    add("--megabytes", type=count, default=200, metavar="MB", help="of the data, once loaded")
    add("--calls", type=count, default=6, metavar="N", help="for each worker")
    add("--format", choices=FORMATS, default=FORMATS[0], help="of the file")
    given = made.parse_args()
    check_backend(given)
    return given


def show(runs: list[Run], options: argparse.Namespace) -> None:
    # Here, since the workers import this file too, and have no use for it.
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        title=f"{options.megabytes} MB of {options.format}: load, compute, store, delete",
        caption="MB, PSS of all processes of the worker",
    )
    table.add_column("")
    for each in runs:
        table.add_column(each.label, justify="right", no_wrap=True)
    table.add_row("before", *(as_megabytes(each.before_bytes) for each in runs))
    table.add_row("highest", *(as_megabytes(each.peak_bytes) for each in runs))
    for number in range(options.calls):
        sizes = (as_megabytes(each.retained_bytes[number], signed=True) for each in runs)
        table.add_row(f"retained after call {number + 1}", *(f"[bold]{size}[/]" for size in sizes))
    console = Console()
    console.print(table)
    kept, arrow, malloc = (
        as_megabytes(size)
        for size in (runs[0].retained_bytes[-1], runs[0].arrow_bytes, runs[0].malloc_bytes)
    )
    console.print(
        f"The plain worker still had {kept} MB. Told to release what nobody uses, Arrow's memory "
        f"pool gave back {arrow} MB, and then malloc {malloc} MB.",
        highlight=False,
    )


def write(runs: list[Run], options: argparse.Namespace, setup: dict[str, str]) -> None:
    figures = {
        "megabytes": options.megabytes,
        "format": options.format,
        "calls": options.calls,
        "setup": setup,
        "units": "bytes and seconds; a sample is [time since the worker was ready, PSS]",
        "runs": [{**asdict(each), "retained_bytes": each.retained_bytes} for each in runs],
    }
    (options.output / f"{NAME}.json").write_text(json.dumps(figures, indent=1) + "\n")
    paths = [options.output / f"{NAME}.{suffix}" for suffix in ("png", "svg")]
    draw(runs, options, note=" · ".join(setup.values()), paths=paths)
    if not options.quiet:
        print(f"The plot is in {paths[0]}")


def draw(runs: list[Run], options: argparse.Namespace, *, note: str, paths: list[Path]) -> None:
    from support import plot

    title = f"{options.calls} calls, each loads {options.megabytes} MB and deletes them"
    figure = plot.new(title, width=9, height=5)
    panels = figure.subplots(2, sharex=True, sharey=True)
    for panel, each, colour in zip(panels, runs, (plot.ORANGE, plot.BLUE), strict=True):
        seconds = [at for at, _ in each.samples]
        held = [size / MEGABYTE for _, size in each.samples]
        baseline = each.before_bytes / MEGABYTE
        panel.axhline(baseline, color=plot.FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        panel.fill_between(seconds, baseline, held, color=colour, alpha=0.18, linewidth=0)
        panel.plot(seconds, held, color=colour, linewidth=1.4)
        panel.set_title(each.label, loc="left", fontsize=11, fontweight="bold", color=colour)
        panel.set_title(
            f"retained {as_megabytes(each.retained_bytes[-1], signed=True)} MB",
            loc="right", fontsize=11, color=plot.INK,
        )  # fmt: skip
        panel.margins(x=0.01)
        plot.tidy(panel, grid="y")
    panels[0].set_ylim(0, 1.08 * max(each.peak_bytes for each in runs) / MEGABYTE)
    panels[-1].set_xlabel(f"seconds\n{note}", fontsize=10, color=plot.INK, linespacing=1.6)
    figure.supylabel("PSS of the worker's processes, MB", fontsize=10.5, color=plot.INK)
    plot.save(figure, paths)


if __name__ == "__main__":
    sys.exit(run(NAME, main))
