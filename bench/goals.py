"""Measured speed against the guide's targets: which row a machine is held to, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_engine.bench.gpus import gpu_of
from moe_engine.bench.runner import make_row
from moe_engine.bench.targets import GUIDE, MOONSHOT, Target
from moe_engine.train.device import data_sheet_peak, device_name, memory_total

UNCHECKED = 3
"""Exit status where no target could be checked."""


def target_name(target: Target) -> str:
    """As `--target` has it."""
    return target.file.removesuffix(".toml")


def best_target(name: str, memory: float, ranks: int) -> Target | None:
    """The row that a machine is held to: its own card's, else that of the largest A100 that it has the memory of.

    Args:
        name: of the device.
        memory: of the device, bytes.
        ranks: devices that are used.
    Returns:
        None where no row has as many devices or so little memory, or the device's peak is not known.
    """
    rows = [target for target in GUIDE if target.ranks == ranks]
    if data_sheet_peak(name) is None:
        return None
    card = gpu_of(name, memory)
    own = [target for target in rows if target.card is card]
    smaller = [target for target in rows if target.card.memory <= 1.15 * memory]
    return own[0] if own else max(smaller, key=lambda target: target.card.memory, default=None)


def judge(target: Target, name: str, memory: float, speed: float) -> dict[str, Any]:
    """A speed against a row.

    On another card than the row's the target is scaled by peak FLOP/s, and so is the moonshot where there is none for
    the card.

    Args:
        name, memory: of the device.
        speed: tokens per second over all ranks.
    """
    exact = gpu_of(name, memory) is target.card
    scale = 1.0 if exact else (data_sheet_peak(name) or 0.0) / target.card.peak
    goal = scale * target.tokens_per_second
    by_card = next((value * target.ranks for part, value in MOONSHOT.items() if part in name), None)
    moonshot = scale * target.moonshot if by_card is None else by_card
    return {
        "verdict": "PASS" if speed >= goal else "FAIL",
        "measured": speed,
        "target": goal,
        "ratio": speed / goal,
        "scaled": not exact,
        "moonshot": moonshot,
        "moonshot_ratio": speed / moonshot,
    }


def target_rows(
    device: torch.device, chosen: str | None, settings: Mapping[str, Any], speed: float
) -> list[dict[str, Any]]:
    """A row for each of the guide's: judged, or why not.

    Args:
        chosen: name of the row whose configuration was measured, if any.
        settings: of the measurement.
        speed: tokens per second over all ranks.
    """
    on_gpu = device.type == "cuda"
    rows = []
    for target in GUIDE:
        name, values = target_name(target), {"measured": None, "ratio": None, "scaled": False, "moonshot_ratio": None}
        values |= {"target": target.tokens_per_second, "moonshot": target.moonshot}
        if not on_gpu:
            values["verdict"] = "not checked: no GPU"
        elif name == chosen and data_sheet_peak(device_name(device)) is not None:
            values = judge(target, device_name(device), memory_total(device), speed)
        elif name == chosen:
            values["verdict"] = f"not checked: no peak known of {device_name(device)}"
        elif chosen is None and best_target(device_name(device), memory_total(device), settings["ranks"]) is target:
            values["verdict"] = "not checked: another configuration was run, see --target"
        else:
            values["verdict"] = f"not checked: needs {target.ranks} × {target.card.name}"
        of = dict(settings) if name == chosen else {"preset": "8b", "ranks": target.ranks}
        rows.append(make_row("targets", name, of, device, **values))
    return rows


def merge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of several rows of one target the first that was judged, else the last."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["name"] not in found or found[row["name"]]["measured"] is None:
            found[row["name"]] = row
    return list(found.values())


def print_targets(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of `target_rows`, in tokens per second."""
    print(f"\n{'guide, 8b, tok/s':18}{'measured':>10}{'target':>10}{'ratio':>7}{'moonshot':>10}{'ratio':>7}  verdict")
    for row in rows:
        measured, ratio, far = (
            "–" if row[key] is None else form.format(row[key])
            for key, form in (("measured", "{:.0f}"), ("ratio", "{:.2f}"), ("moonshot_ratio", "{:.2f}"))
        )
        scaled = f" (target scaled by peak FLOP/s to {row['device']})" if row["scaled"] else ""
        print(
            f"{row['name']:18}{measured:>10}{row['target']:10.0f}{ratio:>7}{row['moonshot']:10.0f}{far:>7}"
            f"  {row['verdict']}{scaled}"
        )


def status(rows: Sequence[Mapping[str, Any]], allow_unchecked: bool) -> int:
    """Exit status: 1 if a target was missed, `UNCHECKED` if none was checked and that is not allowed, else 0."""
    verdicts = [row["verdict"] for row in rows]
    if "FAIL" in verdicts:
        return 1
    return 0 if "PASS" in verdicts or allow_unchecked else UNCHECKED
