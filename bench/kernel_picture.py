"""The picture of `moe-bench kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_engine.bench import plots
from moe_engine.bench.kernel_ops import MAKERS, PRODUCTS
from moe_engine.bench.runner import newest
from moe_engine.bench.shapes import ROUTING
from moe_engine.train.errors import InputError

COLORS = dict(zip(PRODUCTS, (plots.BLUE, plots.GREY, plots.ORANGE), strict=True))
CUT = 1.5  # what a cache serves can be many times its bound, and would flatten the others


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The fraction of its bound that each operation reaches, a panel for each shape, a bar for each implementation.

    Args:
        path: PNG to write.
        rows: as read from a file; of each thing the newest counts. Where a shape was measured with several routings,
            the first of `ROUTING` is drawn.
    Raises:
        InputError: no row has a time.
    """
    timed = [r for r in newest(rows) if r["benchmark"] == "kernels" and "fraction" in r]
    if not timed:
        raise InputError(f"{path}: expected timed rows of moe-bench kernels to draw, got none")
    panels: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in sorted(timed, key=lambda r: ROUTING.index(r["settings"]["routing"])):
        s = row["settings"]
        panel = panels.setdefault((s["shape"], f"T {s['tokens']}, {s['dtype']}", row["device"]), [])
        if not panel or panel[0]["settings"]["routing"] == s["routing"]:
            panel.append(row)
    height = 1.2 + 2.6 * len(panels)
    note = f"fraction of the bound: what the products and copies of the same run allow; bars are cut at {CUT:g}"
    figure, grid = plots.figure("Kernels one by one", note, rows=len(panels), size=(9.0, height), squeeze=False)
    for axes, (key, found) in zip(grid[:, 0], panels.items(), strict=True):
        ops = [op for op in MAKERS if any(r["name"].startswith(f"{op}, ") for r in found)]
        for number, (implementation, color) in enumerate(COLORS.items()):
            values = {r["name"].partition(", ")[0]: r["fraction"] for r in found if r["name"].endswith(implementation)}
            at = [ops.index(op) + 0.27 * (number - 1) for op in values]
            if at:
                axes.bar(at, [min(v, CUT) for v in values.values()], width=0.25, color=color, label=implementation)
        axes.axhline(1, color=plots.MUTED, linewidth=0.8)
        axes.set_title(", ".join([*key, found[0]["settings"]["routing"]]), fontsize=9, color=plots.MUTED, loc="left")
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
        plots.style(axes, ylabel="fraction of bound", grid="y")
        axes.set_ylim(0, CUT)
        axes.set_xticks(range(len(ops)), ops, rotation=30, ha="right", fontsize=8)
    plots.save(figure, path)
