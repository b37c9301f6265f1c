#!/usr/bin/env python3
"""Where memory goes when a task has freed it, and what gives it back: all of it measured.

    python examples/where_memory_goes.py

Two tables. The first has ways to use memory, each in a fresh process: what is resident at the
peak, after the last reference has gone, after `gc.collect()` and then `malloc_trim(0)`; then the
same with settings of the allocator, which have to stand before a process begins; and in a child
that exits. The second has real Celery workers: plain, with `--max-tasks-per-child`, with
`--max-memory-per-child`, and with an isolated task.

`--json` prints the figures instead; `--write FILE` puts the tables into a page, where they are
between `<!-- where_memory_goes: NAME -->` and `<!-- end -->`. No broker is needed: messages and
results go through files in a temporary folder.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import celery
from ways_to_use_memory import WAYS, Way, large, small_pinned

from support.connection import Client, Connection, make_app
from support.memory import Sample
from support.worker import Worker, command

MEGABYTE = 1_000_000
JEMALLOC = "libjemalloc.so.2"

#: Runs one way to use memory.
PROGRAM = Path(__file__).with_name("ways_to_use_memory.py")

#: Settings that have to stand before a process begins.
SETTINGS: dict[str, dict[str, str]] = {
    "MALLOC_ARENA_MAX=1": {"MALLOC_ARENA_MAX": "1"},
    "MALLOC_TRIM_THRESHOLD_=131072": {"MALLOC_TRIM_THRESHOLD_": "131072"},
    # At once what it does after some seconds by default.
    "jemalloc": {"LD_PRELOAD": JEMALLOC, "MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0"},
}


# ── many processes ──────────────────────────────────────────────────────────────────────────────


def in_a_process(
    arguments: Sequence[str], settings: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )


@functools.cache
def has_jemalloc() -> bool:
    # The loader says so on stderr where it cannot. dlopen(3) can never: too late for its TLS.
    return not in_a_process(["large", "0"], SETTINGS["jemalloc"]).stderr


def measure_way(way: Way, size: int) -> dict[str, Any]:
    arguments = [way.__name__, str(size)]
    found = json.loads(in_a_process(arguments, {}).stdout)
    for name, settings in SETTINGS.items():
        if name != "jemalloc" or has_jemalloc():
            found[name] = json.loads(in_a_process(arguments, settings).stdout)["gc.collect()"]
    return {"name": way.__name__, "label": way.__doc__, "bytes": found}


def measure_free_lists() -> int:
    """Bytes in all free lists of CPython's together."""
    stats = in_a_process(["--free-lists"], {}).stderr
    found = re.findall(r"(\d+) free .*? \* (\d+) bytes each", stats)
    return sum(int(count) * int(size) for count, size in found)


# ── workers ─────────────────────────────────────────────────────────────────────────────────────

PINS, PEAKS, PINS_ISOLATED, PING = (
    "where.pins",
    "where.peaks",
    "where.pins_isolated",
    "where.ping",
)

#: For the outcome of one call, and for a worker to come to rest, in seconds.
PATIENCE, REST = 60.0, 20.0
#: It rests when for so long no process came or went, and RSS kept still by so many bytes.
STILL_SECONDS, STILL_BYTES = 1.0, 2 * MEGABYTE


@dataclass(frozen=True)
class Case:
    """One worker, and the task that it gets."""

    name: str
    label: str
    task: str
    options: tuple[str, ...] = ()
    pool: str = "prefork"


@dataclass
class Figures:
    """What a worker came to."""

    calls: int
    baseline_bytes: int = 0
    peak_bytes: int = 0
    kept_bytes: int = 0
    #: In which bodies ran.
    processes: int = 0
    pids: set[int] = field(default_factory=set)


def cases(size: int) -> list[Case]:
    # A pool process of a bare app has some 50 MB; half of the peak is well above what it has left.
    limit = f"--max-memory-per-child={(60 * MEGABYTE + size // 2) // 1024}"
    return [
        Case("plain", "plain task", PINS),
        Case("one", "`--max-tasks-per-child=1`", PINS, ("--max-tasks-per-child=1",)),
        Case("five", "`--max-tasks-per-child=5`", PINS, ("--max-tasks-per-child=5",)),
        Case("memory", "`--max-memory-per-child`, above it", PINS, (limit,)),
        Case("peak", "the same, with a task that gives all back", PEAKS, (limit,)),
        Case(
            "threads",
            "`--max-tasks-per-child=1`, `--pool threads`",
            PINS,
            ("--max-tasks-per-child=1",),
            pool="threads",
        ),
        Case("isolated", "`IsolatedTask`", PINS_ISOLATED),
        Case("isolated-threads", "`IsolatedTask`, `--pool threads`", PINS_ISOLATED, pool="threads"),
    ]


if Connection.from_environment() is not None:
    # In a worker: `celery -A where_memory_goes worker`.
    from isolated_tasks import IsolatedTask

    app = make_app()

    @app.task(name=PING)
    def ping() -> None: ...

    @app.task(name=PINS)
    def pins(size: str) -> int:
        small_pinned(int(size), lambda: None)
        return os.getpid()

    @app.task(name=PEAKS)
    def peaks(size: str) -> int:
        large(int(size), lambda: None)
        return os.getpid()

    app.task(name=PINS_ISOLATED, base=IsolatedTask, batch_idle_timeout=0.5)(pins.run)


