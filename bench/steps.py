"""Training steps to be timed: ours, as `moe-train` takes them, and those of peers.

Every contestant is called for one optimizer step, on batches that the real loader reads from the same folder, with the
same small learning rate, so that routing stays as it is at initialisation. Ours is `train.loop.Trainer`. A peer does
what its users write: forward, loss with load balancing, backward, clipping by the global norm, PyTorch's fused AdamW.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_engine import ModelConfig, Transformer, reference, torch_backend
from moe_engine.bench import parts
from moe_engine.bench.checks import WrongResult, check_same
from moe_engine.bench.peers import MIXTRAL_STYLE, mixtral
from moe_engine.config import Activation
from moe_engine.train.config import TrainConfig
from moe_engine.train.data import TokenDataset, TrainLoader
from moe_engine.train.device import keep_freed_memory, memory_used
from moe_engine.train.errors import InputError
from moe_engine.train.loop import Trainer
from moe_engine.train.parallel import World
from moe_engine.train.shards import read_meta

OURS, OURS_PLAIN = "moe_engine, gpt-oss style", "moe_engine, Mixtral style"
LOOP = "per-expert loop, Mixtral style"
RANDOM, STEP = "random ids", "step"
TRANSFORMERS = {f"transformers Mixtral, {experts}": experts for experts in ("grouped_mm", "eager")}


def plain_experts(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    topk_weights: Tensor,
    permutation: Tensor,
    expert_offsets: Tensor,
    activation: Activation,
    save: str,
    autotune: bool,
) -> Tensor:
    """`torch_backend.expert_mlp` as anyone would write it: two `mm` per expert, index_add, PyTorch's own autograd."""
    out, weights, bounds = torch.zeros_like(x), topk_weights.flatten(), expert_offsets.tolist()
    for e, (begin, end) in enumerate(itertools.pairwise(bounds)):
        slots = permutation[begin:end].long()
        token = slots // topk_weights.shape[1]
        h = torch.mm(x[token], w_up[e])
        h = h if b_up is None else h + b_up[e]
        y = torch.mm(reference.gated_activation(h, activation), w_down[e])
        y = y if b_down is None else y + b_down[e]
        out = out.index_add(0, token, (weights[slots, None] * y).to(x.dtype))
    return out


def use_loop(model: Transformer) -> None:
    """Let a model's experts be computed by `plain_experts`."""
    for block in model.blocks:
        block.moe._functions = block.moe._gpu_functions = (torch_backend.route, plain_experts)


def check_peers(names: list[str], config: ModelConfig) -> None:
    """`check_same` of all that are to be compared. Raises WrongResult."""
    ours = Transformer(replace(config, **MIXTRAL_STYLE))
    for name in names:
        if name in TRANSFORMERS:
            check_same(name, ours, mixtral(ours, TRANSFORMERS[name]))
        elif name == LOOP:
            peer = Transformer(ours.config)  # with the same weights: they depend on the seed and their names alone
            use_loop(peer)
            check_same(name, ours, peer)


def random_data(folder: Path, vocab_size: int, block_size: int) -> None:
    """A small folder of random token ids, as moe-prepare writes one of text."""
    folder.mkdir(parents=True)
    meta = {"tokenizer": "o200k_base", "vocab_size": vocab_size, "dataset": RANDOM}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    for seed, (split, windows) in enumerate({"train": 64, "val": 1}.items()):
        ids = np.random.default_rng(seed).integers(0, vocab_size, windows * block_size + 1)
        np.save(folder / f"random_{split}_0.npy", ids.astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32))


class _Trainer(Trainer):
    def _memory_note(self) -> list[str]:
        return []  # an estimate takes as long as many steps, and `moe-bench memory` makes it


