"""Training steps of a preset: tokens per second, MFU, memory, what each part takes; peers, and the guide's targets.

    moe-bench throughput                      on a CPU `tiny`; on a GPU the configuration of the guide's row for it
    moe-bench throughput --ranks 1 2          the same on 1 and on 2 processes, each sharded, with what that gains
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

import importlib.metadata
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_engine.bench import steps
from moe_engine.bench.checks import WRONG, WrongResult, check_exact
from moe_engine.bench.goals import best_target, merge, print_targets, status, target_name, target_rows
from moe_engine.bench.parts import PARTS
from moe_engine.bench.ranks import add_efficiency, check_counts, over_ranks
from moe_engine.bench.runner import append_rows, interleave, make_row
from moe_engine.bench.speeds import draw, print_rows
from moe_engine.bench.targets import CONFIGS, GUIDE
from moe_engine.train import config as settings
from moe_engine.train import memory, parallel
from moe_engine.train.cli import guarded, parse
from moe_engine.train.config import TrainConfig
from moe_engine.train.device import device_name, memory_total, peak_flops, pick_device, pick_dtype
from moe_engine.train.errors import InputError
from moe_engine.train.options import option
from moe_engine.train.parallel import World
from moe_engine.train.shards import read_meta

MOST_MICRO_STEPS = 4
TARGETS = tuple(map(target_name, GUIDE))


@dataclass(frozen=True)
class Flags(TrainConfig):
    """`TrainConfig`, and how to measure."""

    config: str | None = option(None, "TOML file with options of moe-train")
    target: str = option(
        "auto", "row of the guide whose configuration to run; auto: this GPU's, without --preset and --config",
        choices=("auto", *TARGETS),
    )  # fmt: skip
    rounds: int | None = option(None, "timed steps of each (default: 30; 10 of 6b and 8b)")
    part_steps: int = option(5, "steps after them that are split into parts; 0: none")
    ranks: list[int] = option(default_factory=list, help="numbers of processes to run on, one after the other")
    peers: bool | None = option(None, "peers besides (default: true on a CPU, for tiny and small in fp32)")
    memory: str = option(
        "own", "C library's memory setting: each its own, or moe-train's for all", choices=("own", "same")
    )
    allow_unchecked: bool = option(False, "exit status 0 also where no target can be checked")
    output: str | None = option(None, "JSONL file to append the rows to")
    picture: str | None = option(None, "PNG file to draw the rows into")


@dataclass
class Plan:
    """What is going to be measured, and how.

    Attributes:
        config: what to train; data_dir is there.
        target: name of the guide's row whose configuration this is, or None.
        micro_steps: grad_accum_steps as configured, where fewer are timed.
    """

    config: TrainConfig
    device: torch.device
    world: World
    target: str | None
    micro_steps: int | None
    rounds: int
    part_steps: int
    memory: str
    names: list[str] = field(default_factory=lambda: [steps.OURS])
    missing: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return pick_dtype(self.config.dtype, self.device)[0]


# What to run


def _choose_peers(plan: Plan, wanted: bool | None) -> None:
    """Put the names of all contestants into a plan.

    Raises:
        InputError: peers are asked for that there are not.
    """
    config = plan.config
    dtype, model = str(plan.dtype).removeprefix("torch."), config.model
    fits = plan.device.type == "cpu" and dtype == "float32" and plan.world.size == 1
    fits = fits and config.preset in ("tiny", "small")
    same = not model.tie_embeddings and model.gate in (None, "softmax_over_topk")  # else there is no such Mixtral
    if wanted and not (fits and same):
        raise InputError(
            "--peers: expected one process on a CPU, float32, tiny or small, embeddings not tied, softmax_over_topk, got "
            f"{plan.world.size} on {plan.device.type}, {dtype}, {config.preset}" + (", another model" if fits else "")
        )
    if wanted is False or not (fits and same):
        return
    try:
        new = int(importlib.metadata.version("transformers").split(".")[0]) >= 5
    except importlib.metadata.PackageNotFoundError:
        new = False
    plan.names = [steps.OURS, steps.OURS_PLAIN, steps.LOOP, *(steps.TRANSFORMERS if new else ())]
    plan.missing = [] if new else list(steps.TRANSFORMERS)


def _table(given: dict[str, Any], target: str, device: torch.device, ranks: int) -> tuple[dict[str, Any], str | None]:
    """The options below those of the command line, and the name of the guide's row that they are of, or None."""
    file = given.get("config")
    if target != "auto":
        if device.type != "cuda":
            raise InputError(f"--target {target}: expected a GPU, found none")
        if file or "preset" in given:
            raise InputError(f"--target {target}: expected no --config and no --preset besides, got one")
    elif file or "preset" in given:
        return settings.read_toml(file) if file else {}, None
    elif device.type == "cuda":
        found = best_target(device_name(device), memory_total(device), ranks)
        target = target_name(found) if found else "auto"
    rows = {target_name(row): row for row in GUIDE}
    if target in rows and rows[target].ranks != ranks:
        raise InputError(f"--target {target}: expected --ranks {rows[target].ranks}, got {ranks} process(es)")
    if target == "auto":
        return {"preset": "small" if device.type == "cuda" else "tiny"}, None
    if not CONFIGS.is_dir():
        raise InputError(f"{CONFIGS}: expected the folder of configurations, which only a source tree has")
    return settings.read_toml(CONFIGS / f"{target}.toml"), target


