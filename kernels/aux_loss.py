"""The router's two losses, from the statistics of the gate, for all layers in one launch.

    balance = E · Σ_e share_e · prob_sum_e / T,   share = expert_counts / Σ_e expert_counts   (arXiv 2101.03961, eq. 4)
    z       = lse_sq / T                                                                      (arXiv 2202.08906, eq. 5)

T comes from the counts, T = Σ_e expert_counts / K, so that nothing is read on the host; where it is 0 it counts as 1.
balance is 1 when experts are used equally and E/K when all tokens go to the same K experts with all probability.
Gradients flow into prob_sum and lse_sq; the counts are a constant. Saved: the counts.

L = layers (all leading dimensions), T = tokens, E = experts, K = top_k
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.kernels.launch import check, check_device, check_tensor, on_device_of_arguments

COUNTS = (torch.int32, torch.int64)


@triton.jit
def _share_and_tokens(expert_counts_ptr, global_counts_ptr, at, known, TOP_K: tl.constexpr):
    """Each expert's share of the rows, `(E_POW2)` fp32, and T."""
    counts = tl.load(expert_counts_ptr + at, mask=known, other=0).to(tl.int64)
    tokens = tl.maximum(tl.sum(counts, axis=0).to(tl.float32) / TOP_K, 1.0)
    if global_counts_ptr is not None:
        counts = tl.load(global_counts_ptr + at, mask=known, other=0).to(tl.int64)
    share = counts.to(tl.float32) / tl.maximum(tl.sum(counts, axis=0), 1).to(tl.float32)
    return share, tokens


@triton.jit
def _aux_fwd_kernel(
    expert_counts_ptr,  # (L, E)
    global_counts_ptr,  # (L, E), or None: expert_counts
    prob_sum_ptr,  # (L, E)
    lse_sq_ptr,  # (L)
    balance_ptr,  # (L)
    z_ptr,  # (L)
    E,
    TOP_K: tl.constexpr,
    E_POW2: tl.constexpr,
):
    """Grid: (L,)."""
    layer = tl.program_id(0)
    experts = tl.arange(0, E_POW2)
    at, known = layer * E + experts, experts < E
    share, tokens = _share_and_tokens(expert_counts_ptr, global_counts_ptr, at, known, TOP_K)
    prob = tl.load(prob_sum_ptr + at, mask=known, other=0.0) / tokens
    tl.store(balance_ptr + layer, E * tl.sum(share * prob, axis=0))
    tl.store(z_ptr + layer, tl.load(lse_sq_ptr + layer) / tokens)


@triton.jit
def _aux_bwd_kernel(
    expert_counts_ptr,  # (L, E)
    global_counts_ptr,  # (L, E), or None: expert_counts
    grad_balance_ptr,  # (L), or None: no gradient
    grad_z_ptr,  # (L), or None
    grad_prob_sum_ptr,  # (L, E)
    grad_lse_sq_ptr,  # (L)
    E,
    TOP_K: tl.constexpr,
    E_POW2: tl.constexpr,
):
    """Grid: (L,)."""
    layer = tl.program_id(0)
    experts = tl.arange(0, E_POW2)
    at, known = layer * E + experts, experts < E
    share, tokens = _share_and_tokens(expert_counts_ptr, global_counts_ptr, at, known, TOP_K)
    grad_prob_sum = tl.zeros((E_POW2,), tl.float32)
    if grad_balance_ptr is not None:
        grad_prob_sum = E * share * (tl.load(grad_balance_ptr + layer) / tokens)
    tl.store(grad_prob_sum_ptr + at, grad_prob_sum, mask=known)
    grad_lse_sq = 0.0
    if grad_z_ptr is not None:
        grad_lse_sq = tl.load(grad_z_ptr + layer) / tokens
    tl.store(grad_lse_sq_ptr + layer, grad_lse_sq)


def _sizes(expert_counts: Tensor) -> tuple[int, int, int]:
    """L, E, and the power of two at or above E."""
    experts = expert_counts.shape[-1]
    return expert_counts.numel() // experts, experts, 1 << (experts - 1).bit_length()


