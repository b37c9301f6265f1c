"""The comparison: one run after the other, then the table, the plot and the figures."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
from rich.console import Console

from rss_comparison import plot
from rss_comparison.display import Display, LineDisplay, LiveDisplay, table
from rss_comparison.figures import Run
from rss_comparison.measure import measure
from rss_comparison.options import Options
from rss_comparison.workload import write_orders
from support.connection import Client, Connection
from support.errors import ExampleError, UsageError
from support.lab import setup
from support.memory import MEGABYTE
from support.program import writable

NAME = "compare-rss"

PLOTS = ("compare_rss.png", "compare_rss.svg")
FIGURES = "compare_rss.json"

#: What a worker needs beside its tasks' data, generously.
WORKER_BYTES = 300 * MEGABYTE


def run(options: Options) -> None:
    """Compare, and write the results.

    Raises:
        UsageError: Before any worker was started: this machine cannot do what was asked for.
        ExampleError: A worker, a task or the writing of a file failed.
    """
    console = Console()
    _check_memory(options)
    with writable(options.output):
        runs = [Run(variant, options.tasks) for variant in options.variants]
        _run_all(runs, options, console)
        console.print(table(runs, width=console.width, final=True))
        for line in _moral(runs):
            console.print(line, highlight=False)
        _write_results(runs, options)
    if not options.quiet:
        console.print(f"The plot is in {options.output / PLOTS[0]}", soft_wrap=True)


def _check_memory(options: Options) -> None:
    """Better to say it now than to have the kernel kill something."""
    needed = WORKER_BYTES + options.concurrency * options.megabytes * MEGABYTE
    free = psutil.virtual_memory().available
    if needed > free:
        raise UsageError(
            f"--megabytes {options.megabytes} with --concurrency {options.concurrency} needs about "
            f"{needed // MEGABYTE} MB of memory, and {free // MEGABYTE} MB are free"
        )


def _run_all(runs: list[Run], options: Options, console: Console) -> None:
    with (
        tempfile.TemporaryDirectory(prefix=f"{NAME}-") as name,
        ExitStack() as stack,
    ):
        folder = Path(name)
        connection = Connection.create(NAME, folder, broker=options.broker, backend=options.backend)
        client = Client(connection)
        client.open()
        stack.callback(client.close)
        display = stack.enter_context(_display(runs, options, console))
        data = _write_data(folder / "orders.tsv", options, display)
        for run in runs:
            own = folder / run.variant.name
            own.mkdir()
            measure(run, options, connection=connection, client=client, data=data, folder=own,
                    changed=display.changed)  # fmt: skip


def _display(runs: list[Run], options: Options, console: Console) -> Display:
    if options.quiet:
        return Display(console, runs)
    if options.live and console.is_terminal:
        return LiveDisplay(console, runs)
    return LineDisplay(console, runs)


def _write_data(path: Path, options: Options, display: Display) -> Path:
    try:
        orders = write_orders(path, megabytes=options.megabytes)
    except OSError as error:
        raise ExampleError(f"cannot write the data file: {error}") from error
    display.say(
        f"Each task loads {orders:,} orders, {options.megabytes} MB in memory, "
        "adds them up and drops them."
    )
    return path


def _moral(runs: list[Run]) -> Iterator[str]:
    """How little it is that holds so much, for each worker that still has it."""
    for run in runs:
        if run.left_objects:
            left, retained = run.left_bytes / MEGABYTE, (run.retained_bytes or 0) / MEGABYTE
            yield (
                f"{run.variant.label}: {run.left_objects:,} small objects that its tasks left "
                f"behind weigh {left:.1f} MB and pin the {retained:.0f} MB among which they lie."
            )


def _write_results(runs: list[Run], options: Options) -> None:
    title = f"What a Celery worker keeps of {options.tasks} tasks of {options.megabytes} MB each"
    figures = {
        "title": title,
        "setup": _setup(options),
        "units": "bytes and seconds; a sample is [time since the tasks were sent, RSS, processes]",
        "runs": [run.as_json() for run in runs],
    }
    try:
        (options.output / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
        paths = [options.output / plot_name for plot_name in PLOTS]
        plot.draw(runs, title=title, note=" · ".join(_setup(options).values()), paths=paths)
    except OSError as error:
        raise ExampleError(f"cannot write the results: {error}") from error


def _setup(options: Options) -> dict[str, str]:
    pool = f"{options.pool}, concurrency {options.concurrency}"
    return setup(options.broker, pool=pool)
