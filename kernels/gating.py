"""Gating with router statistics, in one pass over the logits.

    p = softmax(z)                               over a token's E logits
    topk_idx     = the K largest z (+ b)         ties to the lower expert; b: `select_bias`, (E)
    topk_weights = softmax(z[topk_idx])          softmax_over_topk   (gpt-oss, Mixtral)
                 = p[topk_idx]                   softmax_then_topk   (OLMoE)
    prob_sum = Σ_t p    lse_sq = Σ_t logsumexp(z_t)²    entropy = −Σ_t Σ_e p log p

Two launches. The first gives the choice, the weights and the statistics of each block of tokens. The second, a single
program, adds the blocks' statistics in their order and scans the blocks' counts: where each expert's rows begin, and
where, among them, each block's do. That is the counting half of the counting sort in `permutation.py`.

With gw, gP and gl the gradients of topk_weights, prob_sum and lse_sq, and ĝw the gw scattered to the chosen experts:

    softmax_over_topk   dz = p ⊙ (gP − Σ_e p·gP + 2·gl·lse) + scatter(w ⊙ (gw − Σ_k w·gw))
    softmax_then_topk   dz = p ⊙ (ĝ − Σ_e p·ĝ + 2·gl·lse),   ĝ = gP + ĝw

The bias decides which experts are chosen and nothing else: weights, statistics and gradients are those of z (balancing
without a loss: Wang et al., arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

Saved: logits, topk_idx, topk_weights; p is computed again. Mathematics in fp32.

NaN: a token's choice is made on integers that order the logits, so that it is K different experts whatever they hold;
NaN comes before everything, as in torch.sort. The token's weights are NaN then, and so are the sums over all tokens.

T = tokens, E = experts, K = top_k, B = blocks of `block_tokens` tokens
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.kernels.launch import FLOATS, check, check_device, check_tensor, on_device_of_arguments, power_of_2

MODES = ("softmax_over_topk", "softmax_then_topk")
MAX_EXPERTS, MAX_TOP_K = 256, 8

_REDUCE_BLOCKS, _REDUCE_ELEMENTS = 256, 4096  # blocks, and blocks × experts, that the reduction holds at once


class Gating(NamedTuple):
    """What `gate` returns; int32 and fp32.

    Attributes:
        topk_idx: `(T, K)`, chosen experts by falling logit, the bias added where there is one.
        topk_weights: `(T, K)`, their weights; differentiable.
        expert_counts: `(E)`, rows given to each expert; sums to T·K.
        prob_sum: `(E)`, Σ_t softmax(z_t); differentiable.
        lse_sq: `()`, Σ_t logsumexp(z_t)²; differentiable.
        entropy: `()`, −Σ_t Σ_e p log p in nats.
        expert_offsets: `(E + 1)`, exclusive sums of the counts: expert e owns rows `[off[e], off[e + 1])`.
        block_offsets: `(B, E)`, rows of expert e that blocks before b have; for `permutation.sort_by_expert`.
    """

    topk_idx: Tensor
    topk_weights: Tensor
    expert_counts: Tensor
    prob_sum: Tensor
    lse_sq: Tensor
    entropy: Tensor
    expert_offsets: Tensor
    block_offsets: Tensor


def block_tokens(num_experts: int) -> int:
    """Tokens of a block, the unit in which the gate counts and `permutation.sort_by_expert` sorts."""
    return max(32, min(128, 4096 // power_of_2(num_experts)))


def _tile_tokens(num_experts: int) -> int:
    """Tokens whose (tokens × experts) a program holds at once."""
    return min(128, 2048 // power_of_2(num_experts))


def _tile_warps(num_experts: int) -> int:
    """Warps of such a program: 8 elements for a thread, since with 16 of them some targets spill."""
    return max(4, _tile_tokens(num_experts) * power_of_2(num_experts) // 256)


@triton.jit
def _order_key(z):
    """int32 in the order of fp32 z, with -0 equal to 0 and every NaN above infinity. No key is as low as -2³¹."""
    bits = z.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(z == 0.0, 0, key)
    return tl.where(z != z, 0x7FFFFFFF, key)


@triton.jit
def _ordered_value(key):
    """The fp32 that has this key."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["T"])
