"""The plot: one panel for each worker, all on the same axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from rss_comparison.figures import Run
from rss_comparison.options import BATCH, ISOLATED, PLAIN, RECYCLED
from support.memory import MEGABYTE
from support.plot import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, new, save, tidy

COLOURS = {PLAIN: ORANGE, RECYCLED: PURPLE, ISOLATED: BLUE, BATCH: GREEN}
DASHES, DOTS = (0, (4, 3)), (0, (1, 2))

#: In inches. A single panel would have no room for the label beside it without LEAST_HEIGHT.
WIDTH, PANEL_HEIGHT, LEAST_HEIGHT, MARGINS = 9.0, 1.4, 2.8, 1.3


def draw(runs: list[Run], *, title: str, note: str, paths: list[Path]) -> None:
    """Draw the finished runs into each of `paths`, whose suffixes are the formats."""
    height = MARGINS + max(PANEL_HEIGHT * len(runs), LEAST_HEIGHT)
    figure = new(title, width=WIDTH, height=height)
    panels = figure.subplots(len(runs), sharex=True, sharey=True, squeeze=False)[:, 0]
    top = max(max(run.curve()[1]) for run in runs)
    for panel, run in zip(panels, runs, strict=True):
        _draw_run(panel, run, top=top)
    _explain_lines(panels[0], runs[0])
    panels[-1].set_xlabel(
        "seconds since the tasks were sent\n" + note, fontsize=10.5, color=INK, linespacing=1.6
    )
    figure.supylabel("RSS of the worker's process tree, MB", fontsize=10.5, color=INK)
    save(figure, paths)


def _draw_run(panel: Axes, run: Run, *, top: float) -> None:
    seconds, megabytes = run.curve()
    colour = COLOURS[run.variant.name]
    baseline, done = _baseline(run), _done(run)
    panel.axhline(baseline, color=FAINT, linewidth=0.9, linestyle=DASHES)
    panel.axvline(done, color=FAINT, linewidth=0.9, linestyle=DOTS)
    above = [max(baseline, each) for each in megabytes]
    panel.fill_between(seconds, baseline, above, color=colour, alpha=0.18, linewidth=0)
    panel.plot(seconds, megabytes, color=colour, linewidth=1.4)
    panel.set_title(run.variant.label, loc="left", fontsize=11, fontweight="bold", color=colour)
    panel.set_title(_summary(run), loc="right", fontsize=11, color=INK)
    panel.set_ylim(0, top * 1.12)
    panel.margins(x=0.01)
    tidy(panel, grid="y")


def _explain_lines(panel: Axes, run: Run) -> None:
    """Say once, in the first panel, what the broken lines are."""
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": FAINT}
    panel.annotate("last task done", (_done(run), 0), (4, 5), **style)
    right_edge = panel.get_yaxis_transform()
    panel.annotate("before the first task", (1, _baseline(run)), (-2, 4), xycoords=right_edge,
                   ha="right", **style)  # fmt: skip


def _baseline(run: Run) -> float:
    return run.baseline.rss_bytes / MEGABYTE if run.baseline is not None else 0.0


def _done(run: Run) -> float:
    return run.ended_at - run.began_at if run.ended_at is not None else 0.0


def _summary(run: Run) -> str:
    retained = round((run.retained_bytes or 0) / MEGABYTE)
    return f"retained {retained:+d} MB,  {run.tasks_per_second or 0:.2f} tasks/s"
