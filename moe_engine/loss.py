"""Cross-entropy of a large vocabulary, a chunk of tokens at a time.

    loss = Σ_t (logsumexp(x_t·Wᵀ) − x_t·W[y_t])      over tokens with y_t ≥ 0

The logits `(T, V)` never exist whole. Gradients are computed chunk by chunk in forward, while the chunk's logits are
at hand, so that no GEMM is done twice; backward only scales them. GEMMs run in the dtype of their inputs; softmax and
loss in fp32; the gradient of W adds up in fp32.

T = tokens, D = d_model, V = vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 24  # of fp32 logits at once, on a CPU
CHUNK_TOKENS = 1024  # elsewhere


def _chunk_tokens(x: Tensor, vocab: int) -> int:
    return max(64, CHUNK_BYTES // (4 * vocab)) if x.device.type == "cpu" else CHUNK_TOKENS


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        loss = x.new_zeros((), dtype=wide)
        chunk = _chunk_tokens(x, weight.shape[0])
        for begin in range(0, x.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            x_c, valid = x[rows], (targets[rows] >= 0).unsqueeze(1)
            index = targets[rows].clamp(min=0).unsqueeze(1)
            log_prob = torch.mm(x_c, weight.t()).to(wide).log_softmax(-1)
            # Not in place: torch.compile of 2.11 returns zero gradients for an output that was changed in place.
            loss = loss - (log_prob.gather(1, index) * valid).sum()
            if not (need_x or need_weight):
                continue
            grad = log_prob.exp_()  # the softmax, in place
            grad = grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0)).to(x.dtype)
            # Rows that do not count are zeroed where they are D wide, not V wide.
            if need_x:
                torch.mm(grad, weight, out=grad_x[rows])
                grad_x[rows] *= valid
            if need_weight and wide == x.dtype:
                grad_weight.addmm_(grad.t(), x_c * valid)
            elif need_weight:
                grad_weight += torch.mm(grad.t(), x_c * valid)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        if grad_x is not None:
            grad_x = (grad_x * grad_loss).to(grad_x.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.dtype)
        return grad_x, grad_weight, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of a linear output layer.

    Args:
        x: `(T, D)` hidden states.
        weight: `(V, D)` of x's dtype.
        targets: `(T)` int64 ids; negative ones are left out.
    Returns:
        Scalar in nats, summed over the tokens that count, fp32 (fp64 for fp64 inputs). Differentiable in x and weight,
        once.
    """
    if not torch.is_grad_enabled():  # needs_input_grad knows nothing of no_grad, and the gradients are half the work
        x, weight = x.detach(), weight.detach()
    return _LinearCrossEntropy.apply(x, weight, targets)
