"""``celery isolated top``: what runs in isolation, in all workers, by memory."""

from __future__ import annotations

import json
import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import COMMA_SEPARATED_LIST, handle_remote_command_error
from celery.exceptions import CeleryCommandException
from celery.platforms import EX_UNAVAILABLE

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["top"]

#: The command that workers answer, see `isolated_tasks.remote`.
COMMAND = "isolated"

#: Between two looks, and for an answer, in seconds. Asking costs a worker some milliseconds.
LEAST_SECONDS, MOST_SECONDS = 0.1, 3600.0

#: What one look has found: each worker's answer.
Answers = dict[str, dict[str, Any]]


def _seconds(ctx: click.Context, param: click.Parameter, value: float) -> float:
    # In this way nan is refused too.
    if not LEAST_SECONDS <= value <= MOST_SECONDS:
        raise click.BadParameter(
            f"must be a number of seconds, {LEAST_SECONDS:g} to {MOST_SECONDS:g}, not {value:g}"
        )
    return value


@click.command()
@click.option(
    "-t",
    "--timeout",
    type=float,
    default=1.0,
    show_default=True,
    callback=_seconds,
    help="Seconds to wait for the workers' answers.",
)
@click.option(
    "-d",
    "--destination",
    type=COMMA_SEPARATED_LIST,
    help="Comma separated list of the workers to look at. Default: all.",
)
@click.option(
    "-i",
    "--interval",
    type=float,
    default=2.0,
    show_default=True,
    callback=_seconds,
    help="Seconds from one look to the next, and no less than an answer takes.",
)
@click.option("--once", is_flag=True, help="Print what there is, and exit.")
@click.option("-j", "--json", "as_json", is_flag=True, help="The same as --once, as JSON.")
@click.pass_context
def top(
    ctx: click.Context,
    *,
    timeout: float,
    destination: list[str] | None,
    interval: float,
    once: bool,
    as_json: bool,
) -> None:
    """Watch the processes of isolated tasks, the largest first; q quits."""
    view = _Source(ctx.obj.app, timeout, destination or None)
    if as_json:
        click.echo(json.dumps(view.look_or_fail(), indent=2))
        return
    rendering = _rendering()
    if once:
        rendering.show(view.look_or_fail(), no_color=ctx.obj.no_color)
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("this is no terminal: use --once or --json")
    try:
        _watch(view, interval, rendering, no_color=ctx.obj.no_color)
    except KeyboardInterrupt:
        # The other way to quit.
        pass


def _rendering() -> Any:
    """What draws, which needs what not everybody has.

    Raises:
        ClickException: It is not here.
    """
    try:
        from isolated_tasks.commands import drawing
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != "rich":
            raise
        raise click.ClickException(
            "the view needs rich: pip install 'isolated-tasks[cli]'; --json does without"
        ) from None
    return drawing


class _Source:
    """Asks the workers.

    Args:
        app: Whose.
        timeout: For their answers, in seconds.
        destination: Their names; None for all.
    """

    def __init__(self, app: Celery, timeout: float, destination: list[str] | None) -> None:
        self._app = app
        self.timeout = timeout
        self.destination = destination

    def look(self) -> Answers:
        """Ask once."""
        inspect = self._app.control.inspect(timeout=self.timeout, destination=self.destination)
        return inspect._request(COMMAND) or {}

    def look_or_fail(self) -> Answers:
        """Ask once.

        Raises:
            CeleryCommandException: The broker cannot be reached, or a worker does not answer.
        """
        try:
            answers = self.look()
            missing = [name for name in self.destination or () if name not in answers]
            if missing:
                self._fail_for(missing)
        except Exception as exc:
            handle_remote_command_error("isolated top", exc)
        if not answers:
            self._fail(f"no worker answers {self._within}")
        return answers

    def _fail_for(self, missing: list[str]) -> None:
        others = sorted(self._app.control.inspect(timeout=self.timeout).ping() or {})
        known = f"there are {', '.join(others)}" if others else "nor does any other"
        self._fail(f"no worker {' or '.join(missing)} answers {self._within}; {known}")

    @property
    def _within(self) -> str:
        return f"within {self.timeout:g} s (--timeout)"

    def _fail(self, message: str) -> None:
        raise CeleryCommandException(message=message, exit_code=EX_UNAVAILABLE)


# ── live ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Seen:
    """What the thread that asks has found last, for the one that draws."""

    answers: Answers
    #: Why there is nothing newer.
    trouble: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


def _watch(view: _Source, interval: float, drawing: Any, *, no_color: bool) -> None:
    """Draw what there is until somebody presses q, or Ctrl-C."""
    # What is wrong from the beginning is said where it can be read.
    seen = _Seen(view.look_or_fail())
    changed, changer = os.pipe()
    thread = threading.Thread(
        target=_keep_asking,
        args=(view, interval, seen, lambda: os.write(changer, b".")),
        daemon=True,  # it may wait for answers, and nobody is interested any more
    )
    with _keys() as keyboard, drawing.screen(no_color=no_color) as draw:
        thread.start()
        while True:
            with seen.lock:
                draw(seen.answers, trouble=seen.trouble)
            ready, _, _ = select.select([keyboard, changed], [], [])
            if changed in ready:
                os.read(changed, 4096)
            # Nothing is what a terminal says that is gone.
            if keyboard in ready and os.read(keyboard, 1).lower() in (b"q", b""):
                return


def _keep_asking(view: _Source, interval: float, seen: _Seen, tell: Callable[[], object]) -> None:
    known = {*(view.destination or ()), *seen.answers}
    while True:
        began = time.monotonic()
        try:
            answers, trouble = view.look(), ""
            known.update(answers)
            if missing := sorted(known - answers.keys()):
                trouble = f"no answer from {', '.join(missing)}"
        except Exception as exc:
            # The broker may be away for a while.
            answers, trouble = {}, f"the workers cannot be asked: {exc}"
        with seen.lock:
            seen.answers, seen.trouble = answers, trouble
        tell()
        time.sleep(max(0.0, began + interval - time.monotonic()))


@contextmanager
def _keys() -> Iterator[int]:
    """The keyboard, of which each key comes at once and is not shown."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
