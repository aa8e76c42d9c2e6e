"""The experts' MLPs with everything around them, as one autograd function.

Forward, r = sorted row, e its expert, t(r) = permutation[r] // K:

    h[r] = x[t(r)] @ w_up[e] + b_up[e]                 gather in the load; the epilogue makes a
    a[r] = act(h[r])                                   h rounded first, so that backward finds the same a
    y[r] = a[r] @ w_down[e] + b_down[e]
    out[t] = Σ_k topk_weights[t,k] · y[inverse_permutation[t·K+k]]

Backward, g = grad_out, s = topk_weights of the row:

    da[r] = g[t(r)] @ w_down[e]ᵀ                       gather in the load; the epilogue makes the next three from h
    grad_topk_weights[r] = Σ_F da·a + ⟨g[t(r)], b_down[e]⟩
    s·a[r]  and  grad_h[r] = s·da ⊙ act'(h[r])
    grad_w_down[e] = Σ_r (s·a[r])ᵀ g[t(r)]             gather in the load
    grad_x[t] = Σ_k (grad_h @ w_upᵀ)[inverse_permutation[t·K+k]]
    grad_w_up[e] = Σ_r x[t(r)]ᵀ grad_h[r]              gather in the load

y and a are not needed in backward (SonicMoE, arXiv 2512.14080). Saved: x, h, topk_weights, indices: 2·T·D + 4·T·K·F
bytes in 16-bit; with save="x" h is computed again instead. Sums over columns or rows (the gradients of gate weights
and biases) are fp32 partial sums per tile, added in a fixed order by a later launch: nothing is atomic.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k, N = T·K routed rows
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from moe_engine.kernels import launch
from moe_engine.kernels.fused_gemm import down_backward, up_forward
from moe_engine.kernels.gating import MAX_TOP_K
from moe_engine.kernels.grouped_gemm import multiply_rows, weight_grad
from moe_engine.kernels.launch import FLOATS, check, check_device, check_tensor, on_device_of_arguments
from moe_engine.kernels.permutation import combine_rows
from moe_engine.kernels.row_sums import sum_rows
from moe_engine.kernels.tiles import check_offsets, check_permutation

SAVE = ("h", "x")
"""Memory modes: what backward finds, besides x, weights and indices. `x`: nothing, it computes h again."""


@torch.library.custom_op("moe_engine::expert_mlp", mutates_args=())
@on_device_of_arguments
def _expert_mlp(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    topk_weights: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor,
    inverse_permutation: Tensor,
    alpha: float,
    offset: float,
    limit: float,
    save: str,
    autotune: bool,
) -> tuple[Tensor, Tensor]:
    check_device("x", x)
    check_offsets(expert_offsets, permutation.numel())
    check_permutation(permutation, inverse_permutation)
    top_k, act, save_h = topk_weights.shape[1], (alpha, offset, limit), save == "h"
    h, a = up_forward(x, w_up, b_up, permutation, expert_offsets, top_k, act, save_h, True, autotune)
    y = multiply_rows(a, w_down, expert_offsets, b_down, autotune=autotune)
    out, _ = combine_rows(y, topk_weights, inverse_permutation, top_k)
    return out, h if save_h else x.new_empty(0)


@_expert_mlp.register_fake
def _(x, w_up, b_up, w_down, b_down, topk_weights, offsets, permutation, inverse, alpha, offset, limit, save, autotune):
    h = x.new_empty(permutation.numel(), w_up.shape[2]) if save == "h" else x.new_empty(0)
    return torch.empty_like(x), h


@torch.library.custom_op("moe_engine::expert_mlp_backward", mutates_args=())
@on_device_of_arguments
def _expert_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    h: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    topk_weights: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor,
    inverse_permutation: Tensor,
    alpha: float,
    offset: float,
    limit: float,
    save: str,
    autotune: bool,
    weights: bool,
) -> list[Tensor]:
    """Gradients of x, w_up, b_up, w_down, b_down, topk_weights; without `weights`, the middle four are empty."""
    check_device("grad_out", grad_out)
    top_k, num_rows, act = topk_weights.shape[1], permutation.numel(), (alpha, offset, limit)
    if save == "x":
        h, _ = up_forward(x, w_up, b_up, permutation, expert_offsets, top_k, act, True, False, autotune)
    extra = triton.cdiv(w_down.shape[2], launch.SUM_N) if b_down is not None else 0
    scaled_a, grad_h, dots, up_partials, up_rows = down_backward(
        grad_out, w_down, h, topk_weights, permutation, expert_offsets, act, b_up is not None, extra, autotune
    )
    del h  # temporaries go as soon as they can: they are most of the peak
    down_partials = None
    if b_down is not None:
        down_partials = sum_rows(
            grad_out, num_rows, expert_offsets, permutation, top_k, topk_weights, b_down, dots[-extra:]
        )
    grad_w_down = grad_b_down = grad_w_up = grad_b_up = None
    if weights:
        grad_w_down, grad_b_down = weight_grad(
            scaled_a, grad_out, num_rows, expert_offsets, permutation, top_k, "dy", down_partials, autotune=autotune
        )
    del scaled_a, down_partials
    grad_rows = multiply_rows(grad_h, w_up, expert_offsets, transposed=True, autotune=autotune)
    grad_x, grad_topk_weights = combine_rows(grad_rows, None, inverse_permutation, top_k, dots)
    del grad_rows
    if weights:
        grad_w_up, grad_b_up = weight_grad(
            x, grad_h, num_rows, expert_offsets, permutation, top_k, "x", up_partials, up_rows, autotune
        )
    gradients = (grad_x, grad_w_up, grad_b_up, grad_w_down, grad_b_down, grad_topk_weights)
    return [x.new_empty(0) if gradient is None else gradient for gradient in gradients]


@_expert_mlp_backward.register_fake
def _(
    grad_out, x, h, w_up, b_up, w_down, b_down, topk_weights, offsets, permutation, inverse, alpha, offset, limit, save,
    autotune, weights,
):  # fmt: skip
    def like(parameter: Tensor | None) -> Tensor:
        return torch.empty_like(parameter) if weights and parameter is not None else x.new_empty(0)

    return [torch.empty_like(x), like(w_up), like(b_up), like(w_down), like(b_down), torch.empty_like(topk_weights)]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, w_up, b_up, w_down, b_down, topk_weights, offsets, permutation, inverse, *ctx.constants = inputs
    h = output[1]
    ctx.save_for_backward(x, h, w_up, b_up, w_down, b_down, topk_weights, offsets, permutation, inverse)
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # or h would get a gradient of zeros


def _backward(ctx: Any, grad_out: Tensor | None, _grad_h: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 14
    saved = ctx.saved_tensors  # once: checkpointing allows no second look, and offloading would fetch them again
    weights = any(ctx.needs_input_grad[1:5])
    gradients = _expert_mlp_backward(grad_out.contiguous(), *saved, *ctx.constants, weights)
    wanted = (True, weights, weights and saved[3] is not None, weights, weights and saved[5] is not None, True)
    return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), *(None,) * 8


_expert_mlp.register_autograd(_backward, setup_context=_save)


def expert_mlp(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    topk_weights: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor,
    inverse_permutation: Tensor,
    alpha: float = 1.0,
    offset: float = 0.0,
    limit: float = math.inf,
    save: str = "h",
    autotune: bool = False,
) -> Tensor:
    """The experts' MLPs, weighted and summed into each token's row.

    Differentiable in x, weights, biases and topk_weights. Deterministic: two runs agree bit for bit.

    Args:
        x: `(T, D)`, fp32, fp16 or bf16.
        w_up: `(E, D, 2F)` of x's dtype, gate and up columns interleaved (even = gate); b_up: `(E, 2F)` or None.
        w_down: `(E, F, D)`; b_down: `(E, D)` or None.
        topk_weights: `(T, K)` fp32.
        expert_offsets `(E + 1)`, permutation `(N)`, inverse_permutation `(N)`: int32, from `gate` and
            `sort_by_expert`; N = T·K. Offsets rise from 0 to N, permutations hold 0 … N − 1: looked at in the
            interpreter; on a GPU, where it would make the host wait, offsets are clamped and permutations trusted.
        alpha, offset, limit: constants of the activation, see `swiglu.py`; limit > 0.
        save: `h` keeps h for backward, `x` computes it again there.
        autotune: time the candidate tiles of each GEMM once for a bucket of shapes; ignored in the interpreter. Tiles
            decide the order of summation, so results differ in the last bits from the default table's.
    Returns:
        `(T, D)` in x's dtype; fp32 accumulation.
    Raises:
        ValueError: an argument is not as described; the message names it, what was expected and what came.
    Source:
        Memory plan: SonicMoE (arXiv 2512.14080); gpt-oss's activation and weight layout.
    """
    check_tensor("x", x, ("T", "D"), FLOATS)
    (tokens, d), dtype = x.shape, x.dtype
    check_tensor("w_up", w_up, ("E", d, "2F"), dtype, x)
    num_experts, _, width = w_up.shape
    check(num_experts > 0 and d > 0, "w_up", "at least one expert and one row", tuple(w_up.shape))
    check(width % 2 == 0 and width > 0, "w_up", "an even number of columns, gate and up", tuple(w_up.shape))
    check_tensor("w_down", w_down, (num_experts, width // 2, d), dtype, x)
    if b_up is not None:
        check_tensor("b_up", b_up, (num_experts, width), dtype, x)
    if b_down is not None:
        check_tensor("b_down", b_down, (num_experts, d), dtype, x)
    check_tensor("topk_weights", topk_weights, (tokens, "K"), torch.float32, x)
    top_k = topk_weights.shape[1]
    most = min(num_experts, MAX_TOP_K)
    check(0 < top_k <= most, "topk_weights", f"1 to min(E, {MAX_TOP_K}) = {most} columns", tuple(topk_weights.shape))
    check_tensor("expert_offsets", expert_offsets, (num_experts + 1,), torch.int32, x)
    check_tensor("permutation", permutation, (tokens * top_k,), torch.int32, x)
    check_tensor("inverse_permutation", inverse_permutation, (tokens * top_k,), torch.int32, x)
    check(limit > 0, "limit", "a positive number", limit)
    check(save in SAVE, "save", f"one of {', '.join(SAVE)}", repr(save))
    differentiable = (x, w_up, b_up, w_down, b_down, topk_weights)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)):
        save = "x"  # nobody will need h
    out, _ = _expert_mlp(
        x,
        w_up,
        b_up,
        w_down,
        b_down,
        topk_weights,
        expert_offsets,
        permutation,
        inverse_permutation,
        alpha,
        offset,
        limit,
        save,
        autotune,
    )
    return out
