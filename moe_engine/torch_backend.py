"""The MoE graph in plain PyTorch: the CPU path for good, and any device that Triton does not reach.

    gate            z (T, E) → topk_idx, topk_weights (T, K), router statistics; one autograd function
    sort_by_expert  topk_idx → expert_offsets, permutation, inverse_permutation: a stable sort of the N = T·K slots
    expert_mlp      h = x[t] @ w_up + b_up;  a = act(h);  y = a @ w_down + b_down;  out[t] = Σ_k topk_weights · y

Backward of expert_mlp saves x, h, topk_weights and indices; `a` is recomputed, y is never needed, since the gradient
of a gate weight is ⟨dO·w_downᵀ, a⟩ + ⟨dO, b_down⟩ (SonicMoE, arXiv 2512.14080). Everything goes expert by expert, so
that the rows an elementwise pass touches are still in cache from the GEMM before it. Additions into a token's row
run in the order of the experts: two runs agree bit for bit.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k, N = T·K rows sorted by expert
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moe_engine.config import Activation
from moe_engine.router import RouterStats


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for 16-bit types; the type itself for fp32 and fp64."""
    return torch.promote_types(dtype, torch.float32)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, ...]:
        # A stable sort, not topk: equal logits go to the lower expert, and a NaN still gives valid indices.
        topk_idx = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
        log_prob = logits.log_softmax(-1)
        prob = log_prob.exp()
        topk_weights = logits.gather(1, topk_idx).softmax(-1) if renormalise else prob.gather(1, topk_idx)
        lse = logits.logsumexp(-1)
        experts = torch.arange(logits.shape[1], device=logits.device)
        counts = (topk_idx.reshape(-1, 1) == experts).sum(0, dtype=torch.int32)
        entropy = -(prob * log_prob.clamp(min=torch.finfo(logits.dtype).min)).sum()
        topk_idx = topk_idx.to(torch.int32)
        ctx.save_for_backward(logits, topk_idx, topk_weights)
        ctx.renormalise = renormalise
        ctx.mark_non_differentiable(topk_idx, counts, entropy)
        return topk_idx, topk_weights, counts, prob.sum(0), lse.square().sum(), entropy

    @staticmethod
    def backward(
        ctx: Any, _idx: None, grad_w: Tensor, _counts: None, grad_prob: Tensor, grad_lse_sq: Tensor, _ent: None
    ):
        logits, topk_idx, topk_weights = ctx.saved_tensors
        chosen = topk_idx.long()
        lse = logits.logsumexp(-1, keepdim=True)
        prob = (logits - lse).exp()
        # Gradient with respect to prob, from the statistics and, in the second mode, from the weights.
        grad_p = grad_prob.expand_as(prob)
        if not ctx.renormalise:
            grad_p = grad_p.scatter_add(1, chosen, grad_w)
        grad = prob * (grad_p - (prob * grad_p).sum(-1, keepdim=True) + 2 * grad_lse_sq * lse)
        if ctx.renormalise:
            grad_chosen = topk_weights * (grad_w - (topk_weights * grad_w).sum(-1, keepdim=True))
            grad.scatter_add_(1, chosen, grad_chosen)
        return grad, None, None


def gate(logits: Tensor, top_k: int, mode: str) -> tuple[Tensor, Tensor, RouterStats]:
    """Softmax, top-k and router statistics.

    Args:
        logits: `(T, E)` fp32 or fp64.
        top_k: experts per token K.
        mode: `softmax_over_topk` or `softmax_then_topk`, see `MoEConfig.gate`.
    Returns:
        topk_idx `(T, K)` int32, by falling logit, ties to the lower expert; topk_weights `(T, K)`; statistics.
    """
    topk_idx, topk_weights, *stats = _Gate.apply(logits, top_k, mode == "softmax_over_topk")
    return topk_idx, topk_weights, RouterStats(*stats)


def sort_by_expert(topk_idx: Tensor, expert_counts: Tensor) -> tuple[Tensor, Tensor]:
    """Order of the N = T·K routed rows, by expert and, within one, by token.

    Args:
        topk_idx: `(T, K)` int32.
        expert_counts: `(E)` int32.
    Returns:
        expert_offsets `(E + 1)` int32, exclusive; permutation `(N)` int32, sorted row → flat slot t·K + k.
    """
    permutation = torch.sort(topk_idx.reshape(-1), stable=True).indices.to(torch.int32)
    expert_offsets = torch.zeros(expert_counts.numel() + 1, dtype=torch.int32, device=topk_idx.device)
    torch.cumsum(expert_counts, 0, dtype=torch.int32, out=expert_offsets[1:])
    return expert_offsets, permutation


