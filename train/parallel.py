"""Processes: who this rank is, how the model is sharded, how ranks agree.

One process trains without torch.distributed, unless it needs FSDP2's mixed precision: weights and gradients in fp32,
compute in 16 bits. Several processes, started by torchrun, shard with FSDP2: a group per block, one for its
router, one for the final norm with the output layer, and one for the embedding.
"""

from __future__ import annotations

import datetime
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moe_engine.model import Block, Transformer
from moe_engine.router import Router
from moe_engine.train.config import TrainConfig
from moe_engine.train.errors import InputError

TIMEOUT = 3600.0  # seconds that a collective waits; a rank that hangs is found before that, see liveness.py

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the data-parallel ones."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_this_host(self) -> int:
        """How many of the processes share this host's memory; torchrun says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

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


def is_sharded(ranks: int, dtype: torch.dtype, param_dtype: torch.dtype, cpu_offload: bool = False) -> bool:
    """Whether FSDP2 holds a model in training.

    One process whose weights (param_dtype) are in the dtype that they are used in needs no second copy of them.
    """
    return ranks > 1 or dtype != param_dtype or cpu_offload


def backend_for(device: torch.device, cpu_offload: bool) -> str:
    """What carries collectives; offloaded gradients have norms in the host's memory, which nccl does not read."""
    if device.type != "cuda":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if cpu_offload else "nccl"


def start(
    world: World,
    device: torch.device,
    dtype: torch.dtype,
    cpu_offload: bool = False,
    param_dtype: torch.dtype = torch.float32,
    timeout: float = TIMEOUT,
) -> bool:
    """Join the process group where there is to be one, once; True if the model will be sharded with FSDP2.

    A collective that takes `timeout` seconds raises a RuntimeError.
    """
    if not is_sharded(world.size, dtype, param_dtype, cpu_offload):
        return False
    if dist.is_initialized():
        return True
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, limit = backend_for(device, cpu_offload), datetime.timedelta(seconds=timeout)
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    else:
        store = _store_of_this_start("group", world, limit)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=limit)
    return True


def open_store(world: World, timeout: float) -> tuple[dist.Store | None, int | None]:
    """A key-value store of all ranks, apart from the process group's, and the rank that keeps it.

    It is where the process group's is: in torchrun's agent (None), or, without one, in rank 0. Keys are those of this
    start: an agent that starts its ranks again keeps what the ones before have written.

    Args:
        world: this process among the others; None is returned for a world of one.
        timeout: seconds that one access may take, and that the ranks have to meet.
    Raises:
        InputError: the others cannot be reached, or torchrun's variables are not all set.
    """
    if world.size == 1:
        return None, None
    limit = datetime.timedelta(seconds=timeout)
    try:
        store = _store_of_this_start("liveness", world, limit)
    except (RuntimeError, ValueError) as error:
        where = ":".join(os.environ.get(name, f"(no {name})") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).partition("\n")[0]
        raise InputError(f"{world.size} processes did not meet at {where} in {timeout:g} s: {reason}") from None
    return store, None if _agent_keeps_store() else 0


def _agent_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store_of_this_start(purpose: str, world: World, limit: datetime.timedelta) -> dist.Store:
    """A client of its own of the ranks' key-value store, with keys that no start before this one has used.

    An agent that starts its ranks again may keep what those before have written, addresses of dead processes among it.
    Rank 0's store is as old as this start. Each agent counts restarts for itself: a node that came back says 0.
    """
    store = next(dist.rendezvous("env://", world.rank, world.size, timeout=limit))[0]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _agent_keeps_store() else "0"
    start = store.add(f"{purpose}/{attempt}/starts/{world.rank}", 1)
    return dist.PrefixStore(f"{purpose}/{attempt}/{start}", store)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def cast_weights(model: Transformer, dtype: torch.dtype) -> None:
    """Give a model's parameters a dtype, in place, before it is sharded; the routers' stay in fp32."""
    for module in model.modules():
        if not isinstance(module, Router):
            module._apply(lambda parameter: parameter.to(dtype), recurse=False)


def check_replicas(ranks: int, replicas: int) -> None:
    """Raise InputError unless the replicas divide the ranks."""
    if ranks % replicas:
        raise InputError(f"--dp_replicate: expected a divisor of the number of processes, {ranks}, got {replicas}")


def check_sharding(world: World, device: torch.device, replicas: int, cpu_offload: bool) -> None:
    """Whether these processes can be arranged as asked, before any of them waits for another.

    Raises:
        InputError: the replicas do not divide the processes, or there is nothing to offload from.
    """
    check_replicas(world.size, replicas)
    if cpu_offload and device.type == "cpu":
        raise InputError("--cpu_offload: expected a GPU to offload from, got --device cpu, whose memory is the host's")


def accumulation_for(config: TrainConfig, known_state: dict[str, Any], ranks: int) -> int:
    """The micro-steps of an iteration when a run goes on, perhaps with another number of processes.

    Where batch_size and grad_accum_steps are those that the run was started with, the tokens of an iteration stay: half
    the processes take twice the micro-steps, and back. Where they were changed by hand, or the tokens cannot be divided
    so, they are what the configuration says, and whether that fits is for `Trainer.resume` to judge.

    Args:
        config: as configured. It is what a checkpoint's `arguments` must keep, never the number returned here: then it
            does not matter how often the number of processes has changed since.
        known_state: a checkpoint's state.json, with `tokens_per_iteration` and `arguments`.
        ranks: processes of this start.
    """
    known = known_state["arguments"]
    if any(known[name] != getattr(config, name) for name in ("batch_size", "grad_accum_steps")):
        return config.grad_accum_steps
    steps, rest = divmod(known_state["tokens_per_iteration"], config.batch_size * config.block_size * ranks)
    if rest or steps == 0 or (config.optimizer_in_backward and steps != 1):
        return config.grad_accum_steps
    return steps


