"""``celery isolated audit``: which plain tasks to isolate."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import click
from celery.bin.base import CeleryCommand
from celery.exceptions import CeleryCommandException
from celery.platforms import EX_UNAVAILABLE
from kombu.exceptions import OperationalError

from isolated_tasks.advice import Advice, Verdict, size
from isolated_tasks.auditor import Auditor, listen

__all__ = ["audit_command", "exit_code"]

#: A task has the verdict of ``--fail-on``, or a more severe one.
FAILED = 1
#: There was ``--fail-on``, and nothing to judge by.
NOT_JUDGED = 3

#: The table in the terminal is drawn anew so often, in seconds, and takes no more of the time.
REDRAW_SECONDS, REDRAW_SHARE = 1.0, 0.05

#: What ``--fail-on`` may be.
FAIL_ON = {"keeps-its-peak": Verdict.KEEPS_ITS_PEAK, "grows": Verdict.GROWS}


def _a_number(ctx: Any, parameter: Any, value: float | None) -> float | None:
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is not a number of seconds", ctx, parameter)
    return value


@click.command("audit", cls=CeleryCommand)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    callback=_a_number,
    help="End after so many seconds. Without this and --calls: at Ctrl-C.",
)
@click.option(
    "--calls",
    type=click.IntRange(min=1),
    help="End when each task (of --task, or else each that was heard of) had so many calls.",
)
@click.option("--task", "tasks", multiple=True, help="Look at this task alone. Can be repeated.")
@click.option(
    "--fail-on",
    type=click.Choice(list(FAIL_ON)),
    help=f"Exit with {FAILED} if a task has this verdict or a more severe one, and with "
    f"{NOT_JUDGED} if none could be judged, or one of --task could not.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, which needs no rich.")
@click.pass_context
def audit_command(
    ctx: Any,
    seconds: float | None,
    calls: int | None,
    tasks: Sequence[str],
    fail_on: str | None,
    as_json: bool,
) -> None:
    """Listen to workers that run with --memory-audit, and say which tasks to isolate.

    The verdicts are fine, keeps its peak, and grows (a leak).
    """
    if not as_json and importlib.util.find_spec("rich") is None:
        raise click.UsageError(
            "the table needs rich: pip install 'isolated-tasks[cli]', or ask for --json"
        )
    app = ctx.obj.app
    auditor = Auditor(tasks)
    began = time.monotonic()
    lost: Exception | None = None
    errors = (OperationalError, OSError, *app.connection_for_read().connection_errors)
    # Whoever ends it from a script does not lose what was heard either.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    drawing = nullcontext(lambda: None) if as_json else _drawing(auditor, ctx.obj.no_color)
    try:
        with drawing as draw:
            listen(
                app,
                auditor,
                seconds=seconds,
                calls=calls,
                on_ready=lambda: _say_ready(calls),
                on_tick=draw,
            )
    except KeyboardInterrupt:
        pass
    except errors as exc:
        lost = exc
    finally:
        signal.signal(signal.SIGTERM, before)
    advice = auditor.advice()
    if as_json:
        click.echo(json.dumps(_as_json(advice, time.monotonic() - began), indent=2))
    else:
        _show(advice, no_color=ctx.obj.no_color)
    if lost is not None:
        message = f"the broker does not answer: {lost!r}"
        raise CeleryCommandException(message=message, exit_code=EX_UNAVAILABLE) from lost
    if not any(one.calls or one.verdict is Verdict.UNMEASURABLE for one in advice):
        click.echo("no worker with --memory-audit has run a task", err=True)
    if fail_on is not None:
        ctx.exit(exit_code(advice, FAIL_ON[fail_on], named=frozenset(tasks)))


def exit_code(advice: Sequence[Advice], fail_on: Verdict, *, named: frozenset[str]) -> int:
    """What ``--fail-on`` ends with.

    Args:
        advice: On all tasks.
        fail_on: This verdict, and those that are more severe, fail.
        named: The tasks of ``--task``, each of which has to be judged.
    """
    if any(one.verdict.severity >= fail_on.severity for one in advice):
        return FAILED
    judged = {one.task for one in advice if one.verdict.severity >= Verdict.FINE.severity}
    return 0 if judged and judged >= named else NOT_JUDGED


def _say_ready(calls: int | None) -> None:
    until = "" if calls is None else f" for {calls} calls of each task"
    # To stderr: what is on stdout may be read by a program.
    click.echo(f"listening{until}; Ctrl-C ends it and shows the advice", err=True)


def _as_json(advice: Sequence[Advice], seconds: float) -> dict[str, Any]:
    """The document; sizes are bytes, durations seconds."""
    tasks = [
        {**dataclasses.asdict(one), "verdict": one.verdict.value, "action": one.action}
        for one in advice
    ]
    return {"seconds": round(seconds, 3), "tasks": tasks}


class _Drawing(AbstractContextManager["Callable[[], None]"]):
    """The table in the terminal, as long as there is nothing final to say."""

    def __init__(self, auditor: Auditor, console: Any) -> None:
        from rich.live import Live

        self._auditor = auditor
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._next = 0.0

    def __enter__(self) -> Callable[[], None]:
        self._live.__enter__()
        return self._draw

    def __exit__(self, *exc: Any) -> None:
        self._live.__exit__(*exc)

    def _draw(self) -> None:
        began = time.monotonic()
        if began >= self._next:
            self._live.update(_table(self._auditor.advice()), refresh=True)
            took = time.monotonic() - began
            # Many tasks in many processes take a while to judge.
            self._next = began + max(REDRAW_SECONDS, took / REDRAW_SHARE)


def _drawing(auditor: Auditor, no_color: bool) -> AbstractContextManager[Callable[[], None]]:
    console = _console(no_color)
    return _Drawing(auditor, console) if console.is_terminal else nullcontext(lambda: None)


def _console(no_color: bool) -> Any:
    from rich.console import Console

    return Console(no_color=no_color or None, highlight=False, markup=False)


def _table(advice: Sequence[Advice]) -> Any:
    from rich.table import Table

    table = Table()
    table.add_column("task", overflow="fold")
    for name in ("calls", "peak", "kept a call"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for one in advice:
        table.add_row(
            one.task,
            str(one.calls),
            "" if one.peak_bytes is None else size(one.peak_bytes),
            "" if one.kept_per_call_bytes is None else size(one.kept_per_call_bytes),
            one.verdict.value,
            style=_STYLES.get(one.verdict),
        )
    return table


def _show(advice: Sequence[Advice], *, no_color: bool) -> None:
    console = _console(no_color)
    console.print(_table(advice))
    for one in advice:
        verdict = f"{one.verdict.value} → {one.action}" if one.action else one.verdict.value
        console.print(f"{one.task}: {verdict}", style=_STYLES.get(one.verdict), soft_wrap=True)
        console.print(f"    {one.because}", soft_wrap=True)


_STYLES = {Verdict.GROWS: "bold red", Verdict.KEEPS_ITS_PEAK: "yellow"}
