"""How figures look: one size of type, marks that can be told apart in print, files that do not change by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.render import interval_of
from common.files import atomic_path

Point = tuple[float, float, float | None]
"""x, y and the half width of the interval of y."""

SERIES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    {"color": "#D55E00", "marker": "o", "linestyle": "-"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    {"color": "#000000", "marker": "x", "linestyle": (0, (5, 1))},
)
"""Colour, marker and line of each curve; colours of Okabe and Ito, which colour-blind readers can tell apart."""
MARKS = dict(zip(("teacache", "flowcache", "motioncache", "best"), SERIES, strict=False))
"""The curve that a method always is."""
STYLE = {"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 7, "lines.markersize": 4, "lines.linewidth": 1.2}
PANE = (3.6, 2.9)
"""Inches of a panel."""
DPI = 200


def new_figure(columns: int, heights: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    """A figure of `columns` panels side by side, and rows of the given relative heights; axes row by row.

    Call it, and whatever adds text, inside `styled`.
    """
    figure = Figure(figsize=(PANE[0] * columns, PANE[1] * sum(heights) / max(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=list(heights))
    return figure, list(axes.flat)


def styled() -> AbstractContextManager[None]:
    """The type and lines of all figures, as a context or as a decorator of a function that draws."""
    return matplotlib.rc_context(STYLE)


def error_bars(axes: Axes, points: Iterable[Point], label: str, style: dict[str, Any]) -> None:
    """A curve through points in the order of x, with their intervals."""
    x, y, halves = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    axes.errorbar(x, y, [half or 0.0 for half in halves], label=label, capsize=2, **style)


def point(row: dict[str, Any], x: str, y: str) -> Point:
    """Two figures of a row, with the interval of the second if it has one."""
    return row[x], row[y], row.get(interval_of(y))


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all, without a date: the same figure gives the same file."""
    with styled(), atomic_path(path) as partial:
        figure.savefig(partial, dpi=DPI, metadata={"Software": None})
