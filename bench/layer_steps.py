"""What the layer benchmark runs: inputs with the wanted routing, steps of a layer, the GEMMs alone, and their memory.

A step is forward and backward of one layer on fixed inputs. Everybody routes by a router of his own, so the routing is
in x and in the router's weights: the first E columns of x carry the logits, and the weight is a multiple of the
identity. That multiple is a power of two, the largest logit of a token is 0, and those that decide about a token's
experts lie `GAP` apart: in 16 bits the same experts are chosen, in the same order, as in fp64.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k, N = T·K
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import profiler_legacy

from moe_engine import MoEConfig, MoELayer, torch_backend
from moe_engine.bench.layer_peers import STYLES
from moe_engine.bench.shapes import DTYPES, routing
from moe_engine.train.device import memory_total
from moe_engine.train.errors import InputError

GAP = 0.25
"""Between the logits of a token that are chosen, and to the others: 16 roundings of bfloat16 at such values."""
CHECKED = 256
"""Tokens whose gradients are checked."""


@dataclass(frozen=True)
class Problem:
    """What is measured.

    Attributes:
        device, dtype: of everything; dtype is a key of `shapes.DTYPES`.
        tokens, d_model, d_ff, experts, top_k: sizes.
        routing: one of `shapes.ROUTING`.
    """

    device: torch.device
    dtype: str
    tokens: int
    d_model: int
    d_ff: int
    experts: int
    top_k: int
    routing: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch has it."""
        return getattr(torch, DTYPES[self.dtype])

    def settings(self) -> dict[str, Any]:
        """What makes two rows comparable."""
        return {name: value for name, value in vars(self).items() if name != "device"}

    def config(self, style: str, **changes: Any) -> MoEConfig:
        """Our layer in the manner of a key of `layer_peers.STYLES`."""
        return MoEConfig(self.d_model, self.d_ff, self.experts, self.top_k, **STYLES[style], **changes)

    def flops(self) -> int:
        """Multiplications and additions of the GEMMs: three of each projection's N·D·F or N·D·2F products."""
        return 2 * 3 * self.tokens * self.top_k * self.d_model * 3 * self.d_ff

    def normal(self, *shape: int, seed: int) -> Tensor:
        """Standard normal values on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(self.torch_dtype)


class Inputs(NamedTuple):
    """`x` and `grad_out` `(1, T, D)`, and `sample`, the tokens whose gradients are checked."""

    x: Tensor
    grad_out: Tensor
    sample: Tensor


class Routing(NamedTuple):
    """The router's `weight (E, D)` and `bias (E)` or None, and `counts`, the rows that each expert gets by them."""

    weight: Tensor
    bias: Tensor | None
    counts: list[int]


def make_inputs(problem: Problem, router_bias: bool) -> tuple[Inputs, Routing]:
    """Inputs whose first columns carry the logits of `shapes.routing`, moved as the module's docstring says."""
    p, device = problem, problem.device
    logits = routing(p.routing, p.tokens, p.experts, p.top_k)
    order = logits.argsort(dim=1, descending=True, stable=True)
    logits -= logits.amax(1, keepdim=True) + GAP * order.argsort(1).clamp(max=p.top_k)
    bias = (torch.arange(p.experts) % 5 - 2) / 8 if router_bias else torch.zeros(p.experts)  # exact in 16 bits
    columns = logits - bias
    scale = 2.0 ** round(math.log2(float(columns.square().mean().sqrt()) or 1))

    x, grad_out = (p.normal(1, p.tokens, p.d_model, seed=seed) for seed in (1, 2))
    x[0, :, : p.experts] = (columns / scale).to(x)
    weight = scale * torch.eye(p.experts, p.d_model, device=device, dtype=p.torch_dtype)
    sample = torch.linspace(0, p.tokens - 1, min(p.tokens, CHECKED), device=device).round().long()
    counts = torch.bincount(order[:, : p.top_k].flatten(), minlength=p.experts).tolist()
    return Inputs(x, grad_out, sample), Routing(weight, bias.to(weight) if router_bias else None, counts)


def make_layer(problem: Problem, routed: Routing, style: str, backend: str) -> MoELayer:
    """Our layer, with weights of the size that trained ones have and a router that routes as it shall.

    Raises:
        InputError: the backend cannot run here.
    """
    try:
        with torch.device("meta"):
            layer = MoELayer(problem.config(style, backend=backend))
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0].removeprefix("backend: ")
        raise InputError(f"--backend {backend}: {reason}") from None
    layer = layer.to(problem.torch_dtype).to_empty(device=problem.device)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            size = 0.3 if parameter.dim() < 3 else parameter.shape[1] ** -0.5  # biases, and 1/√fan_in
            parameter.copy_(problem.normal(*parameter.shape, seed=10 + number).mul_(size))
        layer.router.weight.copy_(routed.weight)
        if routed.bias is not None:
            layer.router.bias.copy_(routed.bias)
    return layer


