"""The router: its linear layer, and the losses made from its statistics.

    balance = E · Σ_e (expert_counts_e / (T·K)) · (prob_sum_e / T)      Switch Transformer (arXiv 2101.03961) eq. 4
    z_loss  = Σ_t logsumexp(z_t)² / T                                   ST-MoE (arXiv 2202.08906) eq. 5

balance is 1 when experts are used equally and E/K when all tokens go to the same K experts with all probability.
Gradients flow through prob_sum and lse_sq only; the counts are a constant.

Without a loss, experts are balanced by a bias that only the choice of experts sees, moved after each optimizer step
(Wang et al., arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2):

    topk_idx = top-K of z + select_bias      select_bias_e += rate · sign(mean of expert_counts − expert_counts_e)

T = tokens, E = experts, K = top_k
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_engine.config import MoEConfig


class RouterStats(NamedTuple):
    """What one MoE layer's router did with T tokens; a model stacks them along a leading layer dimension.

    Attributes:
        expert_counts: `(…, E)` int32, rows given to each expert; sums to T·K.
        prob_sum: `(…, E)` fp32, Σ_t softmax(z_t); differentiable.
        lse_sq: `(…)` fp32, Σ_t logsumexp(z_t)²; differentiable.
        entropy: `(…)` fp32, −Σ_t Σ_e p log p in nats; for logs.
    """

    expert_counts: Tensor
    prob_sum: Tensor
    lse_sq: Tensor
    entropy: Tensor

    def tokens(self, top_k: int) -> Tensor:
        """T of each layer, from the counts, on the device: `(…)` fp32, at least 1 so that it can divide."""
        return (self.expert_counts.sum(-1) / top_k).clamp(min=1)


def balance_loss(stats: RouterStats, top_k: int, expert_counts: Tensor | None = None) -> Tensor:
    """Load-balancing loss, `(…)` fp32, 1 = balanced.

    Args:
        stats: of one layer, or stacked.
        top_k: experts per token.
        expert_counts: counts to use in place of the statistics' own, e.g. summed over data-parallel ranks
            (global-batch balance); same shape.
    """
    counts = (stats.expert_counts if expert_counts is None else expert_counts).to(stats.prob_sum.dtype)
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    prob = stats.prob_sum / stats.tokens(top_k).unsqueeze(-1)
    return share.shape[-1] * (share * prob).sum(-1)


def z_loss(stats: RouterStats, top_k: int) -> Tensor:
    """Router z-loss, `(…)` fp32: mean over tokens of the squared log-sum-exp of the logits."""
    return stats.lse_sq / stats.tokens(top_k)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which products on the tensor's device keep the dtypes that they are given."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class JitterKey(NamedTuple):
    """What a router's noise is drawn from, so that a second run of the layer, or of the training step, draws it again.

    Attributes:
        seed: of the run.
        layer: of the model.
        sequence: number of the first sequence of the batch in the run, over all ranks; the others follow on it.
    """

    seed: int
    layer: int
    sequence: int


@torch.library.custom_op("moe_engine::router_jitter", mutates_args=())
def _jitter(x: Tensor, epsilon: float, seed: int, layer: int, sequence: int) -> Tensor:
    """Factors from uniform(1 − epsilon, 1 + epsilon), fp32 of x's shape; each sequence `x[i]` has its own generator.

    What a sequence gets does not depend on the batch, or rank, that it is in. x is `(B, T, D)`, or `(T, D)` for one
    sequence. Factors are fp32, since in 16 bits a small one would be rounded to 1. An operation, since torch.compile
    cannot look into generators.
    """
    factors = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for i, part in enumerate(factors if factors.dim() > 2 else factors.unsqueeze(0)):
        # 32 bits, since the generator of a CPU drops all above them.
        generator = torch.Generator(x.device).manual_seed(zlib.crc32(f"{seed} {layer} {sequence + i}".encode()))
        part.uniform_(1 - epsilon, 1 + epsilon, generator=generator)
    return factors


@_jitter.register_fake
def _(x, epsilon, seed, layer, sequence):
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


class _WideLinear(torch.autograd.Function):
    """A linear layer in fp32 or better, also under autocast, that saves x as it came: autograd keeps a wide copy.

    With noise, what `_jitter` takes besides x, its input is x with noise; backward draws the factors again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, noise: tuple[float, int, int, int] | None
    ) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.noise = noise
        rows = (x if noise is None else x * _jitter(x, *noise)).reshape(-1, x.shape[-1])
        with without_autocast(x):
            return F.linear(rows.to(wide), weight.to(wide), None if bias is None else bias.to(wide))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        noisy, factors = x, None
        if ctx.noise is not None:
            factors = _jitter(x.detach(), *ctx.noise)
            noisy = x * factors
        with without_autocast(x):
            grad_x = (grad @ weight.to(grad.dtype)).to(noisy.dtype).view(x.shape)
            grad_weight = (grad.t() @ noisy.reshape(-1, x.shape[-1]).to(grad.dtype)).to(weight.dtype)
        if factors is not None:
            grad_x = (grad_x * factors).to(x.dtype)
        return grad_x, grad_weight, None if ctx.bias_dtype is None else grad.sum(0).to(ctx.bias_dtype), None


class Router(nn.Module):
    """Logits of the experts, in fp32 (fp64 for fp64 weights) whatever the model's dtype.

    A module of its own so that a mixed-precision wrapper can leave its weight in fp32.

    Attributes:
        select_bias: with `router_balance="bias"` a buffer `(E)`, always fp32, that the choice of experts adds to the
            logits; else None. Not a parameter: `update_select_bias` moves it.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None
        self.epsilon = config.router_jitter
        balanced = config.router_balance == "bias"
        self.register_buffer("select_bias", torch.zeros(config.num_experts, dtype=torch.float32) if balanced else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Let select_bias go where the rest goes, but stay in fp32: in 16 bits small steps would be lost."""
        bias = self.select_bias
        if bias is None:
            return super()._apply(fn, recurse)
        self.select_bias = None
        try:
            super()._apply(fn, recurse)
            moved = fn(bias)
            bias = moved if moved.dtype == bias.dtype else bias.to(moved.device)
        finally:
            self.select_bias = bias
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also what `load_state_dict(assign=True)` puts in place is fp32."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.select_bias is not None:
            self.select_bias = self.select_bias.float()

    @torch.no_grad()
    def update_select_bias(self, expert_counts: Tensor, rate: float) -> None:
        """Move select_bias by ±rate: up where an expert had fewer rows than the mean, down where it had more.

        Args:
            expert_counts: `(E)` integers, rows of each expert in the optimizer step, over all ranks and micro-steps.
            rate: size of the move.
        """
        counts = expert_counts.long()
        self.select_bias.add_(torch.sign(counts.sum() - counts.numel() * counts), alpha=rate)

    def forward(self, x: Tensor, jitter_key: JitterKey | None = None) -> Tensor:
        """`(…, D)` → `(T, E)`; the key: what the noise of `router_jitter` is drawn from, and for whole sequences x."""
        noise = (self.epsilon, *jitter_key) if self.epsilon and jitter_key is not None else None
        return _WideLinear.apply(x, self.weight, self.bias, noise)
