"""Cross-entropy of a large vocabulary, a chunk of it at a time.

    loss = Σ_t (lse_t − x_t·W[y_t] + z_coef · lse_t²)      over tokens with y_t ≥ 0,  lse_t = logsumexp(x_t·Wᵀ)

    ∂loss/∂logits_t = softmax(logits_t) · (1 + 2 · z_coef · lse_t) − onehot(y_t)

The logits `(T, V)` never exist whole, forward or backward. GEMMs run in the dtype of their inputs; softmax, loss and
sums over chunks in fp32 (fp64 for fp64 inputs). There are two forms of it:

- `_Recompute` goes over chunks of the vocabulary, in forward for lse alone, in backward once more for the gradients.
  Four GEMMs instead of three. Forward keeps lse, `(T)`; a chunk's rows of W get their gradient from one GEMM over all
  tokens, so that it is rounded once and needs no buffer in fp32 beside it (2.3 GB for 201,088 words of width 2880).
- `_OnePass` goes over chunks of tokens and computes gradients in forward, while the chunk's logits are at hand;
  backward scales them. On a CPU it takes about 0.8 of the time, and in fp32 the buffer for the gradient of W is the
  gradient itself.

T = tokens, D = d_model, V = vocabulary
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moe_engine.autograd import refuse_create_graph

CHUNK_BYTES = 1 << 24  # of fp32 logits at once in _OnePass: a CPU's cache
CHUNK_LOGITS = 1 << 25  # at once in _Recompute, while that is CHUNK_WORDS or more
CHUNK_WORDS = 4096  # at least: with fewer, adding a chunk's (T, D) share to the gradient of x costs more than its GEMM


def _chunk_tokens(vocab: int) -> int:
    return max(64, CHUNK_BYTES // (4 * vocab))


def _chunk_words(tokens: int) -> int:
    return max(CHUNK_WORDS, CHUNK_LOGITS // max(tokens, 1) // 128 * 128)


def _place(targets: Tensor, begin: int, words: int) -> tuple[Tensor, Tensor]:
    """Column of each target in a chunk, int64, and whether it is in there, bool, both `(T, 1)`."""
    column = targets.unsqueeze(1) - begin
    return column.clamp(0, words - 1), (column >= 0) & (column < words)


def _chunk_statistics(x: Tensor, rows: Tensor, targets: Tensor, begin: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over a chunk of the vocabulary, and the target's logit, 0 where it is elsewhere, both `(T, 1)`."""
    logits = torch.mm(x, rows.t())
    largest = logits.amax(1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32))
    column, inside = _place(targets, begin, rows.shape[0])
    target = logits.gather(1, column).to(largest.dtype) * inside
    return (logits - largest).exp_().sum(1, keepdim=True).log_() + largest, target


def _chunk_grad_logits(
    x: Tensor, rows: Tensor, targets: Tensor, begin: int, lse: Tensor, scale: Tensor, z_coef: float
) -> Tensor:
    """Gradient of a chunk's logits in x's dtype, `(T, words)`; lse and scale are `(T, 1)`."""
    logits = torch.mm(x, rows.t())
    grad = (logits - lse).exp_()  # the softmax
    if z_coef:
        grad.mul_(1 + 2 * z_coef * lse)
    column, inside = _place(targets, begin, rows.shape[0])
    grad.scatter_add_(1, column, -inside.to(grad.dtype))
    return torch.mul(grad, scale, out=logits)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, z_coef: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        lse = x.new_full((x.shape[0], 1), -math.inf, dtype=wide)
        target = x.new_zeros((x.shape[0], 1), dtype=wide)
        words = _chunk_words(x.shape[0])
        for begin in range(0, weight.shape[0], words):
            chunk_lse, chunk_target = _chunk_statistics(x, weight[begin : begin + words], targets, begin)
            lse, target = torch.logaddexp(lse, chunk_lse), target + chunk_target
        ctx.save_for_backward(x, weight, targets, lse)
        ctx.z_coef = z_coef
        loss = lse - target
        if z_coef:
            loss = loss + z_coef * lse.square()
        return (loss * (targets >= 0).unsqueeze(1)).sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        refuse_create_graph("linear_cross_entropy")
        x, weight, targets, lse = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = torch.zeros_like(x, dtype=lse.dtype) if need_x else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        scale = grad_loss * (targets >= 0).unsqueeze(1)
        words = _chunk_words(x.shape[0])
        for begin in range(0, weight.shape[0], words):
            rows = weight[begin : begin + words]
            grad = _chunk_grad_logits(x, rows, targets, begin, lse, scale, ctx.z_coef)
            if need_x and grad.dtype == grad_x.dtype:
                grad_x.addmm_(grad, rows)
            elif need_x:
                grad_x += torch.mm(grad, rows)
            if need_weight:
                torch.mm(grad.t(), x, out=grad_weight[begin : begin + words])
            del grad  # not beside the next chunk's
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, None, None


