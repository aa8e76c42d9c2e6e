"""Tables and a picture of the rows of `moe-bench throughput`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_engine.bench import plots
from moe_engine.bench.parts import PARTS
from moe_engine.bench.ranks import SHARED_CORES
from moe_engine.train.errors import InputError

COLORS = dict(
    zip(
        PARTS,
        (plots.GREEN, plots.VIOLET, plots.BLUE, plots.ORANGE, plots.INK, plots.RED, plots.MUTED, plots.LIGHT),
        strict=True,
    )
)
"""A part has the same colour in every picture."""


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Tables of speeds and of parts."""
    first, what = rows[0], rows[0]["settings"]
    accumulated = f" × {what['grad_accum_steps']} micro-steps" if what["grad_accum_steps"] > 1 else ""
    if "configured_grad_accum_steps" in what:
        accumulated += f" (the configuration has {what['configured_grad_accum_steps']})"
    print(
        f"{what['preset']}, {what['batch_size']} × {what['block_size']} tokens{accumulated} a rank, {what['dtype']}, "
        f"{what['optimizer']}, checkpointing {what['checkpointing']}, {what['data']}, {first['device']}, "
        f"memory setting {what['memory']}; gradients of a cut of the model are {first['gradient_error']:.1e} off fp64"
    )
    compared = "ratio" in first
    last = f"  × {first['baseline']}" if compared else ""
    print(f"\n{'training step':36}{'ms p20':>9}{'p50':>9}{'p80':>9}{'tok/s':>9}{'MFU':>7}{'GB a rank':>11}{last}")
    for row in rows:
        times = "".join(f"{1e3 * row[p]:9.1f}" for p in ("p20", "p50", "p80"))
        mfu = "–" if row["mfu"] is None else f"{row['mfu']:.1%}"
        ratio = f"{row['ratio']:8.2f}" if compared else ""
        speed = f"{row['tokens_per_second']:9.0f}{mfu:>7}{row['memory'] / 1e9:11.2f}"
        print(f"{label(row):36}{times}{speed}{ratio}")
    if split := [row for row in rows if row["parts"]]:
        in_backward = "; the optimizer's steps are made in backward" if what["optimizer_in_backward"] else ""
        print(f"\n{'ms of a step, by part':36}" + "".join(f"{part:>14}" for part in PARTS) + f"{'sum':>9}{in_backward}")
        for row in split:
            times = "".join(f"{1e3 * row['parts'][part]:14.1f}" for part in PARTS)
            print(f"{label(row):36}{times}{1e3 * sum(row['parts'].values()):9.1f}")
    if "efficiency" in first:
        print(f"\n{'ranks':36}{'tok/s':>9}{'efficiency':>12}{'threads a rank':>16}")
        for row in rows:
            ranks, threads = row["settings"]["ranks"], "–" if row["threads"] is None else row["threads"]
            print(f"{ranks:<36}{row['tokens_per_second']:9.0f}{row['efficiency']:12.2f}{threads:>16}")
        if first["threads"] is not None:
            print(f"on a CPU {SHARED_CORES}")


def label(row: dict[str, Any]) -> str:
    """What a row is called beside others."""
    ranks = row["settings"]["ranks"]
    return row["name"] + (f", {ranks} ranks" if ranks > 1 else "")


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Bars of the parts of a step, stacked, and of tokens per second, of the rows of `throughput` among those given.

    Raises:
        InputError: there are none.
    """
    rows = [row for row in rows if row["benchmark"] == "throughput"]
    if not rows:
        raise InputError(f"{path}: expected rows of moe-bench throughput to draw, got none")
    what, names = rows[0]["settings"], [label(row) for row in rows]
    note = f"{what['preset']}, {what['batch_size']} × {what['block_size']} tokens, {what['dtype']}, {rows[0]['device']}"
    split = any(row["parts"] for row in rows)
    options = {"sharey": True, "width_ratios": (3, 2)} if split else {}
    size = (11.0, 2.2 + 0.45 * len(rows))
    figure, grid = plots.figure("Training steps", note, columns=1 + split, size=size, squeeze=False, **options)
    *of_parts, of_speed = grid[0]
    for axes in of_parts:
        _draw_parts(axes, rows)
    speed = [row["tokens_per_second"] for row in rows]
    plots.bars(of_speed, names, speed, xlabel="tokens per second")
    plots.save(figure, path)


def _draw_parts(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """A stacked bar for each row that was split."""
    parts = {part: [1e3 * (row["parts"] or {}).get(part, 0.0) for row in rows] for part in COLORS}
    plots.stacked(axes, parts, COLORS, "ms of a step, by part")
