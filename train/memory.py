"""What a training run needs of a device, before it starts.

`estimate` runs two real iterations (model, losses, backward, FSDP2, optimizer) on tensors that have no data, see
`moe_engine.memory`, and tells the peak by kind:

    weights      this rank's part of the parameters
    gathered     FSDP2's copies of whole parameters, in the dtype of the computation
    gradients    what is kept of them from backward to the optimizer's step
    optimizer    its moments
    activations  made in forward: kept for backward, or just there at the peak
    workspace    what lives shorter: recomputed activations, their gradients, buffers of collectives and steps

`formula` says the same in a few products, as a check on the other: they agree within 5 %.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

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
from moe_engine.train.parallel import World
from moe_engine.train.step import Engine, build_model

SLACK = 1.06
"""Reserved over counted bytes: what an allocator loses to fragments."""

CONTEXT = 1_000_000_000
"""Bytes of a GPU that are not PyTorch's to give: the driver's context, cuBLAS, NCCL."""

_ARCH = "sm_80"  # whose tiles decide a few temporaries of the kernels
_CPU = torch.device("cpu")  # where fake tensors are: those "on a GPU" have no backward on a machine without one


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
        parts = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in self.parts.items() if size >= 5e6)
        return f"{self.reserved / 1e9:.1f} GB per device ({parts}; {SLACK - 1:.0%} for fragments)"


@contextmanager
def _ranks(count: int, needed: bool) -> Iterator[None]:
    """A process group of `count` ranks of which this is the first and the others are imagined."""
    if not needed:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook  # PyTorch puts one of its own there, again with every group
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def estimate(config: TrainConfig, model: ModelConfig, ranks: int, dtype: torch.dtype, *, on_gpu: bool) -> Estimate:
    """Peak memory of one rank, from two iterations without data. Takes seconds; needs no GPU.

    Args:
        config: the run.
        model: its model.
        ranks: devices.
        dtype: of the computation.
        on_gpu: count the Triton kernels' path, else the CPU's. Attention is counted as on a CPU in both: FlexAttention
            keeps the same tensors.
    Raises:
        RuntimeError: a process group is there already.
    """
    if dist.is_initialized():
        raise RuntimeError("memory.estimate: expected no process group, it makes one of imagined ranks")
    model = replace(model, backend="triton" if on_gpu else "torch")
    config = replace(config, grad_accum_steps=min(config.grad_accum_steps, 2))  # from the second on all are alike
    world, footprint = World(0, ranks, 0), Footprint()
    sharded = parallel.is_sharded(world, dtype)
    with _ranks(ranks, sharded), no_launches(_ARCH) if on_gpu else nullcontext():
        transformer = build_model(config, model, world, _CPU, dtype, sharded=sharded)
        with measuring(footprint):
            transformer.to_empty(device=_CPU)
            engine = Engine(config, transformer, world, _CPU, dtype)
            _watch(engine, footprint)
            for _ in range(2):
                engine.step(_batches(config), config.lr)
                footprint.mark([list(state.values()) for state in engine.optimizer.state.values()], OPTIMIZER)
    return Estimate({kind: footprint.peak[kind] for kind in KINDS}, footprint.at)


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


def _batches(config: TrainConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for _ in range(config.grad_accum_steps):
        tokens = torch.zeros(config.batch_size, config.block_size + 1, dtype=torch.int64)
        yield tokens[:, :-1], tokens[:, 1:]
