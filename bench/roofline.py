"""What cards could do at best, on paper: nothing here is timed, and everything printed, stored or drawn is projected.

From FLOPs, bytes and data sheets: the bound of each launch of an MoE layer and of each part of a training step, the
time at 100 % of the card's peaks and at a stated efficiency, tokens per second beside the guide's targets, scaling over
cards with FSDP2 and HSDP, days and dollars, and the promises that no code could keep.

Takes the options of `moe-train` (or --config) for the run, and its own:

    moe-bench roofline --config configs/8b_8x80gb.toml --card a100-80gb h100 --gpus 8 64 512

Counting rules are in `work.py`, communication in `scaling.py`. FLOPs that are computed twice (checkpointing, attention
scores and logits in backward) take time; MFU does not count them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from moe_engine.bench import promises
from moe_engine.bench.gpus import GPUS, Gpu
from moe_engine.bench.projection import (
    Flags,
    Options,
    Run,
    assumed,
    both_times,
    ms,
    print_table,
    read_run,
    result,
    run_settings,
)
from moe_engine.bench.promises import HOUR, thousands
from moe_engine.bench.roofline_plots import draw, draw_scaling
from moe_engine.bench.runner import append_rows, changed, check_writable, read_rows
from moe_engine.bench.scaling import HOST, Projection, project
from moe_engine.bench.shapes import SHAPES
from moe_engine.bench.targets import CONFIGS
from moe_engine.bench.work import BACKWARD, FORWARD, PARTS, Work, layer_work, step_work, total_seconds
from moe_engine.config import MoEConfig
from moe_engine.train.cli import build, guarded, parse

BUDGETS = (10e9, 100e9)
"""Tokens whose days and dollars are told."""


# -- the layer --


def layer_rows(
    moe: MoEConfig, name: str, tokens: int, itemsize: int, options: Options, overrides: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Print a layer launch by launch for each detailed card, then forward and backward for every card.

    Args:
        name: of its shape or preset.
        overrides: settings of the row with which the layer is not what its name says.
    """
    works, rows, lines = layer_work(moe, tokens, itemsize), [], []
    given = {"layer": name, "tokens": tokens, "save": moe.save, "itemsize": itemsize, **overrides}
    headings = ("launch", "phase", "GFLOP", "MB", "FLOP/byte", "bound", "ms at 100 %", "ms at efficiency")
    for card in options.cards:
        gpu, table = GPUS[card], []
        for work in works:
            seconds = both_times([work], gpu, options)
            figures = (f"{work.flops / 1e9:.1f}", f"{work.bytes / 1e6:.1f}", f"{work.intensity:.1f}", work.bound(gpu))
            table.append((work.name, work.phase, *figures, *map(ms, seconds)))
            if card in options.detailed:
                values = {"part": work.part, "phase": work.phase, "flops": work.flops, "bytes": work.bytes}
                values |= {"bound": work.bound(gpu), "seconds_at_peak": seconds[0], "seconds_at_efficiency": seconds[1]}
                rows.append(result(card, "launch", work.name, given, options, **values))
        forward = [work for work in works if work.phase == FORWARD]
        phases = {FORWARD: forward, BACKWARD: [w for w in works if w.phase != FORWARD], "both": works}
        sums = {phase: both_times(part, gpu, options) for phase, part in phases.items()}
        table += [(f"sum, {phase}", "", "", "", "", "", *map(ms, seconds)) for phase, seconds in sums.items()]
        lines.append((gpu.name, *(ms(seconds) for pair in sums.values() for seconds in pair)))
        if card in options.detailed:
            print_table(f"MoE layer {name}, {tokens} tokens, {gpu.name}, {assumed(options)}", headings, table)
    short = [f"{phase} {how}" for phase in phases for how in ("100 %", "eff.")]
    print_table(f"MoE layer {name}, {tokens} tokens, ms by card, {assumed(options)}", ("card", *short), lines)
    return rows


# -- the step --


def _kind_of_bound(works: Sequence[Work], gpu: Gpu) -> str:
    """What limits most of a part's time at the card's peaks."""
    by_compute = total_seconds([work for work in works if work.bound(gpu) == "compute"], gpu)
    return "compute" if by_compute > total_seconds(works, gpu) / 2 else "memory"