def _gate_fwd_kernel(
    logits_ptr,  # (T, E)
    select_bias_ptr,  # (E), or None
    topk_idx_ptr,  # (T, K)
    topk_weights_ptr,  # (T, K)
    counts_ptr,  # (B, E)
    probs_ptr,  # (B, E)
    scalars_ptr,  # (2, B): lse_sq, entropy
    T,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE_T: tl.constexpr,
    E_POW2: tl.constexpr,
    K_POW2: tl.constexpr,
):
    """Grid: (B,). A block goes by tiles, since B decides what the reduction costs and a tile what registers hold."""
    block = tl.program_id(0)
    experts = tl.arange(0, E_POW2)
    slots = tl.arange(0, K_POW2)
    known = experts < E
    counts = tl.zeros((TILE_T, E_POW2), tl.int32)
    probs = tl.zeros((TILE_T, E_POW2), tl.float32)
    lse_sq = tl.zeros((TILE_T,), tl.float32)
    entropy = tl.zeros((TILE_T,), tl.float32)
    for start in range(0, BLOCK_T, TILE_T):
        tokens = block.to(tl.int64) * BLOCK_T + start + tl.arange(0, TILE_T)
        here = tokens < T
        mask = here[:, None] & known[None, :]
        z = tl.load(logits_ptr + tokens[:, None] * E + experts[None, :], mask=mask, other=0.0).to(tl.float32)
        z = tl.where(known[None, :], z, -float("inf"))

        # Keys of what is chosen, and of experts that do not exist, become the lowest: out of the next round.
        selected_by = z
        if select_bias_ptr is not None:
            selected_by += tl.load(select_bias_ptr + experts, mask=known, other=0.0)[None, :]
        key = tl.where(known[None, :], _order_key(selected_by), -0x80000000)
        idx = tl.zeros((TILE_T, K_POW2), tl.int32)
        value = tl.full((TILE_T, K_POW2), -float("inf"), tl.float32)
        for k in tl.static_range(TOP_K):
            best, expert = tl.max(key, axis=1, return_indices=True)  # of equal keys the lowest index
            key = tl.where(experts[None, :] == expert[:, None], -0x80000000, key)
            idx = tl.where(slots[None, :] == k, expert[:, None], idx)
            logit = _ordered_value(best)
            if select_bias_ptr is not None:
                logit = tl.sum(tl.where(experts[None, :] == expert[:, None], z, 0.0), axis=1)
            value = tl.where(slots[None, :] == k, logit[:, None], value)
            if k == 0:
                top = logit  # the row's maximum, or NaN: then all of this token becomes NaN
        largest = top
        if select_bias_ptr is not None:  # the largest logit need not be chosen
            largest = tl.max(value, axis=1)
            top = tl.max(z, axis=1)  # of a NaN the sums below make NaN

        exp = tl.exp(z - top[:, None])
        total = tl.sum(exp, axis=1)
        log_total = tl.log(total)
        prob = exp / total[:, None]
        weight = tl.exp(value - (largest if RENORMALISE else top)[:, None])
        weight = weight / (tl.sum(weight, axis=1) if RENORMALISE else total)[:, None]
        at = tokens[:, None] * TOP_K + slots[None, :]
        chosen = here[:, None] & (slots < TOP_K)[None, :]
        tl.store(topk_idx_ptr + at, idx, mask=chosen)
        tl.store(topk_weights_ptr + at, weight, mask=chosen)

        counts += (mask & (key == -0x80000000)).to(tl.int32)
        probs += tl.where(mask, prob, 0.0)
        lse = tl.where(here, top + log_total, 0.0)
        lse_sq += lse * lse
        log_prob = z - top[:, None] - log_total[:, None]
        p_log_p = tl.where(here[:, None] & (prob != 0.0), prob * log_prob, 0.0)  # 0·log 0 = 0
        entropy -= tl.sum(p_log_p, axis=1)
    at_block = block.to(tl.int64) * E + experts
    tl.store(counts_ptr + at_block, tl.sum(counts, axis=0), mask=known)
    tl.store(probs_ptr + at_block, tl.sum(probs, axis=0), mask=known)
    tl.store(scalars_ptr + block, tl.sum(lse_sq, axis=0))
    tl.store(scalars_ptr + tl.num_programs(0) + block, tl.sum(entropy, axis=0))


