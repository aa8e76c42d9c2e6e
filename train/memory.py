"""What a training run needs of a device, before it starts.

`estimate` runs two real iterations (model, losses, backward, FSDP2, optimizer) on tensors that have no data, see
`moe_engine.memory`, and tells the peak by kind:

    weights      this rank's part of the parameters
    gathered     FSDP2's copies of whole parameters, in the dtype of the computation
    gradients    what is kept of them from backward to the optimizer's step
    optimizer    its moments
    activations  made in forward: kept for backward, or just there at the peak
    workspace    what lives shorter: recomputed activations, their gradients, buffers of collectives and steps

`formula` says the same in a few products, as a check on the other. Tests hold it to 5 % of the estimate.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from moe_engine import loss
from moe_engine.config import ModelConfig
from moe_engine.memory import (
    ACTIVATIONS,
    GRADIENTS,
    KINDS,
    OPTIMIZER,
    WEIGHTS,
    WORKSPACE,
    Footprint,
    measuring,
    no_launches,
)
from moe_engine.train import parallel
from moe_engine.train.config import TrainConfig
from moe_engine.train.device import DTYPES
from moe_engine.train.errors import InputError
from moe_engine.train.parallel import World
from moe_engine.train.step import Engine, build_model

SLACK = 1.06
"""Reserved over counted bytes: what an allocator loses to fragments."""

CONTEXT = 1_000_000_000
"""Bytes of a GPU that are not PyTorch's to give: the driver's context, cuBLAS, NCCL."""

_ARCH = "sm_80"  # whose tiles decide a few temporaries of the kernels
_CPU = torch.device("cpu")  # where fake tensors are: those "on a GPU" have no backward on a machine without one


def gigabytes(size: float) -> str:
    """Bytes in GB, 10⁹ of them, or MB, in three digits."""
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


@dataclass(frozen=True)
class Estimate:
    """The peak of one rank.

    Attributes:
        parts: bytes by kind, the kinds of `moe_engine.memory.KINDS`, when their sum was largest.
        at: the operation after which that was.
    """

    parts: dict[str, int]
    at: str

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.parts.values())

    @property
    def reserved(self) -> int:
        """Bytes that a device has to have for them."""
        return round(SLACK * self.total)

    def __str__(self) -> str:
        parts = ", ".join(f"{kind} {gigabytes(size)}" for kind, size in self.parts.items() if size > 0.001 * self.total)
        return f"{gigabytes(self.reserved)} per device ({parts}; {SLACK - 1:.0%} for fragments)"


@dataclass(frozen=True)
class Run:
    """What is estimated: a run on so many devices.

    Attributes:
        dtype: of the computation.
        on_gpu: the Triton kernels' path, else the CPU's. Attention is counted as on a CPU in both: FlexAttention keeps
            the same tensors.
    """

    config: TrainConfig
    model: ModelConfig
    ranks: int
    dtype: torch.dtype
    on_gpu: bool

    @property
    def param_dtype(self) -> torch.dtype:
        """Of the weights that the optimizer updates."""
        return DTYPES[self.config.param_dtype]

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the model."""
        return parallel.is_sharded(self.ranks, self.dtype, self.param_dtype, self.config.cpu_offload)


def stored_bytes(config: TrainConfig) -> int:
    """Of a parameter, in a checkpoint: the weight and AdamW's two moments."""
    return DTYPES[config.param_dtype].itemsize + (2 if config.optimizer == "adamw8bit" else 8)


def lasting_bytes(config: TrainConfig) -> int:
    """Of a parameter, all through a step: weight and moments, and the gradient unless the step is in backward."""
    return stored_bytes(config) + (0 if config.optimizer_in_backward else DTYPES[config.param_dtype].itemsize)


def lasting_need(config: TrainConfig, parameters: int, ranks: int, sharing: int) -> float:
    """Bytes of weights, gradients and moments in one memory.

    Args:
        parameters: of the model.
        ranks: devices.
        sharing: ranks that have this memory in common: 1 on GPUs; those of a host on a CPU or with cpu_offload.
    """
    return lasting_bytes(config) * parameters * config.dp_replicate * sharing / ranks