def step_rows(run: Run, options: Options) -> list[dict[str, Any]]:
    """Print a step on one card part by part for each detailed card, then tokens per second for every card."""
    works = step_work(run.config, run.model, run.parameters, run.itemsize)
    counted, computed = sum(w.model_flops for w in works), sum(w.flops for w in works)
    headings = ("part", "TFLOP", "repeated", "GB", "bound", "ms at 100 %", "ms at efficiency", "share")
    rows, lines, given = [], [], run_settings(run)
    for card in options.cards:
        gpu, table = GPUS[card], []
        whole = both_times(works, gpu, options)
        for part in PARTS:
            inside = [work for work in works if work.part == part]
            flops, touched = sum(w.flops for w in inside), sum(w.bytes for w in inside)
            again, seconds = flops - sum(w.model_flops for w in inside), both_times(inside, gpu, options)
            figures = (f"{flops / 1e12:.2f}", f"{again / 1e12:.2f}", f"{touched / 1e9:.1f}")
            bound = _kind_of_bound(inside, gpu)
            table.append((part, *figures, bound, *map(ms, seconds), f"{100 * seconds[1] / whole[1]:.1f} %"))
            if card in options.detailed:
                values = {"flops": flops, "repeated": again, "bytes": touched, "bound": bound}
                values |= {"seconds_at_peak": seconds[0], "seconds_at_efficiency": seconds[1]}
                rows.append(result(card, "part", part, given, options, **values))
        mfu = [counted / seconds / gpu.peak for seconds in whole]
        rates = [run.tokens / seconds for seconds in whole]
        values = {
            "flops": computed,
            "model_flops": counted,
            "seconds_at_peak": whole[0],
            "seconds_at_efficiency": whole[1],
        }
        values |= {"tokens": run.tokens, "tokens_per_second_at_peak": rates[0], "tokens_per_second": rates[1]}
        rows.append(result(card, "step", "one card", given, options, **values, mfu_at_peak=mfu[0], mfu=mfu[1]))
        limit = thousands(run.tokens * gpu.peak / counted)
        percents = (f"{100 * share:.0f} %" for share in mfu)
        lines.append((gpu.name, limit, *map(thousands, rates), *percents))
        if card in options.detailed:
            sums = (f"{computed / 1e12:.2f}", f"{(computed - counted) / 1e12:.2f}", "", "", *map(ms, whole), "")
            print_table(f"Step of {run.name}, one {gpu.name}, {assumed(options)}", headings, [*table, ("step", *sums)])
    print("repeated: computed a second time (checkpointing; attention scores and logits in backward); not in the MFU.")
    short = ("card", "FLOPs alone", "roofline", "at efficiency", "MFU of roofline", "MFU at efficiency")
    print_table(f"Tokens per second of {run.name}, by card, {assumed(options)}", short, lines)
    return rows


# -- many cards --


