"""The report's tables of what was counted or projected, and not timed."""

from __future__ import annotations

from moe_engine.bench import modes
from moe_engine.bench.report_tables import NONE, Page, Row, Rows, caption, groups, number
from moe_engine.memory import KINDS


def memory(page: Page, rows: Rows) -> None:
    """Peak bytes of a device by kind."""
    page.add(
        "Peak of one device in GB (10⁹ bytes), counted under fake tensors and not measured; `with fragments`: what the",
        "allocator is expected to hold.",
    )
    headings = ("", "batch × block", "ranks", *KINDS, "total", "with fragments", "allowed", "verdict")
    page.table(headings, map(_memory_line, rows), left=2)
    page.picture("memory", rows, "Peak memory of a training step by kind")


def _memory_line(row: Row) -> list[str]:
    settings, parts = row["settings"], row.get("bytes") or {}
    name = row["name"] + (f", {row['card']}" if row.get("card") else "")
    sizes = [*(parts.get(kind) for kind in KINDS), row.get("total"), row.get("reserved")]
    batch = f"{settings.get('batch_size')} × {settings.get('block_size')}"
    verdict = [number(row.get("required"), 1, "g"), row.get("verdict") or NONE]
    return [name, batch, str(settings.get("ranks")), *(number(size, 1e-9, ".1f") for size in sizes), *verdict]


TILES = ("arch", "constants", "warps", "stages")


def code(page: Page, rows: Rows) -> None:
    """What the compiler made of the kernels: two lines for each card."""
    for title, run in groups(rows, apart=(*TILES, "device")).items():
        page.add(f"**{title}**")
        lines = []
        for arch, found in _by_arch(run).items():
            most = max(found, key=lambda r: r.get("registers", 0))
            spilled = [r for r in found if r.get("stack") or r.get("spill_loads") or r.get("spill_stores")]
            shared = max(found, key=lambda r: r.get("shared", 0))
            names = ", ".join(dict.fromkeys(r["name"] for r in spilled))
            broken = sum(bool(r.get("violations")) for r in found)
            lines += [
                f"- **{arch}**: {len(found)} kernels; most registers of a thread {most.get('registers')}"
                f" ({most['name']}),",
                f"  most shared memory of a block {shared.get('shared', 0) / 1024:.0f} KB ({shared['name']});"
                f" stack or spills in {len(spilled)}{names and f' ({names})'}, rules broken by {broken}.",
            ]
        page.add(*lines)


def _by_arch(rows: Rows) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("default", True):
            card = row["device"].removeprefix("none, compiled for ")
            found.setdefault(f"{row['settings'].get('arch')} ({card})", []).append(row)
    return found


def traffic(page: Page, rows: Rows) -> None:
    """Bytes of a layer's launches over the floor."""
    page.add("Bytes that the launches read and write over the floor, in which each touches each of its tensors once:")
    lines = []
    for row in rows:
        moved, floor = row.get("bytes") or {}, row.get("floor") or {}
        launches = [sum(one["phase"] == phase for one in row.get("launches") or ()) for phase in floor]
        ratios = [f"{moved[phase] / floor[phase]:.3f}" for phase in floor]
        lines.append([caption(row), *ratios, " + ".join(map(str, launches))])
    page.table(("", "forward", "backward", "launches"), lines)


def training_modes(page: Page, rows: Rows) -> None:
    """What ways to save memory do to the loss."""
    page.add(modes.TABLE_HEAD, *map(modes.table_line, rows))


ARRANGEMENT = ("device", "kind", "gpus", "replicas", "link", "network", "tokens", "price")
"""In what the projections of one run differ."""


def roofline(page: Page, rows: Rows) -> None:
    """Bounds on paper: the picture, tokens per second, cards, days and dollars."""
    page.add(
        "All of it is **projected** from FLOPs, bytes and data sheets; only filled",
        "marks in the picture, if there are any, were measured.",
    )
    own = [row for row in rows if row["benchmark"] == "roofline"]
    if any(row["settings"].get("kind") == "launch" for row in own):
        page.picture("roofline", rows, "Roofline of the layer's launches, projected")
    for title, run in groups(own, apart=ARRANGEMENT).items():
        kinds = {kind: [r for r in run if r["settings"].get("kind") == kind] for kind in ("step", "scaling", "budget")}
        if any(kinds.values()):
            page.add(f"**{title}**")
        if kinds["step"]:
            headings = ("projected tokens/s of one card", "at 100 % of its peaks", "at efficiency", "MFU then")
            page.table(headings, map(_projected_step, kinds["step"]))
        if kinds["scaling"]:
            headings = (
                "projected",
                "cards",
                "replicas",
                "link, network GB/s",
                "tokens a step",
                "tokens/s, communication hidden",
            )
            page.table((*headings, "not hidden"), map(_projected_scaling, kinds["scaling"]))
            page.picture("scaling", run, f"Scaling over cards, projected: {title}", "roofline", "draw_scaling")
        if kinds["budget"]:
            headings = (
                "projected",
                "tokens",
                "GPU-hours at 100 % of peak",
                "of this run",
                "price of an hour",
                "of this run",
            )
            page.table(headings, map(_projected_budget, kinds["budget"]), left=2)


def _card(row: Row) -> str:
    return row["device"].removeprefix("none, projected for ")


def _projected_step(row: Row) -> list[str]:
    rates = [number(row.get(name), 1, ",.0f") for name in ("tokens_per_second_at_peak", "tokens_per_second")]
    return [_card(row), *rates, NONE if row.get("mfu") is None else f"{row['mfu']:.0%}"]


def _projected_scaling(row: Row) -> list[str]:
    given = row["settings"]
    links = ", ".join(number(given.get(name), 1e-9, "g") for name in ("link", "network"))
    rates = [number(row.get(name), 1, ",.0f") for name in ("hidden", "exposed")]
    cards = [str(given.get("gpus")), str(given.get("replicas"))]
    return [f"{_card(row)}, {row['name']}", *cards, links, number(row.get("tokens"), 1, ","), *rates]


def _projected_budget(row: Row) -> list[str]:
    hours = [number(row.get(name), 1, ",.0f") for name in ("hours_at_peak", "hours")]
    dollars = [number(row["settings"].get("price"), 1, ".2f"), number(row.get("dollars"), 1, ",.0f")]
    return [_card(row), row["name"], *hours, *(f"${value}" for value in dollars)]