@contextmanager
def _imagined(count: int) -> Iterator[None]:
    """A process group of `count` ranks of which this is the first and the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook  # PyTorch puts one of its own there, again with every group
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def estimate(run: Run) -> Estimate:
    """Peak memory of one rank, from two iterations without data. Takes seconds; needs no GPU.

    Raises:
        InputError: the run keeps weights in the host's memory, which is not counted, or kernels cannot be imported.
        RuntimeError: a process group is there already.
    """
    if run.config.cpu_offload:
        raise InputError("--cpu_offload: its memory is not estimated, got true")
    parallel.check_replicas(run.ranks, run.config.dp_replicate)
    with_kernels = run.on_gpu and run.model.backend != "torch"
    if with_kernels and importlib.util.find_spec("triton") is None:
        raise InputError("model.backend: the kernels' memory is estimated with triton installed, which it is not")
    if run.config.optimizer == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        raise InputError("--optimizer adamw8bit: its memory is estimated with torchao installed, which it is not")
    if dist.is_initialized():
        raise RuntimeError("memory.estimate: expected no process group, it makes one of imagined ranks")
    model = replace(run.model, backend="triton" if with_kernels else "torch")
    # From the second micro-step on all are alike.
    config = replace(run.config, grad_accum_steps=min(run.config.grad_accum_steps, 2))
    world, footprint = World(0, run.ranks, 0), Footprint()
    with (
        _imagined(run.ranks) if run.sharded else nullcontext(),
        no_launches(_ARCH) if with_kernels else nullcontext(),
        mock.patch.object(loss, "suits_one_pass", lambda x: False) if run.on_gpu else nullcontext(),
    ):
        transformer = build_model(config, model, world, _CPU, run.dtype, sharded=run.sharded)
        with measuring(footprint), _compiled_step(config):
            transformer.to_empty(device=_CPU)
            engine = Engine(config, transformer, world, _CPU, run.dtype)
            _watch(engine, footprint)
            for iteration in range(2):  # some optimizers make their moments in the first
                _mark_moments(engine, footprint)
                engine.step(_batches(config), iteration)
    return Estimate({kind: footprint.peak[kind] for kind in KINDS}, footprint.at)


@contextmanager
def _compiled_step(config: TrainConfig) -> Iterator[None]:
    """Stand in for the compiled step of `adamw8bit`, which cannot be traced here: two fp32 temporaries of a slice."""
    if config.optimizer != "adamw8bit":
        yield
        return

    def temporaries(slice_: torch.Tensor, *_: object) -> None:
        _both = [torch.empty_like(slice_, dtype=torch.float32) for _ in range(2)]

    with mock.patch("torchao.optim.adam.single_param_adam", temporaries):
        yield


def _watch(engine: Engine, footprint: Footprint) -> None:
    """Tell the footprint what is what: weights and gradients, and where forward ends."""

    def forward_begins(*_: object) -> None:
        footprint.phase = ACTIVATIONS

    def forward_ends(*_: object) -> None:
        footprint.phase = WORKSPACE

    def gradient_is_there(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            footprint.mark(parameter.grad, GRADIENTS)

    footprint.mark(list(engine.model.parameters()), WEIGHTS)
    engine.model.register_forward_pre_hook(forward_begins, prepend=True)
    engine.model.register_forward_hook(forward_ends)
    for parameter in engine.model.parameters():
        parameter.register_post_accumulate_grad_hook(gradient_is_there)


def _mark_moments(engine: Engine, footprint: Footprint) -> None:
    footprint.mark([list(state.values()) for state in engine.optimizer.state.values()], OPTIMIZER)


def _batches(config: TrainConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for _ in range(config.grad_accum_steps):
        tokens = torch.zeros(config.batch_size, config.block_size + 1, dtype=torch.int64)
        yield tokens[:, :-1], tokens[:, 1:]


def fits(run: Run, batch_size: int, capacity: float) -> bool:
    """Whether a batch_size does, in `capacity` bytes of a device."""
    return estimate(replace(run, config=replace(run.config, batch_size=batch_size))).reserved <= capacity


def largest_batch(run: Run, capacity: float) -> int:
    """The largest batch_size that fits into `capacity` bytes of a device; 0 if not even 1 does.

    By bisection over estimates: memory grows with the batch, but not in proportion.
    """
    fitting, too_large = 0, 1
    while fits(run, too_large, capacity):
        fitting, too_large = too_large, 2 * too_large
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        fitting, too_large = (middle, too_large) if fits(run, middle, capacity) else (fitting, middle)
    return fitting


def against(run: Run, capacity: float) -> str:
    """A line for the log: the estimate beside the `capacity` bytes of a device, and what to change if it is above."""
    found, usable = estimate(run), capacity - CONTEXT
    line = f"memory: estimated {found}; it has {gigabytes(capacity)}, {gigabytes(CONTEXT)} for driver and libraries"
    return line if found.reserved <= usable else f"{line}: too little; next to try: {next_setting(run)}"


def ran_out(error: BaseException) -> bool:
    """Whether an error is an allocator's that has nothing left, a GPU's or the host's."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


