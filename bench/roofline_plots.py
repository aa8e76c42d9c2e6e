"""Pictures of `moe-bench roofline`, from its rows and those of `moe-bench kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_engine.bench import plots
from moe_engine.bench.gpus import GPUS, Gpu
from moe_engine.bench.runner import newest
from moe_engine.bench.scaling import HOST
from moe_engine.train.errors import InputError

COLORS = (plots.BLUE, plots.GREEN, plots.ORANGE, plots.RED, plots.VIOLET, plots.MUTED, plots.INK)
MARKERS = "osD^vP*Xh"


def _projected(rows: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The newest rows of this command of a kind."""
    found = [r for r in newest(rows) if r["benchmark"] == "roofline" and r["settings"]["kind"] == kind]
    if not found:
        raise InputError(f"rows: expected some of moe-bench roofline, kind {kind}, got none")
    return found


def measured_points(rows: Sequence[dict[str, Any]], gpu: Gpu) -> list[dict[str, Any]]:
    """Rows of `moe-bench kernels` of our kernels that have a time, FLOPs and bytes on such a card.

    An A100's name says which of the two it is; the memory of the others is one size.
    """
    size = gpu.name.split()[1]
    other_sizes = {g.name.split()[1] for g in GPUS.values() if g.match == gpu.match} - {size}
    return [
        row
        for row in newest(rows)
        if row["benchmark"] == "kernels"
        and gpu.match in row["device"]
        and not any(f"{other}GB" in row["device"] for other in other_sizes)
        and "triton" in row["name"]
        and all(row.get(key) for key in ("p50", "flops", "bytes"))
    ]


def _roof(axes: Any, gpu: Gpu, shares: tuple[float, float], span: tuple[float, float]) -> None:
    """The card's peaks, and those at the efficiencies, broken."""
    for compute, memory, style, label in (
        (1.0, 1.0, "-", "data sheet"),
        (*shares, "--", f"{100 * shares[0]:g} % FLOP/s, {100 * shares[1]:g} % bandwidth"),
    ):
        ridge = compute * gpu.peak / (memory * gpu.bandwidth)
        x = sorted({*span, min(max(ridge, span[0]), span[1])})
        y = [min(compute * gpu.peak, memory * gpu.bandwidth * i) / 1e12 for i in x]
        axes.plot(x, y, style, color=plots.INK if style == "-" else plots.MUTED, linewidth=1.3, label=label)


def _grid(title: str, note: str, count: int) -> tuple[Any, list[Any]]:
    """A figure with so many axes, three to a line."""
    columns = min(3, count)
    lines = -(-count // columns)
    size = (max(7.5, 4.2 * columns), 0.9 + 3.9 * lines)
    figure, grid = plots.figure(title, note, rows=lines, columns=columns, size=size, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:count])


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The roofline: FLOP/s over FLOPs per byte, an axes for each card.

    Open marks are projected bounds of launches that compute matrix products, on the roof of the data sheet. Filled ones
    are rows of `moe-bench kernels` that were measured on that card. Of several layers it is the last.

    Args:
        path: PNG file.
        rows: as read from JSONL; those of other commands are passed over.
    Raises:
        InputError: there are no projected launches among them.
    """
    launches = [row for row in _projected(rows, "launch") if row["flops"]]
    launches = [row for row in launches if row["settings"] == launches[-1]["settings"]]  # of one layer
    cards = list(dict.fromkeys(row["card"] for row in launches))
    names = list(dict.fromkeys(row["name"] for row in launches))
    first = launches[0]["settings"]
    note = f"open: projected bounds of layer {first['layer']}, {first['tokens']} tokens; filled: measured, if any"
    figure, grid = _grid("Roofline of the MoE layer, projected", note, len(cards))
    for axes, card in zip(grid, cards, strict=True):
        gpu, own = GPUS[card], [row for row in launches if row["card"] == card]
        points = measured_points(rows, gpu)
        intensities = [row["flops"] / row["bytes"] for row in [*own, *points]]
        shares = own[0]["settings"]["efficiency"], own[0]["settings"]["bandwidth_efficiency"]
        _roof(axes, gpu, shares, (min([*intensities, 1]) / 2, max([*intensities, 1000]) * 2))
        for row in own:
            number = names.index(row["name"])
            x = row["flops"] / row["bytes"]
            style = {
                "marker": MARKERS[number % len(MARKERS)],
                "color": COLORS[number % len(COLORS)],
                "linestyle": "none",
            }
            y = row["flops"] / row["seconds_at_peak"] / 1e12
            axes.plot([x], [y], label=row["name"], markerfacecolor="white", markersize=7, **style)
        for number, row in enumerate(points):
            label = {"label": "measured"} if number == 0 else {}
            x, y = row["flops"] / row["bytes"], row["flops"] / row["p50"] / 1e12
            axes.plot([x], [y], "o", color=plots.INK, markersize=5, **label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{gpu.name}, projected" + (" and measured" if points else ""), fontsize=10, color=plots.INK)
        plots.style(axes, "FLOP per byte", "TFLOP/s")
    grid[0].legend(frameon=False, fontsize=7.5, labelcolor=plots.INK, loc="lower right")
    plots.save(figure, path)


def draw_scaling(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Tokens per second of a card over the number of cards: communication hidden, and not hidden.

    Args:
        path: PNG file.
        rows: as read from JSONL; those of other commands are passed over.
    Raises:
        InputError: there are no projected numbers of cards among them.
    """
    found = _projected(rows, "scaling")
    first = found[0]["settings"]
    batch = " × ".join(str(first[name]) for name in ("batch_size", "block_size", "grad_accum_steps"))
    note = f"{first['preset']}, {batch} tokens a card, which stays fixed; shaded: from no communication hidden to all"
    cards = list(dict.fromkeys(row["card"] for row in found))
    figure, grid = _grid("Scaling over cards, projected", note, len(cards))
    for axes, card in zip(grid, cards, strict=True):
        own = sorted((row for row in found if row["card"] == card), key=lambda row: row["settings"]["gpus"])
        for name, color in (("FSDP2", plots.BLUE), ("HSDP", plots.GREEN)):
            if not any(row["name"] == name for row in own):
                continue
            # On one host both are the same.
            line = [row for row in own if row["name"] == name or row["settings"]["gpus"] <= HOST]
            x = [row["settings"]["gpus"] for row in line]
            low, high = ([row[key] / row["settings"]["gpus"] / 1e3 for row in line] for key in ("exposed", "hidden"))
            axes.plot(x, high, color=color, linewidth=1.4, marker="o", markersize=4, label=name)
            axes.plot(x, low, color=color, linewidth=1, linestyle=":", marker="o", markersize=3)
            axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(f"{GPUS[card].name}, projected", fontsize=10, color=plots.INK)
        plots.style(axes, "cards", "thousand tok/s a card")
        if axes.lines:
            axes.legend(frameon=False, fontsize=9, labelcolor=plots.INK, loc="lower left")
    plots.save(figure, path)