def with_save(layer: MoELayer, save: str) -> MoELayer:
    """The same layer, on the same memory, that keeps something else for backward."""
    with torch.device("meta"):
        other = MoELayer(replace(layer.config, save=save))
    other.load_state_dict(layer.state_dict(), assign=True)
    return other


class Step:
    """Forward and backward of a layer on fixed inputs.

    Args:
        layer: `(1, T, D)` → its output, or a tuple that begins with it.
        inputs: see `Inputs`.
        ours: from the gradients of its parameters to those of `MoELayer`'s.
    """

    def __init__(
        self, layer: nn.Module, inputs: Inputs, ours: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    ) -> None:
        self.layer, self.inputs, self.ours = layer, inputs, ours
        self.x = inputs.x.clone().requires_grad_()
        self.names, leaves = zip(*layer.named_parameters(), strict=True)
        self.leaves = [self.x, *leaves]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out

    def backward(self, out: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x and of the parameters."""
        return torch.autograd.grad(out, self.leaves, grad_out)

    def __call__(self) -> None:
        self.backward(self.forward(self.x), self.inputs.grad_out)

    def results(self) -> dict[str, Tensor]:
        """The output of all tokens, and all gradients for a `grad_out` that is zero outside the sample."""
        grad_out, sample = torch.zeros_like(self.inputs.grad_out), self.inputs.sample
        grad_out[:, sample] = self.inputs.grad_out[:, sample]
        out = self.forward(self.x)
        grad_x, *grads = self.backward(out, grad_out)
        return {"out": out[0].detach(), "x": grad_x[0]} | self.ours(dict(zip(self.names, grads, strict=True)))


def free_memory(device: torch.device) -> int:
    """Bytes that tensors can still have."""
    if device.type != "cuda":
        return memory_total(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class _Allocations:
    """A context that sees what PyTorch's allocator for CPUs gives and takes back in this thread.

    Attributes:
        sizes: bytes, in order; negative where memory was given back.
    """

    def __enter__(self) -> _Allocations:
        # The older profiler, since the newer one writes to the terminal; and no dispatch mode, since under one autograd
        # adds no gradients in place, which costs some peers a quarter of their peak.
        torch.autograd._enable_profiler_legacy(profiler_legacy.profile(profile_memory=True).config())
        return self

    def __exit__(self, *_exception: object) -> None:
        records = torch.autograd._disable_profiler_legacy()
        events = (event for thread in records for event in thread)
        self.sizes = [event.cpu_memory_usage() for event in events if event.kind() == "memory_alloc"]


def memory(step: Step) -> dict[str, int]:
    """Bytes of a step that it takes now: what forward keeps for backward, and the peak of all that a step makes.

    Weights stand apart, and so does what forward returns. The layer's input counts where the layer keeps it: it is a
    copy that nobody else holds. On a GPU sizes are rounded up to 512 bytes; on a CPU the step has one thread.
    """
    device, threads = step.x.device, torch.get_num_threads()
    gc.collect()  # what others have left is not to be freed in between
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        out = step.forward(step.x.clone())
        kept = torch.cuda.memory_allocated(device) - before
        step.backward(out, step.inputs.grad_out)
        peak = torch.cuda.max_memory_allocated(device) - before
        return {"saved_bytes": kept - -(-out.untyped_storage().nbytes() // 512) * 512, "peak_bytes": peak}
    torch.set_num_threads(1)  # other threads would not be seen
    try:
        with _Allocations() as forward:
            out = step.forward(step.x.clone())
        with _Allocations() as backward:
            step.backward(out, step.inputs.grad_out)
    finally:
        torch.set_num_threads(threads)
    peak = max(itertools.accumulate(forward.sizes + backward.sizes))
    return {"saved_bytes": sum(forward.sizes) - out.untyped_storage().nbytes(), "peak_bytes": peak}


class Blas:
    """The layer's GEMMs and nothing else, forward then backward, on rows that lie by expert.

    Args:
        problem: sizes.
        counts: rows of each expert.
        side_by_side: on a CPU, experts on a thread each, or one after the other on all threads.
    """

    def __init__(self, problem: Problem, counts: Sequence[int], side_by_side: bool) -> None:
        p, n, ends = problem, sum(counts), torch.tensor(counts).cumsum(0).tolist()
        d, f, e = p.d_model, p.d_ff, p.experts
        self.groups = [(i, slice(end - count, end)) for i, (end, count) in enumerate(zip(ends, counts, strict=True))]
        self.threads = torch.get_num_threads() if side_by_side else 1
        self.x, self.a, self.grad_y, self.grad_h = (
            p.normal(n, width, seed=seed) for seed, width in enumerate((d, f, d, 2 * f))
        )
        self.w_up, self.w_down = p.normal(e, d, 2 * f, seed=4), p.normal(e, f, d, seed=5)
        self.h, self.y, self.grad_a, self.grad_x = (self.x.new_empty(n, width) for width in (2 * f, d, f, d))
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
