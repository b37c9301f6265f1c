"""What is on the screen: a live table, or lines, or at the end one table alone."""

from __future__ import annotations

import time
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from rss_comparison.figures import Run, Stage
from support.memory import MEGABYTE

REFRESH_INTERVAL = 0.2
CAPTION = "MB, RSS of all the worker's processes; shared pages count in each"
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 24
#: Below this many columns the table has no room for the curves.
WIDE = 110


class Display:
    """Nothing on the screen; the base of the others."""

    def __init__(self, console: Console, runs: list[Run]) -> None:
        self.console = console
        self.runs = runs

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def say(self, line: str) -> None:
        """Tell what comes next."""

    def changed(self) -> None:
        """Show what is new in the runs."""


class LineDisplay(Display):
    """One line for each thing that happens, for logs and for `--no-live`."""

    def __init__(self, console: Console, runs: list[Run]) -> None:
        super().__init__(console, runs)
        self._told: dict[str, Stage] = {}

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False)

    def changed(self) -> None:
        for run in self.runs:
            name = run.variant.name
            if self._told.setdefault(name, Stage.WAITING) != run.stage:
                self._told[name] = run.stage
                self.say(f"{run.variant.label}: {_news(run)}")


def _news(run: Run) -> str:
    if run.stage is Stage.WORKING:
        return f"working, from {_megabytes(run.baseline and run.baseline.rss_bytes)} MB"
    if run.stage is Stage.IDLE:
        return f"{run.done} tasks done, peak {_megabytes(run.peak_bytes)} MB, now idle"
    if run.stage is Stage.FINISHED:
        return f"retained {_megabytes(run.retained_bytes, signed=True)} MB"
    return str(run.stage.value)


class LiveDisplay(Display):
    """A table and a progress bar that follow the runs.

    No thread refreshes them: `changed()` comes with every sample, from the thread that forks.
    """

    def __init__(self, console: Console, runs: list[Run]) -> None:
        super().__init__(console, runs)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=console, auto_refresh=False,
        )  # fmt: skip
        self._bar = self._progress.add_task("tasks", total=sum(run.tasks for run in runs))
        # Transient: what stays on the screen is the final table, which is printed once.
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._refreshed = 0.0
        self._stages: list[Stage] = []

    def __enter__(self) -> Display:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        self._live.console.print(line, highlight=False)

    def changed(self) -> None:
        now, stages = time.monotonic(), [run.stage for run in self.runs]
        if now - self._refreshed < REFRESH_INTERVAL and stages == self._stages:
            return
        self._refreshed, self._stages = now, stages
        self._progress.update(self._bar, completed=sum(run.done for run in self.runs))
        shown: list[RenderableType] = [table(self.runs, width=self.console.width), self._progress]
        self._live.update(Group(*shown), refresh=True)


def table(runs: list[Run], *, width: int, final: bool = False) -> Table:
    """The runs, as far as they are known."""
    wide = width >= WIDE
    shown = Table(box=SIMPLE_HEAD, caption=CAPTION)
    shown.add_column("worker", no_wrap=True)
    if not final:
        shown.add_column("state", no_wrap=True)
        shown.add_column("now", justify="right")
    for heading in ("baseline", "peak", "retained", "tasks/s"):
        shown.add_column(heading, justify="right", no_wrap=True)
    if wide:
        shown.add_column("RSS over time", no_wrap=True)
    for run in runs:
        shown.add_row(*_row(run, wide=wide, final=final, top=_top(runs)))
    return shown


def _row(run: Run, *, wide: bool, final: bool, top: int) -> list[str | Text]:
    cells: list[str | Text] = [run.variant.label]
    if not final:
        working = run.stage is Stage.WORKING
        cells.append(f"{run.done} of {run.tasks}" if working else run.stage.value)
        running = run.samples and run.stage is not Stage.FINISHED
        cells.append(_megabytes(run.samples[-1].rss_bytes if running else None))
    speed = run.tasks_per_second
    retained = _megabytes(run.retained_bytes, signed=True)
    cells += [
        _megabytes(run.baseline and run.baseline.rss_bytes),
        _megabytes(run.peak_bytes),
        Text(retained, style="bold"),
        "" if speed is None else f"{speed:.2f}",
    ]
    return [*cells, sparks(run, top=top)] if wide else cells


def _top(runs: list[Run]) -> int:
    return max((sample.rss_bytes for run in runs for sample in run.samples), default=1)


def sparks(run: Run, *, top: int) -> str:
    """The run's curve in one line of text: the largest sample of each equal share of its time."""
    sizes = [sample.rss_bytes for sample in run.samples]
    count = min(SPARK_WIDTH, len(sizes))
    shares = [sizes[i * len(sizes) // count : (i + 1) * len(sizes) // count] for i in range(count)]
    return "".join(SPARKS[(len(SPARKS) - 1) * max(share) // top] for share in shares)


def _megabytes(size: int | None, *, signed: bool = False) -> str:
    if size is None:
        return ""
    megabytes = round(size / MEGABYTE)
    return f"{megabytes:+d}" if signed else f"{megabytes:d}"
