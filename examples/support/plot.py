"""The look of the plots."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: Some of Okabe and Ito's colours, which readers with any kind of colour vision can tell apart.
ORANGE, PURPLE, BLUE, GREEN = "#D55E00", "#CC79A7", "#0072B2", "#009E73"
INK = "#222222"
FAINT = "#767676"
GRID = "#E6E6E6"

DOTS_PER_INCH = 160


def new(title: str, *, width: float, height: float) -> Figure:
    """An empty figure, its size in inches."""
    # Without pyplot, which would look for a screen and keep every figure alive.
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, x=0.012, ha="left")
    return figure


def tidy(panel: Axes, *, grid: str) -> None:
    """Give a panel the look of the others; `grid` is the axis that lines mark, "x" or "y"."""
    panel.tick_params(labelsize=10, colors=INK)
    panel.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def save(figure: Figure, paths: list[Path]) -> None:
    """Write the figure into each of `paths`, whose suffixes are the formats."""
    for path in paths:
        figure.savefig(path, dpi=DOTS_PER_INCH)