def make_plan(given: dict[str, Any], world: World, folder: Path) -> Plan:
    """What the options mean on this machine.

    Args:
        given: the command line's, without those of `main`.
        folder: where random data may be put.
    """
    options = dict(given)
    names = ("target", "rounds", "part_steps", "peers", "memory", "config")
    own = {name: options.pop(name, None) for name in names}
    device = pick_device(options.get("device", "auto"), world.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(
            device
        )  # where kernels are launched, also in the checks before the process group is there
    table, target = _table(given, own["target"] or "auto", device, world.size)
    config = settings.resolve(options, {"data_dir": "", **table})
    # A small constant learning rate: routing, and with it the work, stays what it is at initialisation.
    config = replace(config, out_dir=str(folder / "run"), sample_every=0, lr=1e-5, min_lr=1e-5, warmup_iters=0)
    micro_steps = None
    if "grad_accum_steps" not in options and config.grad_accum_steps > MOST_MICRO_STEPS:
        micro_steps = config.grad_accum_steps
        config = replace(config, grad_accum_steps=MOST_MICRO_STEPS)
    if not config.data_dir:
        config = replace(config, data_dir=str(folder / "data"))
        steps.random_data(folder / "data", config.model_config(1).vocab_size, config.block_size)
    default = 30 if config.preset in ("tiny", "small") else 10
    rounds = default if own["rounds"] is None else own["rounds"]
    part_steps = 5 if own["part_steps"] is None else own["part_steps"]
    for name, value, least in (("rounds", rounds, 1), ("part_steps", part_steps, 0)):
        if value < least:
            raise InputError(f"--{name}: expected at least {least}, got {value}")
    memory_setting = own["memory"] or "own"
    plan = Plan(config, device, world, target, micro_steps, rounds, part_steps, memory_setting)
    if config.model.backend == "triton" and device.type == "cpu":
        raise InputError("--model.backend triton: expected a GPU, got Triton's interpreter, in which nothing is timed")
    _choose_peers(plan, own["peers"])
    return plan


# Measuring


def _settings(plan: Plan) -> dict[str, Any]:
    """What two results have to have in common to be comparable."""
    config = plan.config
    names = ("preset", "batch_size", "block_size", "grad_accum_steps", "optimizer", "optimizer_in_backward")
    names += ("param_dtype", "checkpointing", "checkpoint_every", "reshard_after_forward", "dp_replicate")
    names += ("cpu_offload",)
    overrides = {name: value for name, value in asdict(config.model).items() if value is not None}
    configured = {} if plan.micro_steps is None else {"configured_grad_accum_steps": plan.micro_steps}
    return {
        **{name: getattr(config, name) for name in names},
        **configured,
        "model": overrides,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "ranks": plan.world.size,
        "data": read_meta(config.data_dir).dataset,
        "memory": plan.memory,
    }


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
        peak, _ = peak_flops(
            plan.device, plan.dtype
        )  # by now all ranks are here: on a CPU they share what they measure
        return seconds, reports, None if peak is None else _over_ranks(peak, plan.device, dist.ReduceOp.SUM)
    except RuntimeError as error:
        if not memory.ran_out(error):
            raise
        raise InputError(f"out of memory ({str(error).splitlines()[0]}); lower --batch_size") from error
    finally:
        for contestant in contestants.values():
            contestant.close()
        parallel.stop()


def measure(plan: Plan) -> list[dict[str, Any]]:
    """Check, time, split; returns a row for each contestant.

    Raises:
        WrongResult: one of them computes something else.
    """
    model = plan.config.model_config(read_meta(plan.config.data_dir).vocab_size)
    error = check_exact(model, plan.config, plan.device, plan.dtype)
    if len(plan.names) > 1:
        steps.check_peers(plan.names, model)
    seconds, reports, peak = _run(plan)
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
        rows.append(make_row("throughput", name, _settings(plan), plan.device, seconds[name], **values))
    return rows


# The command


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
    if extra["ranks"]:
        if world.size > 1:
            raise InputError("--ranks: expected no torchrun around it, which it starts itself")
        if given.get("peers"):
            raise InputError("--peers: expected no --ranks, whose processes they would disturb")
        on_gpu = pick_device(given.get("device", "auto")).type == "cuda"
        check_counts(extra["ranks"], on_gpu)
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
