"""The training configuration: the guide's flags with their defaults, presets, TOML files.

Priority: a field's default < the preset's < the file given with --config < flags on the command line.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from moe_engine.checkpointing import MODES
from moe_engine.config import ModelConfig
from moe_engine.presets import PRESETS, preset
from moe_engine.train.errors import InputError
from moe_engine.train.options import option

RESHARD = ("always", "never")


def auto_aux_coef(num_experts: int) -> float:
    """The load-balancing coefficient 0.005 · E / 8.

    With E experts near balance, the gradient that a relative overload r of one expert puts on a token's logit is
    coef · r / (T·E): a coefficient proportional to E keeps that pressure what it is at 8.
    """
    return 0.005 * num_experts / 8


# Every field of ModelConfig, each None until it is given: `--model.num_layers 6`, or a [model] table.
ModelOverrides = make_dataclass(
    "ModelOverrides",
    [(f.name, get_type_hints(ModelConfig)[f.name] | None, option(None, f"override the preset's {f.name}"))
     for f in fields(ModelConfig)],
    frozen=True,
)  # fmt: skip
ModelOverrides.__module__ = __name__  # where pickle finds it, so that a configuration can be sent to another process


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `moe-train` can be told. One iteration is one optimizer step."""

    # Data and output
    data_dir: str = option(help="folder with tokenized data (see moe-prepare)")
    out_dir: str = option("out/8b_moe_run1", "run folder: configuration, logs, checkpoints, samples, plots")
    fresh: bool = option(False, "start over, removing the run that out_dir holds")
    # Model
    preset: str = option("8b", "model size; tiny and small also bring training defaults", choices=tuple(PRESETS))
    model: ModelOverrides = field(default_factory=ModelOverrides)
    # Training
    batch_size: int = option(4, "sequences per device and micro-step")
    block_size: int = option(4096, "context length in tokens")
    max_iters: int = option(50_000, "optimizer steps")
    grad_accum_steps: int = option(32, "micro-steps per optimizer step")
    # Optimization
    optimizer: str = option(
        "adamw", "adamw8bit keeps the moments in 8 bits (extra adamw8bit)", choices=("adamw", "adamw8bit")
    )
    optimizer_in_backward: bool = option(
        False, "step in backward, without a gradient buffer; needs grad_accum_steps 1, clips per parameter"
    )
    lr: float = option(3e-4, "peak learning rate")
    min_lr: float = option(3e-5, "learning rate at the end of the cosine")
    weight_decay: float = option(0.1, "AdamW weight decay, on matrices only")
    beta1: float = option(0.9, "AdamW beta1")
    beta2: float = option(0.95, "AdamW beta2")
    grad_clip: float = option(1.0, "largest global gradient norm; 0 turns clipping off")
    skip_spikes: float = option(
        0.0, "skip an iteration whose loss or gradient norm is so many standard deviations above its mean; 0: off"
    )
    max_bad_steps: int = option(10, "skipped iterations in a row that end the run")
    warmup_iters: int = option(2000, "iterations of linear warm-up")
    lr_decay_iters: int = option(50_000, "iteration at which the cosine reaches min_lr")
    router_aux_coef: str = option(
        "auto", "load-balancing coefficient: a number, or auto (0.005 at 8 experts; 0 with --model.router_balance bias)"
    )
    router_bias_rate: float = option(1e-3, "step of the balancing biases with --model.router_balance bias")
    router_z_coef: float = option(0.0, "router z-loss coefficient")
    logit_z_coef: float = option(0.0, "z-loss coefficient of the output logits, in training only")
    # System
    dtype: str | None = option(
        None, "training dtype (default: bfloat16; float32 on a CPU)", choices=("bfloat16", "float16", "float32")
    )
    param_dtype: str = option(
        "float32", "dtype of weights and gradients; bfloat16 needs adamw8bit and dtype bfloat16",
        choices=("float32", "bfloat16"),
    )  # fmt: skip
    checkpointing: str = option(
        "none", "activations that a block keeps: all, its input only, or large GEMMs' results too", choices=MODES
    )
    checkpoint_every: int = option(1, "blocks to one that --checkpointing acts on, counted from the first")
    reshard_after_forward: str = option(
        "always", "free a block's gathered weights until backward (ZeRO-3), or keep them (ZeRO-2)", choices=RESHARD
    )
    dp_replicate: int = option(1, "whole copies of the model, each sharded over its part of the processes (HSDP)")
    cpu_offload: bool = option(False, "keep weights, gradients and optimizer in the host's memory")
    seed: int = option(1337, "seed of initialisation and data order")
    deterministic: bool = option(False, "only algorithms whose results are the same in every run; may be slower")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    timeout: float = option(300.0, "seconds without progress that end a run; at least 1800 for the first iteration")
    # Checkpoints
    save_every: int = option(1000, "iterations between checkpoints; 0: only the last")
    keep_last_n: int = option(5, "checkpoints to keep, the best one not counted; 0 keeps all")
    async_save: bool = option(True, "write checkpoints beside training, from a copy in the host's memory")
    # Evaluation and logging
    eval_interval: int = option(500, "iterations between evaluations; 0: none")
    eval_iters: int = option(100, "batches of the validation split in one evaluation")
    log_interval: int = option(10, "iterations between log lines")
    log_router_stats: bool = option(True, "log router balance and expert shares per layer")
    # Sampling
    sample_every: int = option(500, "iterations between samples; 0: none")
    sample_tokens: int = option(200, "tokens of a sample")
    sample_prompt: str = option("", "text to continue; empty: a new document")
    temperature: float = option(0.8, "sampling temperature; 0 takes the likeliest token")
    top_k: int = option(200, "draw among the k likeliest tokens; 0 among all")

    def __post_init__(self) -> None:
        at_least_one = ("batch_size", "block_size", "max_iters", "grad_accum_steps", "lr_decay_iters", "log_interval",
                        "eval_iters", "sample_tokens", "checkpoint_every", "dp_replicate", "max_bad_steps",
                        "timeout")  # fmt: skip
        not_negative = ("warmup_iters", "save_every", "keep_last_n", "eval_interval", "sample_every", "top_k", "seed",
                        "lr", "min_lr", "weight_decay", "grad_clip", "skip_spikes", "router_bias_rate", "router_z_coef",
                        "logit_z_coef", "temperature")  # fmt: skip
        for names, least in ((at_least_one, 1), (not_negative, 0)):
            for name in names:
                value = getattr(self, name)
                if not (math.isfinite(value) and value >= least):
                    raise InputError(f"--{name}: expected at least {least}, got {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if self.min_lr > self.lr:
            raise InputError(f"--min_lr: expected at most lr = {self.lr}, got {self.min_lr}")
        if self.optimizer_in_backward and self.grad_accum_steps != 1:
            raise InputError(
                f"--optimizer_in_backward: expected --grad_accum_steps 1, got {self.grad_accum_steps}; a gradient is "
                "applied and freed before the next micro-step has one to add"
            )
        if self.optimizer_in_backward and self.dtype == "float16":
            raise InputError(
                "--optimizer_in_backward: expected --dtype bfloat16 or float32, got float16; whether a loss scale was "
                "too large is known only after backward, when the parameters are updated already"
            )
        if self.optimizer_in_backward and self.skip_spikes:
            raise InputError(
                f"--skip_spikes {self.skip_spikes:g}: cannot be used with --optimizer_in_backward; whether a gradient "
                "is a spike is known only after backward, when the parameters are updated already"
            )
        if self.deterministic and self.model.autotune:
            raise InputError(
                "--deterministic: cannot be used with --model.autotune; which tiles it times as the fastest may differ "
                "between runs, and other tiles add in another order"
            )
        if self.param_dtype == "bfloat16" and self.optimizer != "adamw8bit":
            raise InputError(
                f"--param_dtype bfloat16: expected --optimizer adamw8bit, got {self.optimizer}; an update is mostly "
                "smaller than half a step of bfloat16, and only adamw8bit, which rounds stochastically, keeps it"
            )
        if self.param_dtype == "bfloat16" and self.dtype not in (None, "bfloat16"):
            raise InputError(f"--param_dtype bfloat16: expected --dtype bfloat16, got {self.dtype}")
        if self.cpu_offload and self.optimizer_in_backward:
            raise InputError(
                "--cpu_offload: cannot be used with --optimizer_in_backward; a gradient's copy in the host's memory is "
                "whole only when backward is over"
            )
        if self.cpu_offload and self.dtype == "float16":
            raise InputError(
                "--cpu_offload: expected --dtype bfloat16 or float32, got float16, whose loss scale is on the GPU and "
                "its gradients are not"
            )
        self.aux_coef(8)

    def aux_coef(self, num_experts: int, router_balance: str = "loss") -> float:
        """The load-balancing coefficient of a model with that many experts and that `ModelConfig.router_balance`.

        `auto` is `auto_aux_coef`, with `bias` 0.
        """
        if self.router_aux_coef == "auto":
            return 0.0 if router_balance == "bias" else auto_aux_coef(num_experts)
        try:
            coef = float(self.router_aux_coef)
        except ValueError:
            coef = math.nan
        if not (math.isfinite(coef) and coef >= 0):
            raise InputError(f"--router_aux_coef: expected auto or a number of at least 0, got {self.router_aux_coef}")
        return coef

    def learning_rate(self, iteration: int) -> float:
        """Linear warm-up to lr, then a cosine down to min_lr at lr_decay_iters; iteration counts from 0."""
        if iteration < self.warmup_iters:
            return self.lr * (iteration + 1) / self.warmup_iters
        if iteration >= self.lr_decay_iters:
            return self.min_lr
        progress = (iteration - self.warmup_iters) / max(1, self.lr_decay_iters - self.warmup_iters)
        return self.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (self.lr - self.min_lr)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model: preset, overrides, and room for the tokenizer's vocabulary.

        Unless it is given, the model's vocabulary is the preset's, or, if that is too small, the tokenizer's rounded up
        to a multiple of 64.

        Raises:
            InputError: a field is out of range, or the given vocabulary is smaller than the tokenizer's.
        """
        given = {name: value for name, value in asdict(self.model).items() if value is not None}
        if given.get("vocab_size", vocab_size) < vocab_size:
            raise InputError(
                f"--model.vocab_size: expected at least the data's {vocab_size}, got {given['vocab_size']}"
            )
        try:
            given.setdefault("vocab_size", max(preset(self.preset).vocab_size, -(-vocab_size // 64) * 64))
            return preset(self.preset, **given)
        except ValueError as error:
            raise InputError(f"--model.{error}") from None


# Training defaults that belong to a model size; the guide's own are for the large ones.
_SMALL_RUN = {"warmup_iters": 20, "eval_interval": 50, "eval_iters": 8, "sample_every": 0, "save_every": 100}
PRESET_DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_SMALL_RUN,
        "out_dir": "out/tiny",
        "sample_every": 150,
        "batch_size": 8,
        "block_size": 256,
        "grad_accum_steps": 1,
        "max_iters": 300,
        "lr_decay_iters": 300,
        "lr": 3e-3,
        "min_lr": 3e-4,
    },
    "small": {
        **_SMALL_RUN,
        "out_dir": "out/small",
        "batch_size": 8,
        "block_size": 512,
        "grad_accum_steps": 4,
        "max_iters": 5000,
        "lr_decay_iters": 5000,
        "warmup_iters": 200,
        "eval_interval": 250,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "save_every": 500,
    },
}


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _accepts(kind: Any, value: Any) -> bool:
    """Whether a TOML value fits a field's type; an integer is a fine float, a bool is no number."""
    if kind is bool or isinstance(value, bool):
        return kind in (bool, bool | None) and isinstance(value, bool)
    if kind in (float, float | None):
        return isinstance(value, int | float)
    return isinstance(value, kind)


def _check_table(table: dict[str, Any], config_class: type, source: str) -> None:
    hints = get_type_hints(config_class)
    for name, value in table.items():
        if name not in hints:
            raise InputError(f"{source}: no such key {name}{_nearest(name, list(hints))}")
        if name == "model" and config_class is TrainConfig:
            if not isinstance(value, dict):
                raise InputError(f"{source}: model: expected a table, got {value!r}")
            _check_table(value, ModelOverrides, f"{source}: [model]")
        elif not _accepts(hints[name], value):
            expected = getattr(hints[name], "__name__", str(hints[name]))
            raise InputError(f"{source}: {name}: expected {expected}, got {value!r}")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Options from a TOML file: the names of `TrainConfig`, and a [model] table with those of `ModelConfig`.

    Raises:
        InputError: the file is missing or not TOML, a key is unknown, or a value has the wrong type.
    """
    try:
        with open(path, "rb") as f:
            table = tomllib.load(f)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--config {path}: not valid TOML: {error}") from None
    if isinstance(table.get("router_aux_coef"), int | float):
        table["router_aux_coef"] = str(table["router_aux_coef"])
    _check_table(table, TrainConfig, f"--config {path}")
    return table


def resolve(flags: dict[str, Any], file: dict[str, Any] | None = None) -> TrainConfig:
    """The configuration from explicitly given flags and a file's table, on top of preset and defaults.

    Raises:
        InputError: data_dir is not given, or a value is out of range.
    """
    file = file or {}
    chosen = flags.get("preset") or file.get("preset") or _default("preset")
    if chosen not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}, got {chosen!r}")
    merged = {**PRESET_DEFAULTS.get(chosen, {}), **file, **flags}
    merged["model"] = ModelOverrides(**{**file.get("model", {}), **flags.get("model", {})})
    if "data_dir" not in merged:
        raise InputError("--data_dir: required: the folder that moe-prepare wrote")
    for f in fields(TrainConfig):
        choices = f.metadata.get("choices")
        value = merged.get(f.name)
        if choices and value is not None and value not in choices:
            raise InputError(f"{f.name}: expected one of {', '.join(choices)}, got {value!r}")
    return TrainConfig(**merged)


def _default(name: str) -> Any:
    value = next(f.default for f in fields(TrainConfig) if f.name == name)
    assert value is not MISSING
    return value


def _toml_lines(table: dict[str, Any]) -> list[str]:
    # Strings, booleans and numbers are written as in JSON, which TOML reads; a float needs a dot or an exponent.
    return [
        f"{name} = {json.dumps(value, ensure_ascii=False)}"
        for name, value in table.items()
        if value is not None and not isinstance(value, dict)
    ]


def to_toml(config: TrainConfig, model: ModelConfig | None = None) -> str:
    """The configuration as a TOML file that `--config` reads back; with `model`, its every field in [model].

    `fresh` is left out: it was meant for one start, and the file must not remove the run it lies in.
    """
    table = asdict(config)
    table.pop("fresh")
    overrides = {**table.pop("model"), **(asdict(model) if model else {})}
    lines = _toml_lines(table)
    overridden = _toml_lines(overrides)
    return "\n".join([*lines, *(["", "[model]", *overridden] if overridden else [])]) + "\n"


# Fields that a run may change between one start and the next.
_FREE = {
    "data_dir", "out_dir", "fresh", "max_iters", "save_every", "keep_last_n", "async_save", "eval_interval",
    "eval_iters", "log_interval", "log_router_stats", "sample_every", "sample_tokens", "sample_prompt", "temperature",
    "top_k", "device", "preset", "batch_size", "grad_accum_steps", "checkpointing", "checkpoint_every",
    "optimizer_in_backward", "reshard_after_forward", "dp_replicate", "cpu_offload", "skip_spikes", "max_bad_steps",
    "deterministic", "timeout",
}  # fmt: skip


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Fields in which two runs' tables (as read from config.toml) differ and may not, as `name: old → new`.

    batch_size and grad_accum_steps may change, because their product with the number of devices is what counts: the
    checkpoint holds that. A run older than an option was one with its default.
    """
    rows = []
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    model_defaults = {f.name: None if f.default is MISSING else f.default for f in fields(ModelConfig)}
    for name in sorted(({*old, *new} - _FREE) | {"model"}):
        a, b = (table.get(name, defaults.get(name)) for table in (old, new))
        if name == "model":
            a, b = old.get("model") or {}, new.get("model") or {}
            names = sorted({*a, *b} - {"save", "autotune"})  # how results are computed; of autotune up to rounding
            pairs = {k: [table.get(k, model_defaults.get(k)) for table in (a, b)] for k in names}
            rows += [f"model.{k}: {x} → {y}" for k, (x, y) in pairs.items() if x != y]
        elif a != b:
            rows.append(f"{name}: {a} → {b}")
    return rows
