"""The report's page, and the tables of what was measured: from rows of results to lines of Markdown and pictures."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_engine.bench.checkpoint import split
from moe_engine.bench.compare import flat
from moe_engine.bench.ranks import SHARED_CORES

Row = Mapping[str, Any]
Rows = Sequence[Row]
NONE = "–"


class Page:
    """Lines of Markdown, and what is to be drawn beside them.

    Attributes:
        lines: of the page.
        pictures: file name → function that draws it to a path.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.pictures: dict[str, Callable[[Path], None]] = {}

    def add(self, *lines: str) -> None:
        """A paragraph, list or table: its lines, and an empty one after."""
        self.lines += [*lines, ""]

    def table(self, headings: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> None:
        """A table whose first `left` columns are words and the others numbers."""
        rule = ["---"] * left + ["---:"] * (len(headings) - left)
        self.add(*("| " + " | ".join(cells) + " |" for cells in (headings, rule, *lines)))

    def picture(self, benchmark: str, rows: Rows, alt: str, module: str = "", function: str = "draw") -> None:
        """What a benchmark's module draws from rows, by its function `draw(path, rows)`.

        Pictures of one name are numbered from the second on: the first keeps its name while rows are added.

        Args:
            benchmark: name of the picture.
            rows: as read from JSONL.
            alt: what it shows.
            module, function: in `bench/`, where they are not `benchmark` and `draw`.
        """
        number = 1
        while (name := f"{benchmark}_{number}.png" if number > 1 else f"{benchmark}.png") in self.pictures:
            number += 1
        draw = getattr(importlib.import_module(f"moe_engine.bench.{module or benchmark}"), function)
        self.pictures[name] = lambda path: draw(path, rows)
        self.add(f"![{alt}]({name})")

    def without_time(self, rows: Rows) -> None:
        """The rows that have no time, by their reason."""
        reasons: dict[str, list[str]] = {}
        for row in rows:
            if row.get("p50") is None:
                reasons.setdefault(row.get("status") or "not timed", []).append(row["name"])
        if reasons:
            self.add(*(f"- {'; '.join(names)}: {reason}" for reason, names in reasons.items()))


def caption(row: Row, apart: Sequence[str] = ()) -> str:
    """Settings of a row in words, and its device; rows that have the same are of one run.

    Args:
        apart: settings in which the rows of one run differ; `device` too where they differ in that.
    """
    settings = flat({key: value for key, value in row["settings"].items() if key not in apart})
    words = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None and value is not False)
    return "; ".join(part for part in (words, "" if "device" in apart else row["device"]) if part)


