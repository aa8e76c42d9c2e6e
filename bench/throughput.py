"""Training steps per second against transformers' Mixtral of the same shape, interleaved in one run.

    python -m moe_engine.bench.throughput --preset tiny --batch_size 8 --block_size 256 --rounds 30

Both compute the same function from the same weights, which is checked first: a model whose loss or gradient differs has
no time. A step is forward, loss with load balancing, backward, clipping by the global norm, fused AdamW. Both run
in this process, with the memory setting that `moe-train` makes (`--keep_freed_memory false`: without it).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_engine import Transformer, preset
from moe_engine.bench.peers import MIXTRAL_STYLE, mixtral
from moe_engine.bench.runner import append_rows, interleave, row
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
    keep_freed_memory: bool = option(True, "the C library's memory setting that moe-train makes, for all models")
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


def throughput(config: ThroughputConfig) -> int:
    """Check, measure, print a table; returns the exit status."""
    if config.keep_freed_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    plain = Transformer(preset(config.preset, **MIXTRAL_STYLE))
    shape = (config.batch_size, config.block_size + 1)
    tokens = torch.randint(0, plain.config.vocab_size, shape)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    models: dict[str, tuple[torch.nn.Module, Callable[..., Step]]] = {
        "moe_engine, gpt-oss style": (Transformer(preset(config.preset)), _ours),
        "moe_engine, Mixtral style": (plain, _ours),
    }
    for experts in ("grouped_mm", "eager"):
        name = f"transformers Mixtral, {experts}"
        peer = mixtral(plain, experts)
        check_same(name, plain, peer, inputs, targets)
        models[name] = (peer, _theirs)
    steps = {name: _training_step(model, make(model, inputs, targets)) for name, (model, make) in models.items()}
    seconds = interleave(steps, config.rounds)

    size: dict[str, Any] = {name: getattr(config, name) for name in ("preset", "batch_size", "block_size")}
    rows = [
        row("throughput", name, s, **size, tokens=inputs.numel(), keep_freed_memory=config.keep_freed_memory)
        for name, s in seconds.items()
    ]
    reference = seconds["transformers Mixtral, grouped_mm"]
    print(f"{config.preset}, {config.batch_size} × {config.block_size} tokens, {rows[0]['device']}")
    print(f"{'training step':36}{'ms p20':>9}{'p50':>9}{'p80':>9}{'tok/s':>9}{'× grouped_mm':>14}")
    for r in rows:
        # The ratio of steps taken side by side, not of two medians.
        r["ratio"] = float(torch.tensor(reference / seconds[r["name"]]).median())
        times = "".join(f"{1e3 * r[p]:9.1f}" for p in ("p20", "p50", "p80"))
        print(f"{r['name']:36}{times}{r['tokens'] / r['p50']:9.0f}{r['ratio']:14.2f}")
    if config.output:
        append_rows(Path(config.output), rows)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("python -m moe_engine.bench.throughput", ThroughputConfig, throughput, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
