"""A training step over many cards, on paper: what FSDP2 and HSDP send in `train/parallel.py`, and how long that takes.

In every micro-step each of FSDP2's units (a block, its router, the head, the embedding) is gathered in the dtype of the
computation, a block a second time for backward unless `reshard_after_forward` is `never`, and has its gradient reduced
in fp32; with replicas (HSDP) a rank's part of that is then summed over them. The loop does so for each micro-step of an
accumulated step too. The batch of a card stays what it is however many there are: weak scaling.

A ring brings a rank (n − 1) / n of what is gathered over n ranks, and as much for a reduction. Where they are on
several hosts, a host has to be brought what the others have, and its cards' network links bring it together. Latency,
which grows with the ring, is not counted, nor are small sums over all ranks (counts of the experts' rows, norms).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from moe_engine.bench.gpus import Gpu
from moe_engine.bench.work import step_work, total_seconds
from moe_engine.config import ModelConfig
from moe_engine.model import Transformer
from moe_engine.train import memory, parallel
from moe_engine.train.config import TrainConfig
from moe_engine.train.device import DTYPES

HOST = 8
"""Cards in a host."""


@functools.lru_cache(2)
def meta_model(model: ModelConfig) -> Transformer:
    """The model without storage; the same one each time, so not to be sharded."""
    with torch.device("meta"):
        return Transformer(replace(model, backend="torch"))


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers together.

    Attributes:
        elements: of its parameters, padding included.
        itemsize: bytes of each when gathered.
        gathers: in a micro-step.
    """

    elements: int
    itemsize: int
    gathers: int


def _padded(parameters: list[nn.Parameter], experts: set[int], shards: int) -> int:
    """Elements with FSDP2's padding: dimension 0 up to a multiple of the ranks, unless experts are cut elsewhere."""
    total = 0
    for p in parameters:
        even = id(p) in experts and any(size % shards == 0 for size in p.shape)
        total += p.numel() if even else p.numel() // p.shape[0] * (-(-p.shape[0] // shards) * shards)
    return total


def units(model: Transformer, config: TrainConfig, shards: int, itemsize: int = 2) -> Iterator[Unit]:
    """FSDP2's units as `parallel.shard` makes them, over so many ranks.

    Args:
        itemsize: bytes of the computation's dtype; routers are gathered in fp32.
    """
    again = 2 if config.reshard_after_forward == "always" else 1
    for block in model.blocks:
        router = list(block.moe.router.parameters())
        inside = {id(p) for p in router}
        experts = {id(p) for p in block.moe.parameters(recurse=False)}
        yield Unit(_padded(router, set(), shards), 4, 1)
        yield Unit(_padded([p for p in block.parameters() if id(p) not in inside], experts, shards), itemsize, again)
    yield Unit(_padded(list(model.head.parameters()), set(), shards), itemsize, 1)
    yield Unit(_padded(list(model.embedding.parameters()), set(), shards), itemsize, 1)


@dataclass(frozen=True)
class Volume:
    """Bytes of the whole tensors that collectives are called on in one micro-step.

    Attributes:
        elements: of all parameters, padding included; a rank that has none of it has this many divided by the shards.
        gathered: results of all-gathers.
        reduced: what goes into reduce-scatters, fp32.
        summed: a rank's parts that go into all-reduces over replicas, fp32.
    """

    elements: int
    gathered: int
    reduced: int
    summed: int


def volume(model: Transformer, config: TrainConfig, ranks: int, replicas: int = 1, itemsize: int = 2) -> Volume:
    """What a micro-step sends over `ranks` cards; nothing is gathered from a rank alone.

    Raises:
        InputError: the replicas do not divide the ranks.
    """
    parallel.check_replicas(ranks, replicas)
    shards = ranks // replicas
    parts = list(units(model, config, shards, itemsize))
    elements = sum(unit.elements for unit in parts)
    gathered = sum(unit.gathers * unit.itemsize * unit.elements for unit in parts)
    summed = 4 * elements // shards if replicas > 1 else 0
    return Volume(elements, gathered, 4 * elements, summed) if shards > 1 else Volume(elements, 0, 0, summed)


@dataclass(frozen=True)
class Links:
    """Bytes per second, in one direction: from a card to those of its host, and from a card to other hosts."""

    host: float
    network: float


def collective_seconds(size: float, ranks: int, on_a_host: int, links: Links) -> float:
    """Projected time of an all-gather or a reduce-scatter of `size` bytes; an all-reduce takes two.

    Args:
        ranks: that take part, `on_a_host` of them on each host.
    """
    hosts = -(-ranks // on_a_host)
    inside = size * (ranks - 1) / ranks / links.host if on_a_host > 1 else 0.0
    return max(inside, size * (hosts - 1) / hosts / (on_a_host * links.network))


@dataclass(frozen=True)
class Projection:
    """A step over so many cards, projected.

    Attributes:
        ranks, replicas: cards, and whole copies of the model among them.
        tokens: of a step, over all ranks.
        received: bytes that a rank is sent in a step: gathered, reduced, summed over replicas.
        compute, communication: seconds of a step.
        memory: bytes of a card by `train.memory.formula`, with what an allocator loses. It knows nothing of padding.
        padding: elements that are sent over those that there are.
    """

    ranks: int
    replicas: int
    tokens: int
    received: tuple[float, float, float]
    compute: float
    communication: float
    memory: float
    padding: float

    @property
    def hidden(self) -> float:
        """Seconds if all communication is behind computation, or the other way round."""
        return max(self.compute, self.communication)

    @property
    def exposed(self) -> float:
        """Seconds if none is."""
        return self.compute + self.communication


def _on_a_host(ranks: int, apart: int) -> int:
    """Ranks on each host of a group that takes every `apart`-th of consecutive ones."""
    return min(ranks, max(1, HOST // apart))


def project(
    config: TrainConfig,
    model: ModelConfig,
    gpu: Gpu,
    ranks: int,
    replicas: int,
    links: Links,
    compute: float = 1.0,
    bandwidth: float = 1.0,
) -> Projection:
    """A step of a run on `ranks` cards.

    Args:
        links: their speed, taken as it is.
        compute, bandwidth: shares of the card's peaks that operations reach.
    Raises:
        InputError: the replicas do not divide the ranks.
    """
    whole, steps = meta_model(model), config.grad_accum_steps
    dtype = DTYPES[config.dtype or "bfloat16"]
    shards = ranks // replicas
    sent = volume(whole, config, ranks, replicas, dtype.itemsize)
    shared, copies = (shards, _on_a_host(shards, 1)), (replicas, _on_a_host(replicas, shards))
    communication = sum(collective_seconds(size, *shared, links) for size in (sent.gathered, sent.reduced))
    communication += 2 * collective_seconds(sent.summed, *copies, links)
    part = steps * (shards - 1) / shards
    parameters = sum(p.numel() for p in whole.parameters())
    run = memory.Run(replace(config, dp_replicate=replicas), model, ranks, dtype, on_gpu=True)
    return Projection(
        ranks,
        replicas,
        ranks * steps * config.batch_size * config.block_size,
        (part * sent.gathered, part * sent.reduced, 2 * steps * sent.summed * (replicas - 1) / replicas),
        total_seconds(step_work(config, model, sent.elements / shards, dtype.itemsize), gpu, compute, bandwidth),
        steps * communication,
        memory.SLACK * memory.formula(run),
        sent.elements / parameters,
    )