def groups(rows: Rows, apart: Sequence[str] = ()) -> dict[str, list[Row]]:
    """Caption → rows of a run, in the order of their first appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(caption(row, apart), []).append(row)
    return found


def number(value: float | None, scale: float = 1.0, form: str = ".4g") -> str:
    """A value in another unit; a dash where there is none."""
    return NONE if value is None else format(value * scale, form)


def times(row: Row) -> list[str]:
    """p50, p20 to p80 and the band; p50 has to be there."""
    spread = f"{number(row.get('p20'), 1e3)} to {number(row.get('p80'), 1e3)}"
    return [number(row["p50"], 1e3), spread, f"± {number(row.get('band'), 100, '.0f')} %"]


def timed(rows: Rows) -> list[Row]:
    """Those with a time."""
    return [row for row in rows if row.get("p50") is not None]


TIMES = ("p50 ms", "p20 to p80 ms", "band")


def layer(page: Page, rows: Rows) -> None:
    """Time, peak and saved bytes of one MoE layer, against peers."""
    page.add(
        "One MoE layer, forward and backward; what differs from the fp64 reference has no time. `× BLAS`: against",
        "the bare matrix products in the same run. Saved: kept from forward for backward.",
    )
    for title, run in groups(rows, apart=("style", "save")).items():
        page.add(f"**{title}**")
        if timed(run):
            page.table(("", *TIMES, "× BLAS", "GFLOP/s", "peak MB", "saved B/token"), map(_layer_line, timed(run)))
        page.without_time(run)
        if timed(run):
            page.picture("layer", run, f"Time and saved bytes of a layer: {title}")


def _layer_line(row: Row) -> list[str]:
    flops, tokens = row.get("flops"), row["settings"].get("tokens")
    rate = None if flops is None else flops / row["p50"]
    saved = None if row.get("saved_bytes") is None or not tokens else row["saved_bytes"] / tokens
    figures = [number(row.get("ratio"), 1, ".3f"), number(rate, 1e-9, ",.0f")]
    return [row["name"], *times(row), *figures, number(row.get("peak_bytes"), 1e-6), number(saved, 1, ",.0f")]


def throughput(page: Page, rows: Rows) -> None:
    """Training steps: time, tokens per second, memory, and where the time goes."""
    page.add("Steps of the real training loop: data, forward, backward, optimizer.")
    for title, run in groups(rows, apart=("ranks",)).items():
        page.add(f"**{title}**")
        if timed(run):
            headings = ("training step", *TIMES, "tokens/s", "MFU", "GB a rank", "relative speed")
            page.table(headings, map(_step_line, timed(run)))
        baselines = dict.fromkeys(row["baseline"] for row in run if row.get("baseline"))
        if baselines:
            page.add(f"Relative speed: the median of ratios of steps side by side, against {', '.join(baselines)}.")
        page.without_time(run)
        split = [row for row in run if row.get("parts")]
        if split:
            names = list(dict.fromkeys(name for row in split for name in row["parts"]))
            page.add("Share of a step in %, from a few steps apart from those that were timed:")
            page.table(("", *names), ([_model(row), *_shares(row["parts"], names)] for row in split))
        if timed(run):
            page.picture("throughput", run, f"Training steps: {title}")


def _model(row: Row) -> str:
    ranks = row["settings"].get("ranks", 1)
    return row["name"] + (f", {ranks} ranks" if ranks > 1 else "")


def _rate(row: Row) -> float | None:
    if row.get("tokens_per_second") is not None:
        return row["tokens_per_second"]
    return None if row.get("tokens") is None or row.get("p50") is None else row["tokens"] / row["p50"]


def _step_line(row: Row) -> list[str]:
    mfu = NONE if row.get("mfu") is None else f"{row['mfu']:.1%}"
    figures = [number(_rate(row), 1, ",.0f"), mfu]
    return [
        _model(row),
        *times(row),
        *figures,
        number(row.get("memory"), 1e-9, ".2f"),
        number(row.get("ratio"), 1, ".2f"),
    ]


def _shares(parts: Mapping[str, float], names: Sequence[str]) -> list[str]:
    whole = sum(parts.values()) or 1.0
    return [number(parts.get(name), 100 / whole, ".1f") for name in names]


def scaling(page: Page, rows: Rows) -> None:
    """Tokens per second over the number of ranks."""
    for title, run in groups(timed(rows), apart=("ranks",)).items():
        run = sorted(run, key=lambda r: (r["name"], r["settings"].get("ranks", 1)))
        if len({r["settings"].get("ranks", 1) for r in run}) > 1:
            page.add(f"**{title}**")
            first = {r["name"]: r for r in reversed(run)}
            headings = ("", "ranks", "p50 ms", "tokens/s", "of perfect scaling")
            page.table(headings, (_scaling_line(r, first[r["name"]]) for r in run))
            if any(r.get("threads") for r in run):
                page.add(f"On a CPU {SHARED_CORES}.")


def _scaling_line(row: Row, first: Row) -> list[str]:
    rate, base = _rate(row), _rate(first)
    ranks, fewest = row["settings"].get("ranks", 1), first["settings"].get("ranks", 1)
    share = None if rate is None or base is None else (rate / ranks) / (base / fewest)
    return [row["name"], str(ranks), number(row["p50"], 1e3), number(rate, 1, ",.0f"), number(share, 100, ".0f") + " %"]


def checkpoint(page: Page, rows: Rows) -> None:
    """Saving and loading: times, bandwidth, and the share of training time."""
    page.add(
        "Saves beside real training steps; a checkpoint came back bit for bit before anything was timed. `stall`: what",
        "training waits for. The share of training time is **derived** from the measured stall, the slowdown of the",
        "steps beside the writing, and `save_every` steps.",
    )
    for title, run in groups(rows).items():
        page.add(f"**{title}**")
        headings = ("", "p50 s", "p20 to p80 s", "band", "GB", "GB/s", "of it, s")
        page.table(headings, map(_checkpoint_line, timed(run)))
        shares = [row for row in run if row.get("derived")]
        page.add(*(f"- {r['name']}: {r['share']:.2%}, target < {r['target']:.0%}: {r['verdict']}" for r in shares))


def _checkpoint_line(row: Row) -> list[str]:
    spread = f"{number(row.get('p20'))} to {number(row.get('p80'))}"
    sizes = [number(row.get(name), 1e-9, ".2f") for name in ("bytes", "bandwidth")]
    band = f"± {number(row.get('band'), 100, '.0f')} %"
    return [row["name"], number(row["p50"]), spread, band, *sizes, split(row) or NONE]


def kernels(page: Page, rows: Rows) -> None:
    """Each operation by its kernel and by PyTorch, and the ceilings that they are held against."""
    page.add(
        "`of bound`: the time that an operation needs at the ceilings, measured in the same run, over the time",
        "that it takes.",
    )
    ceilings = [row for row in timed(rows) if row.get("fraction") is None]
    if ceilings:
        page.add(*(f"- {row['name']}: {_achieved(row)} ({caption(row)})" for row in ceilings))
    for title, run in groups([row for row in rows if row not in ceilings]).items():
        page.add(f"**{title}**")
        ops: dict[str, dict[str, Row]] = {}
        for row in timed(run):
            op, _, made = row["name"].partition(", ")
            ops.setdefault(op, {})[made] = row
        made_by = list(dict.fromkeys(made for by in ops.values() for made in by))
        headings = [text for made in made_by for text in (f"{made} ms", "of bound")]
        if ops:
            page.table(("", *headings), ([op, *_op_cells(by, made_by)] for op, by in ops.items()))
        page.without_time(run)
    drawn = [row for row in rows if row.get("fraction") is not None]
    if drawn:
        page.picture("kernels", drawn, "Share of its bound that each operation reaches")


def _achieved(row: Row) -> str:
    units = {"flops": "GFLOP/s", "bytes": "GB/s"}
    return ", ".join(f"{row[key] / row['p50'] / 1e9:,.4g} {unit}" for key, unit in units.items() if row.get(key))


def _op_cells(by: Mapping[str, Row], made_by: Sequence[str]) -> list[str]:
    cells = []
    for row in map(by.get, made_by):
        cells += [NONE, NONE] if row is None else [f"{times(row)[0]} {times(row)[2]}", f"{row['fraction']:.0%}"]
    return cells


def targets(page: Page, rows: Rows) -> None:
    """The guide's table."""
    page.add(
        "The guide's rows are 6 to 23 % of the cards' peak. Its training times are another matter: they need 200",
        "to 340 % of peak and are impossible; the arithmetic is in",
        "[the README](../../README.md#what-the-guide-promises-and-physics-does-not).",
    )
    headings = ("", "device", "measured tokens/s", "target", "of target", "moonshot", "of moonshot", "verdict")
    # What was judged stands until it is judged again, and not until the next run of something else.
    by_time = sorted(rows, key=lambda row: (row.get("measured") is not None, row["time"]))
    latest = {(row["name"], row["device"]): row for row in by_time}
    page.table(headings, map(_target_line, latest.values()), left=2)
    if any(row.get("scaled") for row in latest.values()):
        page.add("A target with * is that of another card, scaled by the peaks of both.")


def _target_line(row: Row) -> list[str]:
    measured, pairs = row.get("measured"), []
    for name in ("target", "moonshot"):
        value = row.get(name)
        share = None if measured is None or not value else measured / value
        star = "*" if row.get("scaled") and name == "target" else ""
        pairs += [number(value, 1, ",.0f") + star, number(share, 1, ".2f")]
    return [row["name"], row["device"], number(measured, 1, ",.0f"), *pairs, row.get("verdict") or NONE]