class Ours:
    """Steps of `moe-train`.

    Args:
        name: `OURS`, `OURS_PLAIN` or `LOOP`.
        config: what to train.
        world: this process among the others.
        device: where.
    """

    def __init__(self, name: str, config: TrainConfig, world: World, device: torch.device) -> None:
        keep_freed_memory()
        if name != OURS:
            config = replace(config, model=replace(config.model, **MIXTRAL_STYLE))
        if device.type == "cuda":  # memory is this run's peak, and not that of the checks before it
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        self.trainer = _Trainer(config, world, device)
        if name == LOOP:
            use_loop(self.trainer.model)
        if self.trainer.engine.scaler.is_enabled():  # fp16 leaves out steps until it has found its scale
            for _ in range(config.max_bad_steps):
                if self.trainer.train_step().applied:
                    break

    def __call__(self) -> None:
        step = self.trainer.train_step()
        if not step.applied:
            raise WrongResult(f"a gradient is not finite at step {self.trainer.iteration}: no time")
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)

    def report(self, part_steps: int) -> dict[str, Any]:
        """Bytes of memory in use now (on a GPU at the peak), and seconds of each of the next steps by part."""
        memory = memory_used(self.trainer.device)
        return {"memory": memory, "parts": parts.split(self.trainer, part_steps) if part_steps else []}

    def close(self) -> None:
        """Stop the loader's thread."""
        self.trainer.loader.close()


class Peer:
    """Steps of transformers' Mixtral with our weights, on a CPU in fp32."""

    def __init__(self, name: str, config: TrainConfig) -> None:
        self.config = config
        model = config.model_config(read_meta(config.data_dir).vocab_size)
        self.model = mixtral(Transformer(replace(model, **MIXTRAL_STYLE)), TRANSFORMERS[name])
        data = TokenDataset.open(config.data_dir, "train", config.block_size)
        self.loader = TrainLoader(data, config.batch_size, seed=config.seed)
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, betas=betas, fused=True)

    def __call__(self) -> None:
        for _ in range(self.config.grad_accum_steps):
            inputs, targets = self.loader.next_batch()
            # shift_labels: the targets are already the tokens that follow.
            loss = self.model(input_ids=inputs, labels=targets, shift_labels=targets).loss
            (loss / self.config.grad_accum_steps).backward()
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def report(self, part_steps: int) -> dict[str, Any]:
        """As `Ours.report`; whoever's model this is has no parts that we know of."""
        return {"memory": memory_used(torch.device("cpu")), "parts": []}

    def close(self) -> None:
        """Stop the loader's thread."""
        self.loader.close()


@dataclass(frozen=True)
class _Order:
    """What a process is to be."""

    name: str
    config: TrainConfig
    keep_memory: bool
    threads: int


def _serve(pipe: Connection, order: _Order) -> None:
    """A contestant's process: a step or a report for every message, until None comes; an error ends it."""
    torch.set_num_threads(order.threads)
    if order.keep_memory:
        keep_freed_memory()
    try:
        if order.name in TRANSFORMERS:
            contestant: Ours | Peer = Peer(order.name, order.config)
        else:
            contestant = Ours(order.name, order.config, World(0, 1, 0), torch.device("cpu"))
        while (message := pipe.recv()) is not None:
            pipe.send(contestant() if message == STEP else contestant.report(message))
        contestant.close()
    except KeyboardInterrupt:  # which the parent has too, and reports
        pass
    except (WrongResult, InputError, RuntimeError) as error:  # the last one also where memory runs out
        pipe.send(error)


class Remote:
    """A contestant in a process of its own, with the C library's memory setting that it is to have.

    Args:
        name: of the contestant.
        config: what to train, on a CPU.
        keep_memory: whether a peer too has `moe-train`'s memory setting.
    """

    def __init__(self, name: str, config: TrainConfig, keep_memory: bool) -> None:
        self.name, context = name, multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        order = _Order(name, config, keep_memory, torch.get_num_threads())
        self.process = context.Process(target=_serve, args=(far, order), daemon=True)
        self.process.start()
        far.close()  # so that a process that died reads as the end of the pipe

    def _ask(self, message: str | int) -> Any:
        try:
            self.pipe.send(message)
            answer = self.pipe.recv()
        except (EOFError, BrokenPipeError):
            self.process.join()
            raise RuntimeError(f"{self.name}: its process ended with status {self.process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __call__(self) -> None:
        self._ask(STEP)

    def report(self, part_steps: int) -> dict[str, Any]:
        """As `Ours.report`."""
        return self._ask(part_steps)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):  # it has ended by an error
            self.pipe.send(None)
        self.process.join()
