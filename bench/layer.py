"""One MoE layer, forward and backward, against the GEMMs it cannot do without and against transformers' Mixtral block.

    moe-bench layer --tokens 2048 --d_model 512 --d_ff 1024 --rounds 30

Everything is timed in one process, interleaved, with the memory setting that `moe-train` makes. "BLAS" is `torch.mm` on
dense rows, N/E for every expert, into outputs that are there already: the up- and the down-projection, and of either
the gradients of input and weight. It is called in two ways, experts side by side on a thread each and one after the
other on all threads, and the faster is what the ratios are over. The layer in Mixtral's manner computes what the peers
do, from the same weights; in gpt-oss's manner it has biases and the bounded activation besides. Outputs and gradients
are held against `moe_engine.reference` in fp64 first: what differs gets no time.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k, N = T·K
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_engine import MoEConfig, MoELayer, reference, torch_backend
from moe_engine.bench.layer_peers import from_mixtral_block, mixtral_block
from moe_engine.bench.runner import append_rows, interleave, make_row
from moe_engine.testing import normal, parameters, relative_error
from moe_engine.train.cli import run_command
from moe_engine.train.device import keep_freed_memory
from moe_engine.train.errors import InputError
from moe_engine.train.options import option

TOLERANCE = 1e-5
"""Root mean square error of a result, relative, to the largest one where it is to be zero; fp32 has some 1e-6 of it."""

STYLES: dict[str, dict[str, Any]] = {
    "mixtral": {"activation": "swiglu", "expert_bias": False, "router_bias": False},
    "gpt-oss": {},
}
PEERS = ("grouped_mm", "eager")


@dataclass(frozen=True)
class LayerConfig:
    """Options of the benchmark."""

    tokens: int = option(2048, "tokens T")
    d_model: int = option(512, "model width D")
    d_ff: int = option(1024, "hidden width F of one expert")
    experts: int = option(8, "number of experts E")
    top_k: int = option(2, "experts per token K")
    rounds: int = option(30, "timed rounds")
    style: str = option(
        "both", "our layer in Mixtral's manner beside its peers, in gpt-oss's, or both", choices=("both", *STYLES)
    )
    output: str | None = option(None, "JSONL file to append the rows to")

    def __post_init__(self) -> None:
        limits = {"experts": 256, "top_k": min(self.experts, 8)}
        for name in ("tokens", "d_model", "d_ff", "experts", "top_k", "rounds"):
            value, most = getattr(self, name), limits.get(name)
            if value < 1 or (most is not None and value > most):
                expected = "at least 1" if most is None else f"1 … {most}"
                raise InputError(f"--{name}: expected {expected}, got {value}")


class Step:
    """Forward and backward of a layer on fixed inputs.

    Args:
        layer: `(…, D)` → its output, or a tuple that begins with it.
        x, grad_out: `(1, T, D)`.
        ours: from the gradients of its parameters to those of `MoELayer`'s.
    """

    def __init__(
        self,
        layer: nn.Module,
        x: Tensor,
        grad_out: Tensor,
        ours: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    ) -> None:
        self.layer, self.grad_out, self.ours = layer, grad_out, ours
        self.x = x.clone().requires_grad_()
        self.names, leaves = zip(*layer.named_parameters(), strict=True)
        self.leaves = [self.x, *leaves]

    def __call__(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = self.layer(self.x)
        out = out[0] if isinstance(out, tuple) else out
        return out, torch.autograd.grad(out, self.leaves, self.grad_out)

    def results(self) -> dict[str, Tensor]:
        """The output and all gradients, by `MoELayer`'s names."""
        out, (grad_x, *grads) = self()
        return {"out": out[0], "x": grad_x[0]} | self.ours(dict(zip(self.names, grads, strict=True)))


