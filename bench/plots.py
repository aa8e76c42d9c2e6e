"""The look that the pictures of benchmarks share, horizontal bars with their spread, and stacked ones.

No pyplot: its global state is not ours to change. Colours and axes are those of a run's own pictures (train/plots.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    limit: float = math.inf,
) -> None:
    """Horizontal bars, the first on top, each with its value behind it and a whisker from p20 to p80.

    Args:
        names: of the bars.
        p50, p20, p80: in the unit of `xlabel`; NaN where there is nothing; the spread is left out where it is None.
        colors: of the bars; `color_of` each name where it is None.
        limit: where a longer bar is cut; its value says so. One that is many times the others would flatten them.
    """
    style(axes, xlabel, grid="x")
    places, shown = range(len(names)), [min(value, limit) for value in p50]
    axes.barh(places, shown, color=[color_of(n) for n in names] if colors is None else colors, height=0.62)
    ends = shown
    if p20 is not None and p80 is not None:
        whole = [place for place in places if p80[place] <= limit]
        spread = [[p50[i] - p20[i] for i in whole], [p80[i] - p50[i] for i in whole]]
        axes.errorbar([p50[i] for i in whole], whole, xerr=spread, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
        ends = [min(value, limit) for value in p80]
    for place, value, end in zip(places, p50, ends, strict=True):
        text = "–" if math.isnan(value) else _short(value) + (" (cut)" if value > limit else "")
        axes.annotate(
            text,
            (0 if math.isnan(end) else end, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    room = 1.3 if any(value > limit for value in p50) else 1.16
    axes.set_xlim(0, room * max((end for end in ends if end > 0), default=1))


def stacked(axes: Any, parts: Mapping[str, Sequence[float]], colors: Mapping[str, str], xlabel: str) -> None:
    """A horizontal bar a row, the first on top, cut into parts; a part that is nowhere is left out of the legend.

    Args:
        parts: part → its value in each row.
        colors: of the parts.
    """
    style(axes, xlabel, grid="x")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    left: list[float] = []
    for part, widths in parts.items():
        left = left or [0.0] * len(widths)
        if any(widths):
            axes.barh(range(len(widths)), widths, left=left, height=0.62, label=part, color=colors[part])
            left = [a + b for a, b in zip(left, widths, strict=True)]
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4}
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, **place)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def limit_of(values: Sequence[float], factor: float = 4.0) -> float:
    """The largest value up to `factor` times the smallest above 0: a `limit` for bars."""
    positive = [value for value in values if value > 0]
    return max((value for value in positive if value <= factor * min(positive)), default=math.inf)