def next_setting(run: Run) -> str:
    """What to change first when a run does not fit, as flags: of what helps by the formula, that which costs least."""
    config = run.config
    half = {"batch_size": config.batch_size // 2, "grad_accum_steps": 2 * config.grad_accum_steps}
    new_run = ", in a new run"
    choices: list[tuple[bool, dict[str, Any], str]] = [  # possible, changes, remark
        (config.checkpointing == "none", {"checkpointing": "selective"}, ""),
        (config.checkpoint_every > 1, {"checkpoint_every": 1}, ""),
        (config.checkpointing == "selective", {"checkpointing": "block"}, ""),
        (config.batch_size % 2 == 0 and not config.optimizer_in_backward, half, ""),
        (config.dp_replicate > 1, {"dp_replicate": 1}, new_run if config.optimizer == "adamw8bit" else ""),
        (config.optimizer == "adamw", {"optimizer": "adamw8bit"}, new_run),
        (
            config.optimizer == "adamw8bit" and run.dtype == torch.bfloat16 and config.param_dtype == "float32",
            {"dtype": "bfloat16", "param_dtype": "bfloat16"},
            new_run,
        ),
        (
            config.grad_accum_steps == config.dp_replicate == 1
            and not config.cpu_offload
            and run.dtype != torch.float16
            and config.dtype != "float16",
            {"optimizer_in_backward": True},
            "",
        ),
        (config.batch_size > 1, {"batch_size": config.batch_size // 2}, new_run),
    ]
    now = formula(run)
    for possible, changes, remark in choices:
        if possible and formula(replace(run, config=replace(config, **changes))) < 0.99 * now:
            flags = (f"--{name}" if value is True else f"--{name} {value}" for name, value in changes.items())
            return " ".join(flags) + remark
    return "more devices, a shorter --block_size or a smaller --preset"


def formula(run: Run) -> int:
    """The peak in products of sizes: the largest of five moments of a step, from whichever micro-step is the last.

    It knows what is large and forgets biases, norms and statistics. Of one token, in 16 bits: `kept` is what a block
    keeps until its backward, `whole` what its backward needs of its forward.
    """
    c, config, size = run.model, run.config, run.dtype.itemsize
    tokens, parts = config.batch_size * config.block_size, run.ranks // config.dp_replicate
    stored = run.param_dtype.itemsize / parts
    head = c.vocab_size * c.d_model
    experts = 3 * c.num_experts * c.d_model * c.d_ff
    qkv, values = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.num_heads * c.head_dim
    block = experts + c.d_model * (qkv + values)
    parameters = c.num_layers * block + (1 if c.tie_embeddings else 2) * head

    # What is there all the time.
    moments = 2 * (1 + 4 / 256) if config.optimizer == "adamw8bit" else 2 * run.param_dtype.itemsize
    fixed = parameters * (stored + moments / parts)
    gradients = 0 if config.optimizer_in_backward else parameters * stored
    earlier = gradients if config.grad_accum_steps > 1 else 0  # of the micro-steps before
    # What goes to the replicas is kept to the end of backward: so much of a parameter, if it is a copy of the gradient.
    copied = config.dp_replicate > 1 and (earlier or not gradients or run.param_dtype != torch.float32)
    copy = 4 / parts if copied else 0

    # Activations.
    up = 2 * c.top_k * c.d_ff  # h
    whole = tokens * size * (4 * c.d_model + qkv + 2 * values + (up if c.save == "h" else 0))
    kept = {
        "none": whole,
        "selective": tokens * (size * (2 * c.d_model + qkv + (up if c.save == "h" else 0)) + 4 * c.num_experts),
        "block": tokens * size * c.d_model,
    }[config.checkpointing]
    acting = -(-c.num_layers // config.checkpoint_every)
    activations = acting * kept + (c.num_layers - acting) * whole

    # Backward of the output layer: its gradient, with a chunk of logits, then with a wide copy for the reduction.
    one_pass = not run.on_gpu and size >= 4  # see `moe_engine.loss`
    logits = min(tokens * c.vocab_size, 1 << 23 if one_pass else max(1 << 25, 4096 * tokens))
    chunk = logits * (2 * size if one_pass else size + 4) + 4 * tokens * c.d_model
    wide = 4 * head if run.sharded else 0
    ahead = size * block if parts > 1 else 0  # the copy of the next block
    reduction = max(size * head + wide, wide * (1 + 1 / parts))  # the narrow one is free when the result is made
    gathered = size * head if run.sharded else 0
    at_head = earlier + activations + 2 * tokens * size * c.d_model + ahead
    at_head += max(size * head + gathered + chunk, reduction)

    # Backward of a block: its forward, gradients of rows and weights, its copy and the next, the reduction before it.
    own = ahead + (size * block if run.sharded else 0)
    at_once = 1 if run.on_gpu else c.num_experts  # the torch backend goes expert by expert
    rows = tokens * size * (up / at_once + 3 * c.d_model) + size * experts * (1 if run.sharded else 0)
    in_block = whole - kept + rows + own
    at_last = (
        copy * head
        + (earlier or (0 if config.optimizer_in_backward else head * stored))
        + activations
        + in_block
        + wide
    )
    at_first = copy * (parameters - head - block) + kept + in_block + (4 * block if run.sharded else 0)
    at_first += earlier or max(0, gradients - (head + (block if run.sharded else 0)) * stored)

    # Backward of the embedding; at the end of it, or at the step, all gradients are there.
    at_embedding = gradients
    if run.sharded or not gradients:
        at_embedding = (earlier or max(0, gradients - head * stored)) + reduction
    at_embedding += copy * parameters
    return round(fixed + max(at_head, at_last, at_first, at_embedding))