def _arrangements(run: Run, gpus: int) -> list[int]:
    """Replicas to project: FSDP2 over all, and HSDP as asked for or with one host for each replica."""
    asked = run.config.dp_replicate
    if asked > 1:
        return [1, asked] if gpus > 1 else [1]
    return [1, gpus // HOST] if gpus > HOST and gpus % HOST == 0 else [1]


def scaling_rows(run: Run, options: Options) -> list[dict[str, Any]]:
    """Print tokens per second over numbers of cards for each detailed card, with communication hidden or not."""
    headings = ("cards", "replicas × shards", "tokens a step", "GB gathered", "reduced", "summed", "ms compute")
    headings += ("ms comm.", "tok/s hidden", "tok/s not", "of compute alone", "padding", "GB a card")
    rows = []
    for card in options.detailed:
        gpu, lines = GPUS[card], []
        links = options.links(gpu)
        for gpus in options.gpus:
            for replicas in _arrangements(run, gpus):
                p = project(run.config, run.model, gpu, gpus, replicas, links, *options.shares)
                lines.append(_scaling_line(p, gpu))
                name = "one card" if gpus == 1 else "FSDP2" if replicas == 1 else "HSDP"
                values = {"tokens": p.tokens, "compute": p.compute, "communication": p.communication}
                values |= dict(zip(("gathered", "reduced", "summed"), p.received, strict=True))
                values |= {
                    "hidden": p.tokens / p.hidden,
                    "exposed": p.tokens / p.exposed,
                    "memory": p.memory,
                    "padding": p.padding,
                }
                given = {"gpus": gpus, "replicas": replicas, "link": links.host, "network": links.network}
                rows.append(result(card, "scaling", name, run_settings(run) | given, options, **values))
        speeds = (
            f"links {links.host / 1e9:g} GB/s in a host of {HOST}, {links.network / 1e9:g} GB/s a card between hosts"
        )
        print_table(f"Scaling of {run.name}, {gpu.name}, {assumed(options)}, {speeds}", headings, lines)
    print("The batch of a card stays fixed (weak scaling), so a step has more tokens on more cards. GB: what a card")
    print(
        "receives in a step. hidden: all communication behind computation; not: none of it. padding: what is sent over"
    )
    print("what there is, where the ranks divide no dimension. GB a card: memory by formula, ! if that is too much.")
    return rows


def _scaling_line(p: Projection, gpu: Gpu) -> tuple[str, ...]:
    sizes = (f"{size / 1e9:.1f}" for size in p.received)
    rates = (thousands(p.tokens / seconds) for seconds in (p.hidden, p.exposed))
    share = f"{100 * p.compute / p.hidden:.0f}–{100 * p.compute / p.exposed:.0f} %"
    # Of padding the formula knows nothing.
    size = "?" if p.padding > 1.05 else f"{p.memory / 1e9:.1f}{'!' if p.memory > gpu.memory else ''}"
    first = (str(p.ranks), f"{p.replicas} × {p.ranks // p.replicas}", f"{p.tokens:,}")
    return (*first, *sizes, ms(p.compute), ms(p.communication), *rates, share, f"{p.padding:.2f}", size)


# -- days, dollars, promises --


def budget_rows(run: Run, options: Options) -> list[dict[str, Any]]:
    """Print days and dollars for every card, at its peak, at a share of it, and for the run as projected."""
    flops, rows, lines = run.model.flops_per_token(run.config.block_size), [], []
    works = step_work(run.config, run.model, run.parameters, run.itemsize)
    for card in options.cards:
        gpu = GPUS[card]
        seconds = [flops / gpu.peak, flops / gpu.peak / options.efficiency]
        seconds.append(total_seconds(works, gpu, *options.shares) / run.tokens)  # of a token
        for tokens in BUDGETS:
            hours = [tokens * s / HOUR for s in seconds]  # of one card, or of all together
            days = (f"{h / 24:.1f} / {h / 24 / HOST:.1f}" for h in hours)
            lines.append((gpu.name, f"{tokens / 1e9:.0f} B", *days, *(f"${options.price * h:,.0f}" for h in hours)))
            values = dict(zip(("hours_at_peak", "hours_at_share", "hours"), hours, strict=True))
            given = run_settings(run) | {"tokens": tokens, "price": options.price}
            cost = {f"dollars{name.removeprefix('hours')}": options.price * h for name, h in values.items()}
            rows.append(result(card, "budget", f"{tokens / 1e9:.0f} B tokens", given, options, **values, **cost))
    share = f"{100 * options.efficiency:g} % of peak"
    headings = ("card", "tokens", "days at peak", f"at {share}", "this run", "$ at peak", f"$ at {share}", "$ this run")
    title = f"Days on 1 / {HOST} cards, and dollars at ${options.price:.2f} a GPU-hour, {run.name}"
    print_table(f"{title}, {assumed(options)}, communication not counted", headings, lines)
    return rows


def print_promises(options: Options) -> None:
    """The guide's table of throughput and its training times beside what physics allows."""
    headings = ("configuration", "cards", "roofline", "at efficiency", "guide", "× guide", "moonshot", "of roofline")
    if CONFIGS.is_dir():
        table = promises.guide_table(options.links, *options.shares)
        title = f"The guide's rows in tokens per second, communication hidden, {assumed(options)}"
        print_table(title, headings, table)
    else:
        print("\nThe guide's rows need the folder of configurations, which only a source tree has; none projected.")
    lines = [*promises.times_table(options.price), *promises.rates_table()]
    title = (
        f"What the guide promises of {promises.MODEL} at block {promises.BLOCK}, A100, ${options.price:.2f} a GPU-hour"
    )
    print_table(title, ("the guide", "at 100 % of peak", "needs of peak", "verdict"), lines)


def roofline(run: Run, options: Options) -> int:
    """Print all tables, store and draw what was asked for."""
    moe = replace(SHAPES[options.shape], save=run.model.save) if options.shape else run.model.moe
    tokens = options.tokens or run.config.batch_size * run.config.block_size
    measured = read_rows(Path(options.rows)) if options.rows else []
    check_writable(output=options.output, picture=options.picture, scaling_picture=options.scaling_picture)
    print("Nothing below was measured: all of it is projected, from FLOPs, bytes and data sheets.")
    overrides = {} if options.shape else changed(run.config)
    rows = layer_rows(moe, options.shape or run.config.preset, tokens, run.itemsize, options, overrides)
    rows += step_rows(run, options) + scaling_rows(run, options) + budget_rows(run, options)
    print_promises(options)
    if options.output:
        append_rows(Path(options.output), rows)
    if options.picture:
        draw(Path(options.picture), [*rows, *measured])
    if options.scaling_picture:
        draw_scaling(Path(options.scaling_picture), rows)
    return 0


def _body(argv: Sequence[str] | None) -> int:
    given = parse("moe-bench roofline", Flags, argv, __doc__ or "")
    own = {f.name: given.pop(f.name) for f in fields(Options) if f.name in given}
    options = build(Options, own)
    return roofline(read_run(given, options.config), options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return guarded(lambda: _body(argv))


if __name__ == "__main__":
    sys.exit(main())
