"""The router: its linear layer, and the losses made from its statistics.

    balance = E · Σ_e (expert_counts_e / (T·K)) · (prob_sum_e / T)      Switch Transformer (arXiv 2101.03961) eq. 4
    z_loss  = Σ_t logsumexp(z_t)² / T                                   ST-MoE (arXiv 2202.08906) eq. 5

balance is 1 when experts are used equally and E/K when all tokens go to the same K experts with all probability.
Gradients flow through prob_sum and lse_sq only; the counts are a constant.

T = tokens, E = experts, K = top_k
"""

from __future__ import annotations

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


class _WideLinear(torch.autograd.Function):
    """A linear layer in fp32 or better, also under autocast, that saves x as it came: autograd keeps a wide copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with without_autocast(x):
            return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        with without_autocast(x):
            grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
            grad_weight = (grad.t() @ x.to(grad.dtype)).to(weight.dtype)
        return grad_x, grad_weight, None if ctx.bias_dtype is None else grad.sum(0).to(ctx.bias_dtype)


class Router(nn.Module):
    """Logits of the experts, in fp32 (fp64 for fp64 weights) whatever the model's dtype.

    A module of its own so that a mixed-precision wrapper can leave its weight in fp32.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`(T, D)` → `(T, E)`."""
        return _WideLinear.apply(x, self.weight, self.bias)
