"""Training steps per second against transformers' Mixtral of the same shape, interleaved in one run.

    python -m moe_engine.bench.throughput --preset tiny --batch_size 8 --block_size 256 --rounds 30

Both compute the same function from the same weights, which is checked first: a model whose loss or gradient differs has
no time. A step is forward, loss with load balancing, backward, clipping by the global norm, fused AdamW. Each model
lives in a process of its own and only one of them computes at a time. `--memory own` gives each the C library's memory
setting that its users have (ours: what `moe-train` sets; theirs: the default); `--memory same` gives ours to all.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_engine import Transformer, preset
from moe_engine.bench.peers import MIXTRAL_STYLE, mixtral
from moe_engine.bench.runner import append_rows, interleave, make_row
from moe_engine.presets import PRESETS
from moe_engine.router import balance_loss
from moe_engine.train.cli import run_command
from moe_engine.train.device import keep_freed_memory
from moe_engine.train.errors import InputError
from moe_engine.train.options import option

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


@dataclass(frozen=True)
class ThroughputConfig:
    """Options of the benchmark."""

    preset: str = option("tiny", "model size", choices=tuple(PRESETS))
    batch_size: int = option(8, "sequences per step")
    block_size: int = option(256, "tokens per sequence")
    rounds: int = option(30, "timed steps of each model")
    memory: str = option(
        "own", "C library's memory setting: each its own, or moe-train's for all", choices=("own", "same")
    )
    output: str | None = option(None, "JSONL file to append the rows to")


Step = Callable[[], Tensor]


def _ours(model: Transformer, inputs: Tensor, targets: Tensor) -> Step:
    def loss() -> Tensor:
        out = model(inputs, targets)
        return out.loss / targets.numel() + 0.005 * balance_loss(out.stats, model.config.top_k).sum()

    return loss


def _theirs(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    # shift_labels: the targets are already the tokens that follow.
    return lambda: model(input_ids=inputs, labels=targets, shift_labels=targets).loss


def _training_step(model: torch.nn.Module, loss: Step) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def check_same(name: str, ours: Transformer, peer: torch.nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Hold a peer's cross-entropy and the gradient of its embedding against ours.

    Raises:
        InputError: they differ, so a time would compare different things.
    """
    results = []
    for model in (ours, peer):
        if model is ours:
            loss = ours(inputs, targets).loss / targets.numel()
        else:
            logits = model(input_ids=inputs).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
        embedding = model.get_parameter("embedding.weight" if model is ours else "model.embed_tokens.weight")
        results.append((float(loss.detach()), torch.autograd.grad(loss, embedding)[0]))
    (loss, grad), (peer_loss, peer_grad) = results
    error = float((grad - peer_grad).norm() / grad.norm())
    if not (abs(loss - peer_loss) <= LOSS_TOLERANCE * abs(loss) and error <= GRADIENT_TOLERANCE):
        raise InputError(f"{name}: loss {peer_loss} against {loss}, gradient apart by {error:.1e}: not the same model")


OURS, OURS_PLAIN = "moe_engine, gpt-oss style", "moe_engine, Mixtral style"
PEERS = {f"transformers Mixtral, {experts}": experts for experts in ("grouped_mm", "eager")}
REFERENCE = next(iter(PEERS))


def _batch(config: ThroughputConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, config.block_size + 1)
    tokens = torch.randint(0, preset(config.preset).vocab_size, shape, generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _make(name: str, config: ThroughputConfig) -> tuple[torch.nn.Module, Callable[..., Step]]:
    if name == OURS:
        return Transformer(preset(config.preset)), _ours
    plain = Transformer(preset(config.preset, **MIXTRAL_STYLE))
    return (plain, _ours) if name == OURS_PLAIN else (mixtral(plain, PEERS[name]), _theirs)


def _serve(pipe: Connection, name: str, config: ThroughputConfig, threads: int) -> None:
    """A model's process: one training step for every message, until there are no more."""
    torch.set_num_threads(threads)
    if config.memory == "same" or name not in PEERS:
        keep_freed_memory()
    model, loss = _make(name, config)
    step = _training_step(model, loss(model, *_batch(config)))
    while pipe.recv():
        step()
        pipe.send(None)


class _Remote:
    """A model in a process of its own; called, it takes one training step."""

    def __init__(self, name: str, config: ThroughputConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, name, config, torch.get_num_threads()), daemon=True)
        self.process.start()
        far.close()  # so that a process that died reads as the end of the pipe

    def __call__(self) -> None:
        self.pipe.send(True)
        self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(False)
        self.process.join()


def throughput(config: ThroughputConfig) -> int:
    """Check, measure, print a table; returns the exit status."""
    inputs, targets = _batch(config)
    plain, _ = _make(OURS_PLAIN, config)
    for name in PEERS:
        check_same(name, plain, _make(name, config)[0], inputs, targets)
    remotes = {name: _Remote(name, config) for name in (OURS, OURS_PLAIN, *PEERS)}
    seconds = interleave(remotes, config.rounds)
    for remote in remotes.values():
        remote.close()

    settings: dict[str, Any] = asdict(config) | {"tokens": inputs.numel()}
    del settings["output"], settings["rounds"]
    rows = [make_row("throughput", name, settings, seconds=s) for name, s in seconds.items()]
    print(
        f"{config.preset}, {config.batch_size} × {config.block_size} tokens, {rows[0]['device']}, "
        f"memory setting: {config.memory}"
    )
    print(f"{'training step':36}{'ms p20':>9}{'p50':>9}{'p80':>9}{'tok/s':>9}{'× grouped_mm':>14}")
    for r in rows:
        # The median of ratios of steps taken side by side, not a ratio of medians.
        r["ratio"] = float(np.median(seconds[REFERENCE] / seconds[r["name"]]))
        times = "".join(f"{1e3 * r[p]:9.1f}" for p in ("p20", "p50", "p80"))
        print(f"{r['name']:36}{times}{inputs.numel() / r['p50']:9.0f}{r['ratio']:14.2f}")
    if config.output:
        append_rows(Path(config.output), rows)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("python -m moe_engine.bench.throughput", ThroughputConfig, throughput, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