def measure_worker(case: Case, *, size: int, calls: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="where-memory-goes-") as folder:
        link = Connection.create("where-memory-goes", Path(folder), broker=None, backend=None)
        client = Client(link)
        client.open()
        options = ["--pool", case.pool, "--concurrency", "1", *case.options]
        line = command(
            "where_memory_goes", "--hostname", f"{case.name}@where-memory-goes", *options
        )
        with Worker(
            case.label, line=line, environment=link.environment(), folder=Path(folder)
        ) as worker:
            figures = _use(worker, client, case, size=size, calls=calls)
    return {**asdict(case), **{k: v for k, v in asdict(figures).items() if k != "pids"}}


def _use(worker: Worker, client: Client, case: Case, *, size: int, calls: int) -> Figures:
    figures = Figures(calls)

    def look() -> Sample:
        worker.check()
        sample = worker.sample()
        figures.peak_bytes = max(figures.peak_bytes, sample.rss_bytes - figures.baseline_bytes)
        return sample

    def call(name: str, *arguments: str) -> Any:
        task_id = client.send(name, *arguments)
        deadline = time.monotonic() + PATIENCE
        while (outcome := client.outcome(task_id)) is None:
            look()
            if time.monotonic() > deadline:
                raise worker.failure(f"gave no outcome for {PATIENCE:.0f} s")
            time.sleep(0.02)
        if not outcome.succeeded:
            raise worker.failure(f"failed a task: {outcome.result!r}")
        return outcome.result

    def rest(processes: int | None) -> Sample:
        samples = [look()]
        while samples[-1].at < samples[0].at + REST:
            time.sleep(0.1)
            samples.append(look())
            recent = [one for one in samples if one.at > samples[-1].at - STILL_SECONDS]
            sizes = [one.rss_bytes for one in recent]
            if (
                samples[-1].at > samples[0].at + STILL_SECONDS
                and {one.processes for one in recent} == {processes or recent[0].processes}
                and max(sizes) - min(sizes) < STILL_BYTES
            ):
                break
        return samples[-1]

    call(PING)
    baseline = rest(None)
    figures.baseline_bytes, figures.peak_bytes = baseline.rss_bytes, 0
    for _ in range(calls):
        figures.pids.add(call(case.task, str(size)))
    figures.processes = len(figures.pids)
    figures.kept_bytes = rest(baseline.processes).rss_bytes - figures.baseline_bytes
    return figures


# ── the tables ──────────────────────────────────────────────────────────────────────────────────


def megabytes(size: int | None) -> str:
    return "–" if size is None else f"{max(0, round(size / MEGABYTE))}"


def table_of_ways(found: dict[str, Any]) -> str:
    columns = ["peak", "del", "gc.collect()", "malloc_trim(0)", *SETTINGS, "a child that exits"]
    heads = [column if column in ("peak", "jemalloc") else f"`{column}`" for column in columns]
    heads[-1] = columns[-1]
    rows = [
        [one["label"], *(megabytes(one["bytes"].get(column)) for column in columns)]
        for one in found["ways"]
    ]
    return _table([f"{found['megabytes']} MB as", *heads], rows)


def table_of_workers(found: dict[str, Any]) -> str:
    rows = [
        [
            one["label"],
            megabytes(one["peak_bytes"]),
            megabytes(one["kept_bytes"]),
            f"{one['processes']} for {one['calls']} calls",
        ]
        for one in found["workers"]
    ]
    return _table(["worker", "peak", "kept", "processes"], rows)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(found: dict[str, Any]) -> str:
    return (
        f"Python {found['python']}, {found['libc']}, Celery {found['celery']}. "
        "After 100,000 floats, pairs, lists and dicts each, CPython's free lists held "
        f"{found['free_lists_bytes'] // 1000} kB."
    )


def write(page: Path, found: dict[str, Any]) -> None:
    """Put the tables where the page has them."""
    text = page.read_text()
    tables = {
        "ways": table_of_ways(found),
        "workers": table_of_workers(found),
        "run": describe(found),
    }
    for name, table in tables.items():
        begin, end = f"<!-- where_memory_goes: {name} -->", "<!-- end -->"
        text, count = re.subn(
            f"{re.escape(begin)}.*?{end}",
            lambda _: f"{begin}\n\n{table}\n\n{end}",  # noqa: B023  # called at once
            text,
            flags=re.DOTALL,
        )
        if not count:
            raise SystemExit(f"{page} has no place for the table {name!r}")
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=100, help="what each way uses at its peak")
    parser.add_argument("--calls", type=int, default=6, help="of each worker's task")
    parser.add_argument("--jobs", type=int, default=1, help="that are measured at the same time")
    parser.add_argument("--json", action="store_true", help="print the figures, in bytes")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into a page")
    options = parser.parse_args()
    size = options.megabytes * MEGABYTE
    if not has_jemalloc():
        note = f"jemalloc is left out: there is no {JEMALLOC} (Debian and Ubuntu: libjemalloc2)"
        print(note, file=sys.stderr)
    with ThreadPoolExecutor(options.jobs) as jobs:
        ways = [jobs.submit(measure_way, way, size) for way in WAYS]
        workers = [
            jobs.submit(measure_worker, case, size=size, calls=options.calls)
            for case in cases(size)
        ]
        found = {
            "megabytes": options.megabytes,
            "python": platform.python_version(),
            "libc": " ".join(platform.libc_ver()),
            "celery": celery.__version__,
            "ways": [one.result() for one in ways],
            "free_lists_bytes": measure_free_lists(),
            "workers": [one.result() for one in workers],
        }
    if options.write:
        write(options.write, found)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(table_of_ways(found), table_of_workers(found), describe(found), sep="\n\n")


if __name__ == "__main__":
    main()
