"""What `moe-bench throughput` is to measure: its options, and what they mean on this machine."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moe_engine.bench import steps
from moe_engine.bench.goals import best_target, target_name
from moe_engine.bench.runner import changed
from moe_engine.bench.targets import CONFIGS, GUIDE
from moe_engine.train import config as settings
from moe_engine.train.config import TrainConfig
from moe_engine.train.device import device_name, memory_total, pick_device, pick_dtype
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
    same = same and model.router_balance in (None, "loss") and not model.router_jitter
    # What peers do not do, they cannot be compared in.
    plain = config.checkpointing == "none" and config.optimizer == "adamw" and not config.optimizer_in_backward
    plain = plain and not (config.router_z_coef or config.logit_z_coef)
    if wanted and not (fits and same and plain):
        raise InputError(
            "--peers: expected one process on a CPU, float32, tiny or small, embeddings untied, softmax_over_topk, got "
            f"{plan.world.size} on {plan.device.type}, {dtype}, {config.preset}"
            + ("" if not fits else ", another model" if not same else ", checkpointing, a z-loss or another optimizer")
        )
    if wanted is False or not (fits and same and plain):
        return
    try:
        new = int(importlib.metadata.version("transformers").split(".")[0]) >= 5
    except importlib.metadata.PackageNotFoundError:
        new = False
    plan.names = [steps.OURS, steps.OURS_PLAIN, steps.LOOP, *(steps.TRANSFORMERS if new else ())]
    plan.missing = [] if new else list(steps.TRANSFORMERS)


def _table(given: dict[str, Any], target: str, device: torch.device, ranks: int) -> tuple[dict[str, Any], str | None]:
    """The options below those of the command line, and the name of the guide's row that is run with them, or None."""
    file = given.get("config")
    # A row speaks of one model at one context; how it is computed is ours to choose.
    other = [f"--model.{name}" for name in given.get("model", {}) if name not in ("backend", "save", "autotune")]
    other += ["--block_size"] if "block_size" in given else []
    if target != "auto":
        if device.type != "cuda":
            raise InputError(f"--target {target}: expected a GPU, found none")
        if file or "preset" in given:
            raise InputError(f"--target {target}: expected no --config and no --preset besides, got one")
        if other:
            raise InputError(f"--target {target}: expected its own model and block_size, got {', '.join(other)}")
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
    return settings.read_toml(CONFIGS / f"{target}.toml"), None if other else target


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
        # Where kernels are launched, also in the checks before the process group is there.
        torch.cuda.set_device(device)
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
    if own["memory"] and len(plan.names) == 1:
        raise InputError(f"--memory: expected peers, which it is about, got {own['memory']} and none")
    return plan


def settings_of(plan: Plan) -> dict[str, Any]:
    """What two results have to have in common to be comparable."""
    config = plan.config
    names = ("preset", "batch_size", "block_size", "grad_accum_steps", "optimizer", "optimizer_in_backward")
    names += ("param_dtype", "checkpointing", "checkpoint_every", "reshard_after_forward", "dp_replicate")
    names += ("cpu_offload",)
    configured = {} if plan.micro_steps is None else {"configured_grad_accum_steps": plan.micro_steps}
    return {
        **{name: getattr(config, name) for name in names},
        **configured,
        "model": {},
        **changed(config, "grad_clip", "router_z_coef", "logit_z_coef"),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "ranks": plan.world.size,
        "data": read_meta(config.data_dir).dataset,
        "memory": plan.memory,
    }