def make_mesh(world: World, device: torch.device, replicas: int = 1) -> DeviceMesh:
    """The ranks in a row; with replicas in a table, `(replicate, shard)`, neighbours in one replica."""
    if replicas == 1:
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (replicas, world.size // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    model: Transformer,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
    *,
    replicas: int = 1,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Wrap a model (on the meta device) with FSDP2, in place.

    Routers stay in fp32. Inputs are never cast: the rotary angles must not become 16-bit.

    Args:
        model: to be given storage afterwards, on the device or, with cpu_offload, on the CPU.
        world: the ranks to spread it over; each must call this.
        device: where forward and backward run.
        dtype: what they compute in. Parameters keep theirs; gradients are reduced in fp32.
        replicas: whole copies of the model; each is spread over `world.size / replicas` ranks.
        reshard_after_forward: whether a block's weights are freed after its forward and gathered again for backward.
            Routers are too small, and the head is needed too soon, to be freed.
        cpu_offload: keep parameters, gradients and optimizer in the host's memory.
    """
    mesh = make_mesh(world, device, replicas)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    wide = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    common = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
    for block in model.blocks:
        fully_shard(block.moe.router, **common | {"mp_policy": wide}, reshard_after_forward=False)
        placement = _expert_placement(block, mesh.size(-1))
        fully_shard(block, **common, reshard_after_forward=reshard_after_forward, shard_placement_fn=placement)
    fully_shard(model.head, **common, reshard_after_forward=False)
    if not model.config.tie_embeddings:  # else the head needs it too, and it stays with the root
        fully_shard(model.embedding, **common)
        model.embedding.set_unshard_in_backward(False)  # which needs the tokens only
    fully_shard(model, **common)
    if mesh.size(-1) > 1:  # else nothing is gathered, and a copy made early only takes memory
        _order_prefetches(model)


def _expert_placement(block: Block, ranks: int) -> Callable[[torch.nn.Parameter], Shard | None]:
    """How the experts' weights are cut: along the first dimension that the ranks divide, that of the experts if it is.

    Cut along the experts, 8 of them would leave 8 of 16 ranks empty, and take as much memory on the others as on 8.
    FSDP2 pads dimension 0 only: where the ranks divide none, it is that one.
    """
    experts = {id(p) for p in block.moe.parameters(recurse=False)}

    def placement(parameter: torch.nn.Parameter) -> Shard | None:
        if id(parameter) not in experts:
            return None
        return Shard(next((d for d, size in enumerate(parameter.shape) if size % ranks == 0), 0))

    return placement


def _order_prefetches(model: Transformer) -> None:
    """Gather the next block, and no further, while one computes.

    FSDP2 by itself has no order for forward but what the host is ahead of the device, and would in backward gather a
    block only once the router of the block after it is done, behind that block's experts.
    """
    blocks = list(model.blocks)
    first = model if model.config.tie_embeddings else model.embedding
    first.set_modules_to_forward_prefetch([blocks[0], blocks[0].moe.router])
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following, following.moe.router])
        following.set_modules_to_backward_prefetch([block])
    blocks[-1].set_modules_to_forward_prefetch([model.head])
    model.head.set_modules_to_backward_prefetch([blocks[-1]])


def all_sum(value: torch.Tensor, world: World) -> torch.Tensor:
    """The sum over ranks, in place; every rank must call it."""
    if world.size > 1:
        dist.all_reduce(value)
    return value


def agree(values: Sequence[int], world: World, device: torch.device) -> list[int]:
    """The largest of each value over ranks; every rank must call it."""
    if world.size == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.int32, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def any_rank(flag: bool, world: World, device: torch.device) -> bool:
    """Whether a flag is set on any rank; every rank must call it."""
    return bool(agree([int(flag)], world, device)[0])


def gathered(value: T, world: World) -> list[T]:
    """A small picklable value of every rank, by rank; every rank must call it."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def from_first(make: Callable[[], T], world: World) -> T:
    """What the first rank makes of `make()`, a small picklable value, or raises; every rank must call it."""
    result: list[Any] = [None, None]
    if world.is_main:
        try:
            result[0] = make()
        except Exception as error:  # the others wait for an answer: they get this one
            result[1] = error
    if world.size > 1:
        dist.broadcast_object_list(result, 0)
    if result[1] is not None:
        raise result[1]
    return result[0]


def whole(value: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor from one that may be spread over ranks; every rank must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def check_initialisation(model: Transformer) -> None:
    """Hold every parameter and the balancing biases against what initialisation meant them to be.

    Nothing uninitialised goes into a run.

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
    for layer, block in enumerate(model.blocks):
        if block.moe.router.select_bias is not None and block.moe.router.select_bias.any():
            raise RuntimeError(f"select_bias of the router of layer {layer} is not initialised as it should be")
