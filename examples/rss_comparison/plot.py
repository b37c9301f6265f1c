"""The plot: one panel for each worker, all on the same axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rss_comparison.figures import MEGABYTE, Run
from rss_comparison.options import BATCH, ISOLATED, PLAIN, RECYCLED

#: Okabe and Ito's colours, which readers with any kind of colour vision can tell apart.
COLOURS = {PLAIN: "#D55E00", RECYCLED: "#CC79A7", ISOLATED: "#0072B2", BATCH: "#009E73"}
INK = "#222222"
FAINT = "#767676"
DASHES, DOTS = (0, (4, 3)), (0, (1, 2))

#: In inches. A single panel would have no room for the label beside it without LEAST_HEIGHT.
WIDTH, PANEL_HEIGHT, LEAST_HEIGHT, MARGINS = 9.0, 1.4, 2.8, 1.3
DOTS_PER_INCH = 160


def draw(runs: list[Run], *, title: str, note: str, paths: list[Path]) -> None:
    """Draw the finished runs into each of `paths`, whose suffixes are the formats."""
    # Without pyplot, which would look for a screen and keep every figure alive.
    height = MARGINS + max(PANEL_HEIGHT * len(runs), LEAST_HEIGHT)
    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, x=0.012, ha="left")
    panels = figure.subplots(len(runs), sharex=True, sharey=True, squeeze=False)[:, 0]
    top = max(max(run.curve()[1]) for run in runs)
    for panel, run in zip(panels, runs, strict=True):
        _draw_run(panel, run, top=top)
    _explain_lines(panels[0], runs[0])
    panels[-1].set_xlabel(
        "seconds since the tasks were sent\n" + note, fontsize=10.5, color=INK, linespacing=1.6
    )
    figure.supylabel("RSS of the worker's process tree, MB", fontsize=10.5, color=INK)
    for path in paths:
        figure.savefig(path, dpi=DOTS_PER_INCH)


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
    panel.tick_params(labelsize=10, colors=INK)
    panel.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


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