def _groups(expert_offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that own rows, with their rows. Reads the offsets on the host."""
    offsets = expert_offsets.tolist()
    for expert, (begin, end) in enumerate(pairwise(offsets)):
        if end > begin:
            yield expert, slice(begin, end)


def _split(h: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up halves of interleaved rows, `(n, 2F)` → two contiguous `(n, F)`, in the accumulation dtype."""
    planes = h.view(h.shape[0], -1, 2).permute(2, 0, 1)
    gate, up = planes.to(_accumulate_dtype(h.dtype), memory_format=torch.contiguous_format, copy=True)
    return gate, up


def _reaches(h: Tensor, limit: float) -> bool:
    """Whether a value lies beyond ±limit or is NaN: only then are there bounds to apply."""
    if limit == math.inf:
        return False
    low, high = torch.aminmax(h)
    return not (float(low) >= -limit and float(high) <= limit)


def _factors(h: Tensor, act: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """`g·σ(alpha·g)`, `σ(alpha·g)` and `u + offset`, each `(n, F)`."""
    gate, up = _split(h)
    if _reaches(h, act.limit):
        gate.clamp_(max=act.limit)
        up.clamp_(-act.limit, act.limit)
    if act.offset:
        up.add_(act.offset)
    s = torch.sigmoid(gate if act.alpha == 1 else gate * act.alpha)
    return gate.mul_(s), s, up


def _activation(h: Tensor, act: Activation) -> Tensor:
    """a = g·σ(alpha·g)·(u + offset), `(n, 2F)` → `(n, F)`."""
    gated, _, up = _factors(h, act)
    return gated.mul_(up).to(h.dtype)


def _activation_backward(h: Tensor, grad_a: Tensor, act: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """What backward needs of the activation.

    Args:
        h: `(n, 2F)`; grad_a: `(n, F)`.
    Returns:
        a `(n, F)`, grad_h `(n, 2F)`, and ⟨grad_a, a⟩ `(n)` in the accumulation dtype.
    """
    gated, s, up = _factors(h, act)
    grad_a = grad_a.to(gated.dtype)
    a = gated * up
    grad_scale = torch.linalg.vecdot(a, grad_a)
    grad_h = torch.empty_like(h)
    pairs = grad_h.view(h.shape[0], -1, 2)
    pairs[..., 1] = gated * grad_a
    # d(g·σ(αg))/dg = σ + α·g·σ·(1 − σ) = σ + α·gated − α·gated·σ
    slope = torch.addcmul(s, gated, s, value=-act.alpha).add_(gated, alpha=act.alpha)
    pairs[..., 0] = slope.mul_(up).mul_(grad_a)
    if _reaches(h, act.limit):  # no gradient beyond the bounds; at a bound itself it passes
        values = h.view_as(pairs)
        pairs[..., 0].masked_fill_(values[..., 0] > act.limit, 0)
        pairs[..., 1].masked_fill_(values[..., 1].abs() > act.limit, 0)
    return a.to(h.dtype), grad_h, grad_scale


@torch.library.custom_op("moe_engine::expert_mlp_torch", mutates_args=())
def _forward(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    topk_weights: Tensor,
    permutation: Tensor,
    expert_offsets: Tensor,
    alpha: float,
    offset: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    act = Activation(alpha, offset, limit)
    rows_of = permutation // topk_weights.shape[1]  # sorted row → token
    scale_of = topk_weights.reshape(-1)[permutation]
    h = x.new_empty(permutation.numel(), w_up.shape[2])
    out = x.new_zeros(x.shape, dtype=_accumulate_dtype(x.dtype))
    for e, rows in _groups(expert_offsets):
        tokens = rows_of[rows]
        h_e = h[rows]
        torch.mm(x[tokens], w_up[e], out=h_e)
        if b_up is not None:
            h_e += b_up[e]
        y = torch.mm(_activation(h_e, act), w_down[e])
        if b_down is not None:
            y += b_down[e]
        out.index_add_(0, tokens, y.to(out.dtype).mul_(scale_of[rows].unsqueeze(1)))
    return out.to(x.dtype, copy=False), h


@_forward.register_fake
def _(x, w_up, b_up, w_down, b_down, topk_weights, permutation, expert_offsets, alpha, offset, limit):
    return torch.empty_like(x), x.new_empty(permutation.numel(), w_up.shape[2])


@torch.library.custom_op("moe_engine::expert_mlp_torch_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    x: Tensor,
    h: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    topk_weights: Tensor,
    permutation: Tensor,
    expert_offsets: Tensor,
    up_bias: bool,
    alpha: float,
    offset: float,
    limit: float,
) -> list[Tensor]:
    act = Activation(alpha, offset, limit)
    rows_of = permutation // topk_weights.shape[1]
    scale_of = topk_weights.reshape(-1)[permutation]
    grad_x = x.new_zeros(x.shape, dtype=_accumulate_dtype(x.dtype))
    grad_scale = torch.empty_like(scale_of)
    grad_w_up, grad_w_down = torch.empty_like(w_up), torch.empty_like(w_down)
    grad_b_up = w_up.new_zeros(w_up.shape[0], w_up.shape[2]) if up_bias else w_up.new_empty(0)
    grad_b_down = torch.zeros_like(b_down) if b_down is not None else w_up.new_empty(0)
    idle = set(range(w_up.shape[0]))
    for e, rows in _groups(expert_offsets):
        idle.discard(e)
        tokens = rows_of[rows]
        x_e, grad_e, scale = x[tokens], grad_out[tokens], scale_of[rows].unsqueeze(1)
        # The gate weight of a row multiplies whatever is narrow, D wide, and never the rows of width F or 2F.
        a, grad_h, grad_scale_e = _activation_backward(h[rows], torch.mm(grad_e, w_down[e].t()), act)
        if b_down is not None:
            grad_scale_e += torch.mv(grad_e, b_down[e])
        grad_scale[rows] = grad_scale_e
        grad_x.index_add_(0, tokens, torch.mm(grad_h, w_up[e].t()).to(grad_x.dtype).mul_(scale))
        scale = scale.to(x.dtype)
        torch.mm(a.t(), grad_e.mul_(scale), out=grad_w_down[e])
        torch.mm(x_e.mul_(scale).t(), grad_h, out=grad_w_up[e])
        if b_down is not None:
            torch.sum(grad_e, 0, out=grad_b_down[e])
        if up_bias:
            torch.mv(grad_h.t(), scale.squeeze(1), out=grad_b_up[e])
    for e in idle:
        grad_w_up[e] = 0
        grad_w_down[e] = 0
    grad_topk_weights = torch.empty_like(topk_weights)
    grad_topk_weights.view(-1)[permutation] = grad_scale
    return [grad_x.to(x.dtype, copy=False), grad_w_up, grad_b_up, grad_w_down, grad_b_down, grad_topk_weights]


@_backward.register_fake
def _(grad_out, x, h, w_up, w_down, b_down, topk_weights, permutation, expert_offsets, up_bias, alpha, offset, limit):
    return [
        torch.empty_like(x),
        torch.empty_like(w_up),
        w_up.new_empty(w_up.shape[0], w_up.shape[2]) if up_bias else w_up.new_empty(0),
        torch.empty_like(w_down),
        torch.empty_like(b_down) if b_down is not None else w_up.new_empty(0),
        torch.empty_like(topk_weights),
    ]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, w_up, b_up, w_down, b_down, topk_weights, permutation, expert_offsets, *ctx.constants = inputs
    ctx.up_bias = b_up is not None
    ctx.save_for_backward(x, output[1], w_up, w_down, b_down, topk_weights, permutation, expert_offsets)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_out: Tensor, _grad_h: None) -> tuple:
    x, h, w_up, w_down, b_down, *routing = ctx.saved_tensors
    grads = _backward(grad_out.contiguous(), x, h, w_up, w_down, b_down, *routing, ctx.up_bias, *ctx.constants)
    grad_x, grad_w_up, grad_b_up, grad_w_down, grad_b_down, grad_weights = grads
    if not ctx.up_bias:
        grad_b_up = None
    if b_down is None:
        grad_b_down = None
    return grad_x, grad_w_up, grad_b_up, grad_w_down, grad_b_down, grad_weights, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_save)


def expert_mlp(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    topk_weights: Tensor,
    permutation: Tensor,
    expert_offsets: Tensor,
    activation: Activation,
) -> Tensor:
    """The experts' MLPs, weighted and summed into each token's row.

    Args:
        x: `(T, D)`, fp32, fp64, bf16 or fp16.
        w_up: `(E, D, 2F)`, gate and up columns interleaved; b_up: `(E, 2F)` or None; of x's dtype.
        w_down: `(E, F, D)`; b_down: `(E, D)` or None.
        topk_weights: `(T, K)` fp32 (fp64 for fp64 inputs).
        permutation, expert_offsets: from `sort_by_expert`.
        activation: constants of the gated activation.
    Returns:
        `(T, D)` in x's dtype. Differentiable in x, the weights, the biases and topk_weights.
    """
    out, _ = _forward(x, w_up, b_up, w_down, b_down, topk_weights, permutation, expert_offsets, *activation)
    return out
