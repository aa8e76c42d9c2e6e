"""Processes: who this rank is, how the model is sharded, how ranks agree.

One process trains without torch.distributed, unless its dtype needs FSDP2's mixed precision: fp32 master weights,
16-bit compute, fp32 gradients. Several processes, started by torchrun, shard with FSDP2: a group per block, one for the
final norm with the output layer (kept gathered from forward to backward), and the root with the embedding.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from moe_engine.model import Transformer
from moe_engine.train.errors import InputError

TIMEOUT = datetime.timedelta(seconds=300)


@dataclass(frozen=True)
class World:
    """This process among the data-parallel ones."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> World:
        """What torchrun set, or a world of one.

        Raises:
            InputError: only some of torchrun's variables are set.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        values = [os.environ.get(name) for name in names]
        if all(value is None for value in values):
            return cls(0, 1, 0)
        try:
            return cls(*(int(value) for value in values))
        except (TypeError, ValueError):
            given = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            raise InputError(f"torchrun's variables: expected three numbers, got {given}") from None


def is_sharded(world: World, dtype: torch.dtype) -> bool:
    """Whether a model in training is wrapped with FSDP2."""
    return world.size > 1 or dtype != torch.float32


def start(world: World, device: torch.device, dtype: torch.dtype) -> bool:
    """Join the process group where there is to be one; True if the model will be sharded with FSDP2."""
    if not is_sharded(world, dtype):
        return False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT)
    return True


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: Transformer, world: World, device: torch.device, dtype: torch.dtype) -> None:
    """Wrap a model (on the meta device) with FSDP2, in place.

    Routers stay in fp32. Inputs are never cast: the rotary angles must not become 16-bit.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    wide = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block.moe.router, mesh=mesh, mp_policy=wide)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model.head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def all_sum(value: torch.Tensor, world: World) -> torch.Tensor:
    """The sum over ranks, in place; every rank must call it."""
    if world.size > 1:
        dist.all_reduce(value)
    return value


def any_rank(flag: bool, world: World, device: torch.device) -> bool:
    """Whether a flag is set on any rank; every rank must call it."""
    if world.size == 1:
        return flag
    return bool(all_sum(torch.tensor(int(flag), dtype=torch.int32, device=device), world))


def whole(value: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor from one that may be spread over ranks; every rank must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def check_initialisation(model: Transformer) -> None:
    """Hold every parameter against what initialisation meant it to be: nothing uninitialised goes into a run.

    Raises:
        RuntimeError: a parameter's standard deviation or constant is not what it should be.
    """
    for name, parameter in model.named_parameters():
        std, values = model.initial_std(name), parameter.detach()
        if std is None:
            right = bool(whole((values == model.initial_constant(name)).all()))
        else:
            square = float(whole(values.float().square().mean()))
            right = abs(square**0.5 / std - 1) < 5 / max(parameter.numel(), 1) ** 0.5
        if not right:
            raise RuntimeError(f"parameter {name} is not initialised as it should be")