class _OnePass(torch.autograd.Function):
    """For fp32 and fp64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, z_coef: float) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        loss = x.new_zeros(())
        chunk = _chunk_tokens(weight.shape[0])
        for begin in range(0, x.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            x_c, valid = x[rows], (targets[rows] >= 0).unsqueeze(1)
            index = targets[rows].clamp(min=0).unsqueeze(1)
            logits = torch.mm(x_c, weight.t())
            log_prob = logits.log_softmax(-1)
            target = log_prob.gather(1, index)
            # Not in place: torch.compile of 2.11 returns zero gradients for an output that was changed in place.
            loss = loss - (target * valid).sum()
            lse = logits.gather(1, index) - target
            if z_coef:
                loss = loss + z_coef * (lse.square() * valid).sum()
            if not (need_x or need_weight):
                continue
            grad = log_prob.exp_()  # the softmax, in place
            if z_coef:
                grad.mul_(1 + 2 * z_coef * lse)
            grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
            # Rows that do not count are zeroed where they are D wide, not V wide.
            if need_x:
                torch.mm(grad, weight, out=grad_x[rows])
                grad_x[rows] *= valid
            if need_weight:
                grad_weight.addmm_(grad.t(), x_c * valid)
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        refuse_create_graph("linear_cross_entropy")
        grad_x, grad_weight = ctx.saved_tensors
        if grad_x is not None:
            grad_x = grad_x * grad_loss
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss)
        return grad_x, grad_weight, None, None


def suits_one_pass(x: Tensor) -> bool:
    """Whether the loss of these hidden states is computed by `_OnePass`."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, z_coef: float = 0.0) -> Tensor:
    """Summed cross-entropy of a linear output layer.

    On a CPU in fp32 and fp64 it is computed by `_OnePass`, which is faster there, else by `_Recompute`. In 16-bit
    dtypes the latter needs at its peak, beside x, W and W's gradient, 6 bytes for each of a chunk's logits (201 MB up
    to 8192 tokens, then 24.6 KB per token) and in backward the gradient of x in fp32.

    Args:
        x: `(T, D)` hidden states.
        weight: `(V, D)` of x's dtype. Under `torch.autocast` both are cast to its dtype.
        targets: `(T)` int64 ids; negative ones are left out.
        z_coef: what to add of each counted token's squared log-sum-exp (z-loss: PaLM, arXiv 2204.02311, section 5), so
            that logits do not drift; 0 or more.
    Returns:
        Scalar in nats, summed over the tokens that count, fp32 (fp64 for fp64 inputs). Differentiable in x and weight,
        once.
    Raises:
        ValueError: z_coef is negative or not finite.
    """
    if not 0 <= z_coef < math.inf:
        raise ValueError(f"z_coef: expected a finite number of at least 0, got {z_coef}")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # it does not see into the functions' backward
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():  # needs_input_grad knows nothing of no_grad, and the gradients are half the work
        x, weight = x.detach(), weight.detach()
    return (_OnePass if suits_one_pass(x) else _Recompute).apply(x, weight, targets, z_coef)
