#!/usr/bin/env python3
"""One model for all slots, and another one that must not be forked.

    python examples/shared_model.py

**First**, a model of 500 MB and eight slots. Three workers, one after the other, run the same task
in all their slots at once, and it is measured what each worker takes of the machine at that
moment:

* *plain*: each pool process loads the model when it first needs it;
* *plain, `imports`*: the main process loads it, and the pool processes are forked from that;
* *isolated*: the forkserver loads it (`isolated_preload`), and a fresh process for each call is
  forked from that.

A forked process shares the memory of the process that it was forked from until one of them writes
to it, page by page, so a model that is only read is there once.

**Then**, a model that does not survive a fork, such as everything on a GPU (`models/device.py`,
which takes a GPU if PyTorch finds one, and a thread if not). Preloaded, it is of no use to
anybody. A fresh interpreter for each process (`start_method="spawn"`) loads it for itself, and in
a batch it is loaded once for many calls.

The sizes are PSS: a page that n processes share counts as an nth of a page in each of them, so
that the sum over a worker's processes is what it takes of the machine. No broker is needed:
messages go through files in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isolated_tasks import IsolatedTask
from isolated_tasks.signals import isolated_process_init
from support.connection import make_app
from support.lab import Lab, as_megabytes, check_memory
from support.memory import MEGABYTE
from support.program import at_least, check_backend, parser, run, writable
from support.worker import Worker

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "shared_model"

#: What a process weighs without any model, generously.
PROCESS_BYTES = 60 * MEGABYTE

#: Calls that one process of the second part serves.
BATCH_SIZE = 20


# ── the tasks, as the workers import them: `celery -A shared_model:isolated worker` ──────────────


def score(question: int, meeting: str) -> float:
    """The body of the first part, the same for its three workers."""
    # Finds it loaded, or loads it.
    from models import weights

    answer = weights.predict(question)
    wait_for_the_others(Path(meeting))
    return answer


def wait_for_the_others(meeting: Path) -> None:
    """Stay in the body until the command has measured: it looks for as many files as slots."""
    (meeting / f"{os.getpid()}.here").touch()
    while not (meeting / "measured").exists():
        time.sleep(0.02)


def ask(question: int) -> dict[str, Any]:
    """The body of the second part."""
    from models import device

    answer = device.MODEL.predict(question)
    return {
        "answer": answer,
        "kind": device.MODEL.kind,
        "pid": os.getpid(),
        "load": device.LOAD,
    }


def ping() -> None:
    """Tells that the worker is up."""


@isolated_process_init.connect
def load_the_model(**_: object) -> None:
    """Once in each process, before its first call, and not in the first call itself.

    A body that leaves a thread behind ends its batch; a thread that was there before may stay.
    """
    if "LOAD_THE_MODEL" in os.environ:
        from models import device

        device.MODEL.predict(0)


# An app for each worker, where a project has one, with one of these settings. Celery would share
# the tasks among them if it was not told otherwise.
plain = make_app()
plain.task(name="score", shared=False)(score)

imported = make_app()
imported.conf.imports = ["models.weights"]
imported.task(name="score", shared=False)(score)

isolated = make_app()
isolated.conf.isolated_preload = ["models.weights"]
isolated.task(name="score", shared=False, base=IsolatedTask)(score)

forked = make_app()
forked.conf.isolated_preload = ["models.device"]
forked.task(name="ask", shared=False, base=IsolatedTask)(ask)

spawned = make_app()
spawned.conf.isolated_start_method = "spawn"
spawned.conf.isolated_env = {"LOAD_THE_MODEL": "yes"}
spawned.task(name="ask", shared=False, base=IsolatedTask)(ask)
spawned.task(name="ask_in_batch", shared=False, base=IsolatedTask, batch_size=BATCH_SIZE)(ask)

for app in (plain, imported, isolated, forked, spawned):
    app.task(name="ping", shared=False)(ping)


# ── the first part: what the workers take while all slots use the model ─────────────────────────


@dataclass
class Sharing:
    """One worker of the first part.

    Attributes:
        before_bytes: PSS of all its processes before the first call.
        pss_bytes: With a body in each slot: of each process in which one runs, and of the others.
        rss_bytes: RSS at the same moment, which counts what is shared once for each process.
    """

    app: str
    label: str
    before_bytes: int = 0
    pss_bytes: dict[str, list[int]] = field(default_factory=dict)
    rss_bytes: int = 0
    answers: list[float] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        return sum(sum(sizes) for sizes in self.pss_bytes.values())


def share(lab: Lab, options: argparse.Namespace) -> list[Sharing]:
    found = [
        Sharing("plain", "plain, each pool process loads it"),
        Sharing("imported", "plain, loaded before the pool forks"),
        Sharing("isolated", "IsolatedTask, isolated_preload"),
    ]
    environment = {"SHARED_MODEL_MEGABYTES": str(options.megabytes)}
    lab.say(f"A model of {options.megabytes} MB, used in {options.slots} slots at once:")
    for each in found:
        with lab.worker(
            each.app, each.label, slots=options.slots, environment=environment
        ) as worker:
            each.before_bytes = sum(worker.pss().values())
            meeting = lab.new_folder()
            calls = [lab.client.send("score", n, str(meeting)) for n in range(options.slots)]
            for _ in worker.waiting("body in each slot"):
                if len(list(meeting.glob("*.here"))) == options.slots:
                    break
                worker.fail_early(lab.client, calls)
            each.rss_bytes = worker.sample().rss_bytes
            each.pss_bytes = by_role(worker, meeting)
            (meeting / "measured").touch()
            each.answers = worker.results(lab.client, calls)
        lab.say(f"  {each.label}: {as_megabytes(each.total_bytes)} MB")
    return found


def by_role(worker: Worker, meeting: Path) -> dict[str, list[int]]:
    running = {int(file.stem) for file in meeting.glob("*.here")}
    sizes = worker.pss()
    return {
        "bodies": [size for pid, size in sizes.items() if pid in running],
        "others": [size for pid, size in sizes.items() if pid not in running],
    }


# ── the second part: a model that must not be forked ────────────────────────────────────────────


@dataclass
class Asking:
    """One way to call the task of the second part."""

    task: str
    label: str
    kind: str = ""
    answers: int = 0
    processes: int = 0
    loads: int = 0
    seconds_per_call: float = 0.0
    error: str = ""


def ask_all(lab: Lab, options: argparse.Namespace) -> list[Asking]:
    found = [
        Asking("ask", "forked, isolated_preload"),
        Asking("ask", "spawned"),
        Asking("ask_in_batch", f"spawned, batch_size={BATCH_SIZE}"),
    ]
    lab.say(f"A model that must not be forked, asked {options.calls} times:")
    with lab.worker("forked", "forked", slots=1) as worker:
        ask_one(found[0], lab, worker, options.calls)
    with lab.worker("spawned", "spawned", slots=1) as worker:
        for each in found[1:]:
            ask_one(each, lab, worker, options.calls)
    return found


def ask_one(asking: Asking, lab: Lab, worker: Worker, count: int) -> None:
    began = time.monotonic()
    calls = [lab.client.send(asking.task, number) for number in range(count)]
    outcomes = worker.outcomes(lab.client, calls)
    asking.seconds_per_call = (time.monotonic() - began) / count
    results = [outcome.result for outcome in outcomes if outcome.succeeded]
    errors = [outcome.result for outcome in outcomes if not outcome.succeeded]
    asking.kind = results[0]["kind"] if results else ""
    asking.answers = len(results)
    asking.processes = len({result["pid"] for result in results})
    asking.loads = len({result["load"] for result in results})
    asking.error = f"{type(errors[0]).__name__}: {errors[0]}" if errors else ""
    lab.say(f"  {asking.label}: {asking.answers} answers, loaded {asking.loads} times")


# ── the command ─────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    options = parse()
    with writable(options.output):
        check_memory(options.slots * (options.megabytes * MEGABYTE + 2 * PROCESS_BYTES))
        with Lab(NAME, broker=options.broker, backend=options.backend, quiet=options.quiet) as lab:
            sharing, asking = share(lab, options), ask_all(lab, options)
            setup = lab.setup()
        show(sharing, asking, options)
        write(sharing, asking, options, setup)


def parse() -> argparse.Namespace:
    made = parser(NAME, "Measure what workers take that share one model, or cannot.")
    add, count = made.add_argument, at_least(1)
    add("--megabytes", type=count, default=500, metavar="MB", help="of the first part's model")
    add("--slots", type=count, default=8, metavar="N", help="of the first part's workers")
    add("--calls", type=count, default=8, metavar="N",
        help=f"in the second part, each way; no more than {BATCH_SIZE}")  # fmt: skip
    given = made.parse_args()
    check_backend(given)
    if given.calls > BATCH_SIZE:
        made.error(f"argument --calls: one process serves {BATCH_SIZE}, not {given.calls}")
    return given


def show(sharing: list[Sharing], asking: list[Asking], options: argparse.Namespace) -> None:
    # Here, since the workers import this file too, and have no use for it.
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    def table(title: str, caption: str, what: str, headings: tuple[str, ...]) -> Table:
        made = Table(box=SIMPLE_HEAD, title=title, caption=caption)
        made.add_column(what)
        for heading in headings:
            made.add_column(heading, justify="right", no_wrap=True)
        return made

    first = table(
        f"{options.megabytes} MB, used in {options.slots} slots at once",
        "MB, all processes of the worker; RSS counts what they share in each of them",
        "worker",
        ("before", "in use", "each slot", "RSS"),
    )
    for one in sharing:
        first.add_row(
            one.label,
            as_megabytes(one.before_bytes),
            f"[bold]{as_megabytes(one.total_bytes)}[/]",
            as_megabytes(one.total_bytes // options.slots),
            as_megabytes(one.rss_bytes),
        )
    kind = next((each.kind for each in asking if each.kind), "")
    second = table(
        f"A model that must not be forked ({kind}), {options.calls} calls",
        "seconds for each call, until the last has its outcome",
        "processes are",
        ("answers", "processes", "loads", "seconds"),
    )
    for each in asking:
        second.add_row(
            each.label,
            f"{each.answers} of {options.calls}",
            str(each.processes),
            f"[bold]{each.loads}[/]",
            f"{each.seconds_per_call:.2f}",
        )
    console = Console()
    console.print(first, second)
    for each in asking:
        if each.error:
            console.print(f"{each.label}: {each.error}", highlight=False, soft_wrap=True)


def write(
    sharing: list[Sharing],
    asking: list[Asking],
    options: argparse.Namespace,
    setup: dict[str, str],
) -> None:
    figures = {
        "megabytes": options.megabytes,
        "slots": options.slots,
        "calls": options.calls,
        "setup": setup,
        "units": "bytes and seconds",
        "sharing": [{**asdict(each), "total_bytes": each.total_bytes} for each in sharing],
        "asking": [asdict(each) for each in asking],
    }
    (options.output / f"{NAME}.json").write_text(json.dumps(figures, indent=1) + "\n")
    paths = [options.output / f"{NAME}.{suffix}" for suffix in ("png", "svg")]
    draw(sharing, asking, options, note=" · ".join(setup.values()), paths=paths)
    if not options.quiet:
        print(f"The plot is in {paths[0]}")


def draw(
    sharing: list[Sharing],
    asking: list[Asking],
    options: argparse.Namespace,
    *,
    note: str,
    paths: list[Path],
) -> None:
    """Above, each process is a piece of its worker's bar; below, a bar is a way to call."""
    from support import plot

    title = f"A model of {options.megabytes} MB, used in {options.slots} slots at once"
    figure = plot.new(title, width=9, height=5.6)
    upper, lower = figure.subplots(2)

    def label(panel: Axes, text: str, *, at: tuple[float, float]) -> None:
        panel.annotate(text, at, (5, 0), textcoords="offset points", va="center", fontsize=11,
                       color=plot.INK)  # fmt: skip

    colours = [plot.ORANGE, plot.PURPLE, plot.BLUE]
    for row, (one, colour) in enumerate(zip(sharing, colours, strict=True)):
        left = 0.0
        for role, alpha in (("others", 0.45), ("bodies", 0.9)):
            for size in sorted(one.pss_bytes[role], reverse=True):
                upper.barh(row, size / MEGABYTE, left=left, height=0.6, color=colour, alpha=alpha,
                           edgecolor="white", linewidth=0.8)  # fmt: skip
                left += size / MEGABYTE
        label(upper, f"{left:,.0f} MB", at=(left, row))
    upper.set_yticks(range(len(sharing)), [one.label for one in sharing])
    upper.set_xlabel("PSS of the worker, MB; a piece is a process, bodies run in the dark ones",
                     fontsize=10, color=plot.INK)  # fmt: skip

    for row, each in enumerate(asking):
        works = each.answers == options.calls
        width = each.seconds_per_call if works else 0.0
        lower.barh(row, width, height=0.6, color=plot.GREEN)
        loads = f"{each.loads} load{'s' * (each.loads != 1)}, {each.seconds_per_call:.2f} s a call"
        label(lower, loads if works else "no answer: the model must not be forked", at=(width, row))
    lower.set_title("A model that must not be forked", loc="left", fontsize=12, fontweight="bold",
                    color=plot.INK)  # fmt: skip
    lower.set_yticks(range(len(asking)), [each.label for each in asking])
    lower.set_xlabel(f"seconds for each of {options.calls} calls\n{note}", fontsize=10,
                     color=plot.INK, linespacing=1.6)  # fmt: skip
    for panel in (upper, lower):
        panel.invert_yaxis()
        panel.set_xlim(0, 1.5 * panel.dataLim.x1)
        plot.tidy(panel, grid="x")
    plot.save(figure, paths)


if __name__ == "__main__":
    sys.exit(run(NAME, main))