@torch.library.custom_op("moe_engine::aux_losses", mutates_args=())
@on_device_of_arguments
def _aux_forward(
    expert_counts: Tensor, global_counts: Tensor | None, prob_sum: Tensor, lse_sq: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    check_device("expert_counts", expert_counts)
    balance, z = torch.empty_like(lse_sq), torch.empty_like(lse_sq)
    layers, experts, experts_pow2 = _sizes(expert_counts)
    if layers:
        _aux_fwd_kernel[(layers,)](
            expert_counts,
            global_counts,
            prob_sum,
            lse_sq,
            balance,
            z,
            experts,
            TOP_K=top_k,
            E_POW2=experts_pow2,
            num_warps=1,
        )
    return balance, z


@torch.library.custom_op("moe_engine::aux_losses_backward", mutates_args=())
@on_device_of_arguments
def _aux_backward(
    expert_counts: Tensor,
    global_counts: Tensor | None,
    grad_balance: Tensor | None,
    grad_z: Tensor | None,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    check_device("expert_counts", expert_counts)
    grad_prob_sum = torch.empty_like(expert_counts, dtype=torch.float32)
    grad_lse_sq = grad_prob_sum.new_empty(expert_counts.shape[:-1])
    layers, experts, experts_pow2 = _sizes(expert_counts)
    if layers:
        _aux_bwd_kernel[(layers,)](
            expert_counts,
            global_counts,
            grad_balance,
            grad_z,
            grad_prob_sum,
            grad_lse_sq,
            experts,
            TOP_K=top_k,
            E_POW2=experts_pow2,
            num_warps=1,
        )
    return grad_prob_sum, grad_lse_sq


@_aux_forward.register_fake
def _(expert_counts, global_counts, prob_sum, lse_sq, top_k):
    return torch.empty_like(lse_sq), torch.empty_like(lse_sq)


@_aux_backward.register_fake
def _(expert_counts, global_counts, grad_balance, grad_z, top_k):
    grad_prob_sum = torch.empty_like(expert_counts, dtype=torch.float32)
    return grad_prob_sum, grad_prob_sum.new_empty(expert_counts.shape[:-1])


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    expert_counts, global_counts, _, _, ctx.top_k = inputs
    ctx.save_for_backward(expert_counts, global_counts)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_balance: Tensor | None, grad_z: Tensor | None) -> tuple:
    given = (g if g is None else g.contiguous() for g in (grad_balance, grad_z))
    return None, None, *_aux_backward(*ctx.saved_tensors, *given, ctx.top_k), None


_aux_forward.register_autograd(_autograd, setup_context=_save)


def aux_losses(
    expert_counts: Tensor, prob_sum: Tensor, lse_sq: Tensor, top_k: int, global_counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Load-balancing loss and z-loss of each layer.

    Args:
        expert_counts: `(…, E)` int32, as `gating.gate` gives them; leading dimensions are layers.
        prob_sum: `(…, E)` fp32, differentiable.
        lse_sq: `(…)` fp32, differentiable.
        top_k: experts per token, at least 1.
        global_counts: `(…, E)` int32 or int64, counts to take the shares from in place of expert_counts, e.g. summed
            over data-parallel ranks (global-batch balance).
    Returns:
        balance and z, `(…)` fp32 each.
    Raises:
        ValueError: an argument is not as described.
    """
    shape = tuple(expert_counts.shape)
    check(len(shape) > 0 and shape[-1] > 0, "expert_counts", "shape (…, E)", shape)
    check_tensor("expert_counts", expert_counts, shape, torch.int32)
    check_tensor("prob_sum", prob_sum, shape, torch.float32, like=expert_counts)
    check_tensor("lse_sq", lse_sq, shape[:-1], torch.float32, like=expert_counts)
    check(top_k >= 1, "top_k", "at least 1", top_k)
    if global_counts is not None:
        check_tensor("global_counts", global_counts, shape, COUNTS, like=expert_counts)
    return _aux_forward(expert_counts, global_counts, prob_sum, lse_sq, top_k)
