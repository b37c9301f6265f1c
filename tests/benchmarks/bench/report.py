"""A table, a plot, and plain data of all that was found."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import celery
import psutil
from rich.console import Console
from rich.table import Table

from bench.figures import Figure, Section


def number(value: float) -> str:
    """With three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def show(section: Section, console: Console) -> None:
    """Print one section."""
    table = Table(title=section.title, title_justify="left", title_style="bold")
    for name in ("measured", "p50", "p99", "unit", "n"):
        table.add_column(name, justify="left" if name in ("measured", "unit") else "right")
    for series in section.series:
        values = (number(series.p50), number(series.p99), series.unit, str(len(series.values)))
        table.add_row(series.name, *values)
    console.print(table)
    table = Table()
    for name in ("figure", "is", "was to be", ""):
        table.add_column(name, justify="left" if name in ("figure", "") else "right")
    for figure in section.figures:
        table.add_row(figure.name, f"{number(figure.value)} {figure.unit}", *_bound(figure))
    console.print(table)


def _bound(figure: Figure) -> tuple[str, str]:
    if figure.bound is None:
        return "", ""
    return f"{figure.bound.kind} {number(figure.bound.value)}", "" if figure.is_kept else "NOT KEPT"


def machine() -> dict[str, Any]:
    """On what it was measured."""
    return {
        "cores": os.cpu_count(),
        "memory_mib": psutil.virtual_memory().total >> 20,
        "load_before": os.getloadavg(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "celery": celery.__version__,
    }


def write(sections: Mapping[str, Section], about: Mapping[str, Any], folder: Path) -> None:
    """Write ``bench.json``, ``bench.png`` and ``bench.svg``."""
    data = {
        "machine": about,
        "sections": {name: section.to_json() for name, section in sections.items()},
    }
    (folder / "bench.json").write_text(json.dumps(data, indent=1, ensure_ascii=False))
    figures = [
        figure
        for section in sections.values()
        for figure in section.figures
        if figure.bound is not None and figure.unit == "×"
    ]
    if figures:
        _plot(figures, folder)


def _plot(figures: Sequence[Figure], folder: Path) -> None:
    """How far each ratio is from its bound: left of 1 it is kept."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shares = []
    for figure in figures:
        assert figure.bound is not None
        share = figure.value / figure.bound.value
        shares.append(share if figure.bound.kind == "at most" else 1 / share)
    plot, axes = pyplot.subplots(figsize=(10, 1 + 0.45 * len(figures)), layout="constrained")
    colours = ["tab:green" if figure.is_kept else "tab:red" for figure in figures]
    bars = axes.barh([figure.name for figure in figures], shares, color=colours)
    axes.bar_label(bars, [f" {number(figure.value)} ×" for figure in figures])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set_xlabel("of what it was to be; left of the line is better")
    for suffix in ("png", "svg"):
        plot.savefig(folder / f"bench.{suffix}", dpi=120)
    pyplot.close(plot)
