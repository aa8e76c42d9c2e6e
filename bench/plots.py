"""The look that the pictures of benchmarks share, and horizontal bars with their spread.

No pyplot: its global state is not ours to change. Colours and axes are those of a run's own pictures (train/plots.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# The colours are here for the pictures of other modules.
from moe_engine.train.plots import BLUE, GREEN, GRID, INK, MUTED, ORANGE, RED, clean_axes, save  # noqa: F401

VIOLET = "#7c3aed"
GREY, LIGHT = "#9aa5b1", "#cbd2d9"
"""Peers; and what is no layer but a bound, such as the bare matrix products."""
_TITLE, _NOTE, _HEAD = 0.3, 0.56, 0.75  # inches from the upper edge: middle of the title, of the note; where axes begin


def color_of(name: str) -> str:
    """Ours blue, bare matrix products light, peers grey."""
    return BLUE if name.startswith(("moe_engine", "triton")) else LIGHT if name.startswith("BLAS") else GREY


def figure(
    title: str,
    note: str = "",
    *,
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = (8.0, 4.5),
    **options: Any,
) -> tuple[Any, Any]:
    """A figure with a title and, below it, a line in small grey letters.

    Margins fit themselves to the labels, so that long names are never cut.

    Args:
        title, note: what it shows; where it is from.
        rows, columns: of axes.
        size: width and height in inches.
        options: for `Figure.subplots`: sharex, height_ratios, ...

    Returns:
        The figure and its axes: one, or an array of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width, height = size
    head = (_HEAD if note else _NOTE) / height
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, rect=(0, 0, 1, 1 - head))
    result = Figure(figsize=size, facecolor="white", layout=layout)
    FigureCanvasAgg(result)
    left = 0.2 / width
    result.text(left, 1 - _TITLE / height, title, fontsize=14, fontweight="bold", color=INK, va="center")
    result.text(left, 1 - _NOTE / height, note, fontsize=9, color=MUTED, va="center")
    return result, result.subplots(rows, columns, **options)


def style(axes: Any, xlabel: str = "", ylabel: str = "", grid: str = "both") -> None:
    """Labels, with the unit in them, and the common look.

    Args:
        grid: lines across "x", "y" or "both".
    """
    clean_axes(axes)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(False)
    axes.grid(True, axis=grid, color=GRID, linewidth=0.8)


def bars(
    axes: Any,
    names: Sequence[str],
    p50: Sequence[float],
    p20: Sequence[float] | None = None,
    p80: Sequence[float] | None = None,
    colors: Sequence[str] | None = None,
    xlabel: str = "",
    form: str = "{:.3g}",
) -> None:
    """Horizontal bars, the first on top, each with its value behind it and a whisker from p20 to p80.

    Args:
        names: of the bars.
        p50, p20, p80: in the unit of `xlabel`; the spread is left out where it is None.
        colors: of the bars; `color_of` each name where it is None.
        form: of the values.
    """
    style(axes, xlabel, grid="x")
    places = range(len(names))
    axes.barh(places, p50, color=[color_of(n) for n in names] if colors is None else colors, height=0.62)
    if p20 is not None and p80 is not None:
        spread = [[m - a for m, a in zip(p50, p20, strict=True)], [b - m for m, b in zip(p50, p80, strict=True)]]
        axes.errorbar(p50, places, xerr=spread, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    for place, value, end in zip(places, p50, p80 or p50, strict=True):
        text = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9, "color": INK}
        axes.annotate(form.format(value), (end, place), **text)
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.14 * max([*p50, *(p80 or ())], default=0) or 1)