@triton.jit(do_not_specialize=["B"])
def _gate_reduce_kernel(
    counts_ptr,  # (B, E)
    probs_ptr,  # (B, E)
    scalars_ptr,  # (2, B): lse_sq, entropy
    expert_counts_ptr,  # (E)
    prob_sum_ptr,  # (E)
    lse_sq_ptr,  # ()
    entropy_ptr,  # ()
    expert_offsets_ptr,  # (E + 1)
    block_offsets_ptr,  # (B, E)
    B,
    E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    E_POW2: tl.constexpr,
):
    """Grid: (1,). One program, so that the order of every sum is that of the blocks."""
    experts = tl.arange(0, E_POW2)
    known = experts < E
    before = tl.zeros((E_POW2,), tl.int32)
    probs = tl.zeros((BLOCK_B, E_POW2), tl.float32)
    lse_sq = tl.zeros((BLOCK_B,), tl.float32)
    entropy = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, B, BLOCK_B):
        blocks = start + tl.arange(0, BLOCK_B)
        here = blocks < B
        mask = here[:, None] & known[None, :]
        at = blocks[:, None].to(tl.int64) * E + experts[None, :]
        counts = tl.load(counts_ptr + at, mask=mask, other=0)
        tl.store(block_offsets_ptr + at, before[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        before += tl.sum(counts, axis=0)
        probs += tl.load(probs_ptr + at, mask=mask, other=0.0)
        lse_sq += tl.load(scalars_ptr + blocks, mask=here, other=0.0)
        entropy += tl.load(scalars_ptr + B + blocks, mask=here, other=0.0)
    tl.store(expert_counts_ptr + experts, before, mask=known)
    tl.store(expert_offsets_ptr, 0)
    tl.store(expert_offsets_ptr + 1 + experts, tl.cumsum(before, axis=0), mask=known)
    tl.store(prob_sum_ptr + experts, tl.sum(probs, axis=0), mask=known)
    tl.store(lse_sq_ptr, tl.sum(lse_sq, axis=0))
    tl.store(entropy_ptr, tl.sum(entropy, axis=0))


@triton.jit(do_not_specialize=["T"])
def _gate_bwd_kernel(
    logits_ptr,  # (T, E)
    topk_idx_ptr,  # (T, K)
    topk_weights_ptr,  # (T, K)
    grad_weights_ptr,  # (T, K), or None: no gradient
    grad_prob_sum_ptr,  # (E), or None
    grad_lse_sq_ptr,  # (), or None
    grad_logits_ptr,  # (T, E)
    T,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    E_POW2: tl.constexpr,
):
    """Grid: (cdiv(T, BLOCK_T),)."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, E_POW2)
    here = tokens < T
    mask = here[:, None] & (experts < E)[None, :]

    # The weights' gradient, at the chosen experts.
    scattered = tl.zeros((BLOCK_T, E_POW2), tl.float32)
    if grad_weights_ptr is not None:
        weights = tl.zeros((BLOCK_T, E_POW2), tl.float32)
        for k in tl.static_range(TOP_K):
            at = tokens * TOP_K + k
            hit = experts[None, :] == tl.load(topk_idx_ptr + at, mask=here, other=-1)[:, None]
            scattered = tl.where(hit, tl.load(grad_weights_ptr + at, mask=here, other=0.0)[:, None], scattered)
            if RENORMALISE:
                weights = tl.where(hit, tl.load(topk_weights_ptr + at, mask=here, other=0.0)[:, None], weights)
        if RENORMALISE:
            scattered = weights * (scattered - tl.sum(weights * scattered, axis=1)[:, None])

    grad = scattered
    STATISTICS: tl.constexpr = (grad_prob_sum_ptr is not None) or (grad_lse_sq_ptr is not None)
    if STATISTICS or (not RENORMALISE):
        z = tl.load(logits_ptr + tokens[:, None] * E + experts[None, :], mask=mask, other=0.0).to(tl.float32)
        z = tl.where((experts < E)[None, :], z, -float("inf"))
        top = tl.max(z, axis=1)
        exp = tl.exp(z - top[:, None])
        total = tl.sum(exp, axis=1)
        prob = exp / total[:, None]
        grad_prob = tl.zeros((BLOCK_T, E_POW2), tl.float32)
        if not RENORMALISE:
            grad_prob = scattered
        if grad_prob_sum_ptr is not None:
            grad_prob += tl.load(grad_prob_sum_ptr + experts, mask=experts < E, other=0.0)[None, :]
        shift = -tl.sum(prob * grad_prob, axis=1)
        if grad_lse_sq_ptr is not None:
            shift += 2.0 * tl.load(grad_lse_sq_ptr) * (top + tl.log(total))
        grad = prob * (grad_prob + shift[:, None])
        if RENORMALISE:
            grad += scattered
    out_ptr = grad_logits_ptr + tokens[:, None] * E + experts[None, :]
    tl.store(out_ptr, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)


def _blocks(logits: Tensor) -> int:
    size = block_tokens(logits.shape[1])
    return (logits.shape[0] + size - 1) // size


def _outputs(logits: Tensor, top_k: int) -> Gating:
    (tokens, experts), blocks = logits.shape, _blocks(logits)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    return Gating(
        topk_idx=empty(torch.int32, tokens, top_k),
        topk_weights=empty(torch.float32, tokens, top_k),
        expert_counts=empty(torch.int32, experts),
        prob_sum=empty(torch.float32, experts),
        lse_sq=empty(torch.float32),
        entropy=empty(torch.float32),
        expert_offsets=empty(torch.int32, experts + 1),
        block_offsets=empty(torch.int32, blocks, experts),
    )


@torch.library.custom_op("moe_engine::gate", mutates_args=())
@on_device_of_arguments
def _gate_forward(
    logits: Tensor, top_k: int, renormalise: bool, select_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_device("logits", logits)
    (tokens, experts), blocks = logits.shape, _blocks(logits)
    out = _outputs(logits, top_k)
    experts_pow2 = power_of_2(experts)
    counts = torch.empty_like(out.block_offsets)
    probs = torch.empty_like(counts, dtype=torch.float32)
    scalars = probs.new_empty(2, blocks)
    if blocks:
        _gate_fwd_kernel[(blocks,)](
            logits,
            select_bias,
            out.topk_idx,
            out.topk_weights,
            counts,
            probs,
            scalars,
            tokens,
            E=experts,
            TOP_K=top_k,
            RENORMALISE=renormalise,
            BLOCK_T=block_tokens(experts),
            TILE_T=_tile_tokens(experts),
            E_POW2=experts_pow2,
            K_POW2=power_of_2(top_k),
            num_warps=_tile_warps(experts),
        )
    _gate_reduce_kernel[(1,)](
        counts,
        probs,
        scalars,
        *out[2:],
        blocks,
        E=experts,
        BLOCK_B=min(_REDUCE_BLOCKS, _REDUCE_ELEMENTS // experts_pow2),
        E_POW2=experts_pow2,
        num_warps=8,
    )
    return tuple(out)


@torch.library.custom_op("moe_engine::gate_backward", mutates_args=())
@on_device_of_arguments
def _gate_backward(
    logits: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    grad_weights: Tensor | None,
    grad_prob_sum: Tensor | None,
    grad_lse_sq: Tensor | None,
    renormalise: bool,
) -> Tensor:
    check_device("logits", logits)
    (tokens, experts), top_k = logits.shape, topk_idx.shape[1]
    grad_logits = torch.empty_like(logits)
    size = _tile_tokens(experts)
    if tokens:
        _gate_bwd_kernel[(triton.cdiv(tokens, size),)](
            logits,
            topk_idx,
            topk_weights,
            grad_weights,
            grad_prob_sum,
            grad_lse_sq,
            grad_logits,
            tokens,
            E=experts,
            TOP_K=top_k,
            RENORMALISE=renormalise,
            BLOCK_T=size,
            E_POW2=power_of_2(experts),
            num_warps=_tile_warps(experts),
        )
    return grad_logits


@_gate_forward.register_fake
def _(logits, top_k, renormalise, select_bias=None):
    return tuple(_outputs(logits, top_k))


@_gate_backward.register_fake
def _(logits, topk_idx, topk_weights, grad_weights, grad_prob_sum, grad_lse_sq, renormalise):
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, ctx.renormalise, _ = inputs
    out = Gating(*output)
    ctx.save_for_backward(logits, out.topk_idx, out.topk_weights)
    ctx.mark_non_differentiable(out.topk_idx, out.expert_counts, out.entropy, out.expert_offsets, out.block_offsets)
    ctx.set_materialize_grads(False)  # a gradient that nobody asks for is not read


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None]:
    grad = Gating(*grads)
    given = (g if g is None else g.contiguous() for g in (grad.topk_weights, grad.prob_sum, grad.lse_sq))
    return _gate_backward(*ctx.saved_tensors, *given, ctx.renormalise), None, None, None


_gate_forward.register_autograd(_autograd, setup_context=_save)


def gate(logits: Tensor, top_k: int, mode: str, select_bias: Tensor | None = None) -> Gating:
    """Softmax, top-k, weights and router statistics.

    Args:
        logits: `(T, E)`, contiguous, fp32, fp16 or bf16; E ≤ 256.
        top_k: experts per token, 1 … min(E, 8).
        mode: `softmax_over_topk` or `softmax_then_topk`.
        select_bias: `(E)` fp32, finite, added to the logits to choose experts; it gets no gradient. None: no bias.
    Returns:
        See `Gating`. The gradient of logits has their dtype.
    Raises:
        ValueError: an argument is not as described.
    """
    check_tensor("logits", logits, ("T", "E"), FLOATS)
    experts = logits.shape[1]
    check(1 <= experts <= MAX_EXPERTS, "logits", f"1 to {MAX_EXPERTS} experts", experts)
    check(1 <= top_k <= min(experts, MAX_TOP_K), "top_k", f"1 to {min(experts, MAX_TOP_K)}", top_k)
    check(mode in MODES, "mode", " or ".join(MODES), repr(mode))
    if select_bias is not None:
        check_tensor("select_bias", select_bias, (experts,), torch.float32, logits)
    return Gating(*_gate_forward(logits, top_k, mode == "softmax_over_topk", select_bias))
