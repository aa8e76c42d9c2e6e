"""Training steps of a preset: tokens per second, MFU, memory, what each part takes; peers, and the guide's targets.

    moe-bench throughput                      on a CPU `tiny`; on a GPU the configuration of the guide's row for it
    moe-bench throughput --ranks 1 2          the same on 1 and on 2 processes, sharded over them, and what that gains
    moe-bench throughput --preset small --checkpointing block --data_dir DATA

A round is one optimizer step of `moe-train`. Loss and gradients of a cut of the model are held against fp64 before
anything is timed, and peers against ours: what is wrong gets no time. The split into parts is of steps taken after the
timed ones. Options of moe-train that are about learning rate, logs and checkpoints change nothing here. MFU counts
6 × active matrix parameters and the attention scores, and no recomputation.

On a CPU in fp32 the peers are transformers' Mixtral and a plain loop over the experts, in Mixtral's manner as ours is
then too: each in a process of its own, interleaved, one at a time. `--memory own` gives each the C library's memory
setting that its users have, `--memory same` that of `moe-train` to all.

Exit status: 0 all well; 1 a wrong result, or a target missed; 2 a bad option; 3 no target could be checked here and
--allow_unchecked was not given.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_engine.bench import steps
from moe_engine.bench.checks import WRONG, WrongResult, check_exact
from moe_engine.bench.goals import merge, print_targets, status, target_rows
from moe_engine.bench.parts import PARTS
from moe_engine.bench.plan import Flags, Plan, make_plan, settings_of
from moe_engine.bench.ranks import add_efficiency, check_counts, over_ranks
from moe_engine.bench.runner import append_rows, check_writable, interleave, make_row
from moe_engine.bench.speeds import draw, print_rows
from moe_engine.train import memory, parallel
from moe_engine.train.cli import guarded, parse
from moe_engine.train.device import peak_flops, pick_device
from moe_engine.train.errors import InputError
from moe_engine.train.parallel import World
from moe_engine.train.shards import read_meta


def _over_ranks(value: float, device: torch.device, operation: dist.ReduceOp.RedOpType) -> float:
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, operation)
    return float(tensor)


def _run(plan: Plan) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]], float | None]:
    """Seconds of every round and reports by name, and the peak of all ranks in FLOP/s."""
    contestants: dict[str, Any] = {}
    try:
        for name in plan.names:
            if len(plan.names) == 1:
                contestants[name] = steps.Ours(name, plan.config, plan.world, plan.device)
            else:
                contestants[name] = steps.Remote(name, plan.config, plan.memory == "same")
        # By the clock also on a GPU: a step ends when the device is done.
        seconds = interleave(contestants, plan.rounds)
        reports = {name: contestant.report(plan.part_steps) for name, contestant in contestants.items()}
        for report in reports.values():
            report["memory"] = int(_over_ranks(report["memory"], plan.device, dist.ReduceOp.MAX))
        # By now all ranks are here: on a CPU they share what they measure.
        peak, _ = peak_flops(plan.device, plan.dtype)
        return seconds, reports, None if peak is None else _over_ranks(peak, plan.device, dist.ReduceOp.SUM)
    finally:
        for contestant in contestants.values():
            contestant.close()
        parallel.stop()


def measure(plan: Plan) -> list[dict[str, Any]]:
    """Check, time, split; returns a row for each contestant.

    Raises:
        WrongResult: one of them computes something else.
        InputError: there is too little memory.
    """
    model = plan.config.model_config(read_meta(plan.config.data_dir).vocab_size)
    try:
        error = check_exact(model, plan.config, plan.device, plan.dtype)
        if len(plan.names) > 1:
            steps.check_peers(plan.names, model)
        seconds, reports, peak = _run(plan)
    except RuntimeError as failure:
        if not memory.ran_out(failure):
            raise
        raise InputError(f"out of memory ({str(failure).splitlines()[0]}); lower --batch_size") from failure
    config = plan.config
    tokens = config.batch_size * config.block_size * config.grad_accum_steps * plan.world.size
    names = list(seconds)
    grouped = next(iter(steps.TRANSFORMERS))
    baseline = grouped if grouped in names else names[-1]
    rows = []
    for name in names:
        speed = tokens / float(np.median(seconds[name]))
        plain = name != steps.OURS
        flops = (replace(model, **steps.MIXTRAL_STYLE) if plain else model).flops_per_token(config.block_size)
        split = reports[name]["parts"]
        values = {
            "tokens": tokens,
            "tokens_per_second": speed,
            "mfu": None if peak is None else speed * flops / peak,
            "memory": reports[name]["memory"],
            "gradient_error": error if not plain else None,
            "parts": {part: float(np.mean([s[part] for s in split])) for part in PARTS} if split else None,
        }
        if len(names) > 1:
            # The median of ratios of steps taken side by side, not a ratio of medians.
            ratio = float(np.median(seconds[baseline] / seconds[name]))
            values |= {"baseline": baseline, "ratio": ratio}
        rows.append(make_row("throughput", name, settings_of(plan), plan.device, seconds[name], **values))
    return rows


def _measured(given: dict[str, Any], world: World) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of speeds and of targets of this process, or of the ones it is among."""
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(given, world, Path(folder))
        for name in plan.missing:
            print(f"{name}: not installed (pip install 'transformers>=5')")
        rows = measure(plan)
    return rows, target_rows(plan.device, plan.target, rows[0]["settings"], rows[0]["tokens_per_second"])


def throughput(given: dict[str, Any]) -> int:
    """Measure as the options given say, print, write; returns the exit status."""
    given, world = dict(given), World.from_environment()
    extra = {name: given.pop(name, None) for name in ("ranks", "allow_unchecked", "output", "picture")}
    if world.is_main:
        check_writable(output=extra["output"], picture=extra["picture"])
    if extra["ranks"]:
        if world.size > 1:
            raise InputError("--ranks: expected no torchrun around it, which it starts itself")
        if given.get("peers"):
            raise InputError("--peers: expected no --ranks, whose processes they would disturb")
        on_gpu = pick_device(given.get("device", "auto")).type == "cuda"
        check_counts(extra["ranks"], on_gpu)
        if on_gpu and len(set(extra["ranks"])) > 1 and not ("preset" in given or given.get("config")):
            raise InputError("--ranks: expected --preset or --config with several numbers, which are to run the same")
        child = {**given, "peers": False, "allow_unchecked": True}
        every = over_ranks("moe_engine.bench.throughput", extra["ranks"], child, on_gpu)
        rows = [row for row in every if row["benchmark"] == "throughput"]
        targets = merge([row for row in every if row["benchmark"] == "targets"])
        add_efficiency(rows)
    else:
        rows, targets = _measured(given, world)
    if world.is_main:
        if rows[0]["settings"]["data"] == steps.RANDOM:
            print("no --data_dir: batches are random token ids")
        print_rows(rows)
        print_targets(targets)
        if extra["output"]:
            append_rows(Path(extra["output"]), [*rows, *targets])
        if extra["picture"]:
            draw(Path(extra["picture"]), rows)
    return status(targets, bool(extra["allow_unchecked"]))


def _body(argv: Sequence[str] | None) -> int:
    try:
        return throughput(parse("moe-bench throughput", Flags, argv, __doc__ or ""))
    except WrongResult as error:
        print(f"error: {WRONG}{error}", file=sys.stderr)
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return guarded(lambda: _body(argv))


if __name__ == "__main__":
    sys.exit(main())