def exact_results(layer: MoELayer, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """What `Step.results` has to be, in fp64."""
    leaves = {"x": x[0]} | dict(layer.named_parameters())
    leaves = {name: value.detach().double().requires_grad_() for name, value in leaves.items()}
    out = reference.moe(leaves["x"], {name: value for name, value in leaves.items() if name != "x"}, layer.config).out
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out[0].double())
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def check(name: str, results: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Hold results against exact ones.

    Raises:
        InputError: one is missing or differs, so a time would compare different things.
    """
    if results.keys() != exact.keys():
        raise InputError(f"{name}: has {', '.join(sorted(results))}; the reference {', '.join(sorted(exact))}")
    largest = max(float(value.square().mean().sqrt()) for value in exact.values())
    for which, value in exact.items():
        if value.any():
            error = relative_error(results[which], value).typical
        else:  # what cancels, as all of the router's gradient does with one expert a token: over the largest result
            error = float((results[which].double() - value).square().mean().sqrt()) / largest
        if not error <= TOLERANCE:
            what = which if which == "out" else f"the gradient of {which}"
            raise InputError(f"{name}: {what} is off by {error:.1e}, more than {TOLERANCE:.0e}: not the same layer")


class Blas:
    """The layer's GEMMs and nothing else, forward then backward.

    Args:
        config: sizes.
        side_by_side: experts on a thread each, or one after the other on all threads.
    """

    def __init__(self, config: LayerConfig, side_by_side: bool) -> None:
        n, d, f, e = config.tokens * config.top_k, config.d_model, config.d_ff, config.experts
        bounds = [n * i // e for i in range(e + 1)]
        self.groups = [(i, slice(*bounds[i : i + 2])) for i in range(e)]
        self.threads = torch.get_num_threads() if side_by_side else 1
        self.x, self.a, self.grad_y, self.grad_h = (
            normal(n, width, seed=seed, dtype=torch.float32) for seed, width in enumerate((d, f, d, 2 * f))
        )
        self.w_up, self.w_down = normal(e, d, 2 * f, dtype=torch.float32), normal(e, f, d, dtype=torch.float32)
        self.h, self.y = torch.empty(n, 2 * f), torch.empty(n, d)
        self.grad_a, self.grad_x = torch.empty(n, f), torch.empty(n, d)
        self.grad_w_up, self.grad_w_down = torch.empty_like(self.w_up), torch.empty_like(self.w_down)

    def _forward(self, group: tuple[int, slice]) -> None:
        e, rows = group
        torch.mm(self.x[rows], self.w_up[e], out=self.h[rows])
        torch.mm(self.a[rows], self.w_down[e], out=self.y[rows])

    def _backward(self, group: tuple[int, slice]) -> None:
        e, rows = group
        torch.mm(self.grad_y[rows], self.w_down[e].t(), out=self.grad_a[rows])
        torch.mm(self.grad_h[rows], self.w_up[e].t(), out=self.grad_x[rows])
        torch.mm(self.a[rows].t(), self.grad_y[rows], out=self.grad_w_down[e])
        torch.mm(self.x[rows].t(), self.grad_h[rows], out=self.grad_w_up[e])

    def __call__(self) -> None:
        for work in (self._forward, self._backward):
            if self.threads > 1:
                torch_backend.side_by_side(work, self.groups, self.threads)
            else:
                for group in self.groups:
                    work(group)


def flops(config: LayerConfig) -> int:
    """Multiplications and additions of the GEMMs: three of each projection's N·D·F or N·D·2F products."""
    return 2 * 3 * config.tokens * config.top_k * config.d_model * 3 * config.d_ff


def steps(config: LayerConfig) -> dict[str, Step]:
    """Our layer and its peers, checked.

    Raises:
        InputError: one of them computes something else.
    """
    shape = (1, config.tokens, config.d_model)
    x, grad_out = (normal(*shape, seed=seed, dtype=torch.float32) for seed in (1, 2))
    found: dict[str, Step] = {}
    for style in STYLES if config.style == "both" else [config.style]:
        layer = MoELayer(MoEConfig(config.d_model, config.d_ff, config.experts, config.top_k, **STYLES[style]))
        values = {name: value.float() for name, value in parameters(layer).items()}
        if "router.bias" in values:
            values["router.bias"].zero_()  # as at initialisation: experts get about N/E rows, as BLAS has them
        layer.load_state_dict(values)
        exact, made = exact_results(layer, x, grad_out), {f"moe_engine, {style}": Step(layer, x, grad_out)}
        if style == "mixtral":
            for experts in PEERS:
                block = mixtral_block(layer, experts)
                made[f"transformers Mixtral, {experts}"] = Step(block, x, grad_out, from_mixtral_block)
        for name, step in made.items():
            check(name, step.results(), exact)
        found |= made
    return found


def layer(config: LayerConfig) -> int:
    """Check, measure, print a table; returns the exit status."""
    keep_freed_memory()
    blas = {"BLAS, one after the other": Blas(config, side_by_side=False)}
    if torch.get_num_threads() > 1:
        blas["BLAS, experts side by side"] = Blas(config, side_by_side=True)
    seconds = interleave({**blas, **steps(config)}, config.rounds)
    fastest = min(blas, key=lambda name: float(np.median(seconds[name])))

    settings: dict[str, Any] = asdict(config)
    del settings["output"], settings["rounds"]
    rows = [
        make_row("layer", name, s, **settings, flops=flops(config), baseline=fastest) for name, s in seconds.items()
    ]
    print(
        f"T {config.tokens}, D {config.d_model}, F {config.d_ff}, E {config.experts}, K {config.top_k}, fp32, "
        f"{rows[0]['device']}, forward and backward, {config.rounds} rounds"
    )
    print(f"{'':34}{'ms p20':>9}{'p50':>9}{'p80':>9}{'GFLOP/s':>9}{'× BLAS':>9}")
    for r in rows:
        # The median of ratios of calls made side by side, not a ratio of medians.
        r["ratio"] = float(np.median(seconds[r["name"]] / seconds[fastest]))
        times = "".join(f"{1e3 * r[p]:9.1f}" for p in ("p20", "p50", "p80"))
        print(f"{r['name']:34}{times}{r['flops'] / r['p50'] / 1e9:9.1f}{r['ratio']:9.3f}")
    if config.output:
        append_rows(Path(config.output), rows)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("moe-bench layer", LayerConfig, layer, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
