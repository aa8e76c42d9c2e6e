"""The picture of `moe-bench kernels`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_engine.bench.kernel_ops import MAKERS, PRODUCTS
from moe_engine.bench.runner import newest
from moe_engine.bench.shapes import ROUTING
from moe_engine.train.errors import InputError


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The fraction of its bound that each operation reaches, a panel for each shape, a bar for each implementation.

    Args:
        path: PNG to write.
        rows: as read from a file; of each thing the newest counts. Where a shape was measured with several routings,
            the first of `ROUTING` is drawn.
    Raises:
        InputError: no row has a time.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [r for r in newest(rows) if r["benchmark"] == "kernels" and "fraction" in r]
    if not timed:
        raise InputError(f"{path}: expected timed rows of moe-bench kernels to draw, got none")
    panels: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in sorted(timed, key=lambda r: ROUTING.index(r["settings"]["routing"])):
        s = row["settings"]
        panel = panels.setdefault((s["shape"], f"T {s['tokens']}, {s['dtype']}", row["device"]), [])
        if not panel or panel[0]["settings"]["routing"] == s["routing"]:
            panel.append(row)
    ink, muted, colours = "#1f2933", "#7b8794", dict(zip(PRODUCTS, ("#2563a8", "#b8c4ce", "#e0a458"), strict=True))
    figure = Figure(figsize=(9.0, 0.6 + 2.6 * len(panels)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Kernels: fraction of what this machine's products and copies allow", color=ink)
    for axes, (key, found) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        ops = [op for op in MAKERS if any(r["name"].startswith(f"{op}, ") for r in found)]
        for number, implementation in enumerate(PRODUCTS):
            values = {r["name"].partition(", ")[0]: r["fraction"] for r in found if r["name"].endswith(implementation)}
            if not values:
                continue
            at = [ops.index(op) + 0.27 * (number - 1) for op in values]
            axes.bar(at, list(values.values()), width=0.25, color=colours[implementation], label=implementation)
        axes.set_xticks(range(len(ops)), ops, rotation=30, ha="right", fontsize=8)
        axes.axhline(1, color=muted, linewidth=0.8)
        axes.set_title(", ".join([*key, found[0]["settings"]["routing"]]), fontsize=9, color=muted, loc="left")
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=130)
    os.replace(temporary, path)
