"""Rows to their experts and back: the counting sort, permute and combine.

    row = expert_offsets[e] + block_offsets[b, e] + rank      of slot t·K + k, whose expert is e and whose block is b
    permutation[row] = slot,  inverse_permutation[slot] = row
    permute   rows[inverse[t·K + k]] = x[t]
    combine   out[t] = Σ_k topk_weights[t, k] · y[inverse[t·K + k]]       added in the order of k, in fp32

rank counts the slots of the same expert before this one within its block. The rest of the row was counted by the gate
(`gating.py`), so one pass over topk_idx sorts: stable, exact, and the same in every run. Gradients:

    permute   grad_x[t] = Σ_k grad_rows[inverse[t·K + k]]                 combine without weights
    combine   grad_y[row] = topk_weights[t, k] · g[t],   grad_topk_weights[t, k] = ⟨g[t], y[row]⟩

All but the sort are bound by memory. A program owns a few tokens and moves whole rows, columns in 16-byte accesses;
going by tokens and not by sorted rows, a token's own row is touched once, whatever K is.
Saved: by permute the inverse permutation; by combine y, topk_weights and the inverse permutation.

T = tokens, D = columns, E = experts, K = top_k, N = T·K, B = blocks of `block_tokens` tokens
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.kernels.gating import MAX_EXPERTS, MAX_TOP_K, block_tokens
from moe_engine.kernels.launch import FLOATS, check, check_device, check_tensor, on_device_of_arguments, power_of_2

_TILE = 4096  # elements that a program moves at once: 32 for each thread of 4 warps
_WIDEST, _WIDEST_BACKWARD = 1024, 256  # columns of a tile; 256 leave a warp whole rows, so that it sums them alone
_PARTIALS = 32  # partial sums of a row that are loaded at once


@triton.jit(do_not_specialize=["T"])
def _sort_kernel(
    topk_idx_ptr,  # (T, K)
    expert_offsets_ptr,  # (E + 1)
    block_offsets_ptr,  # (B, E)
    permutation_ptr,  # (N)
    inverse_ptr,  # (N)
    T,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    E_POW2: tl.constexpr,
):
    """Grid: (B,)."""
    block = tl.program_id(0)
    tokens = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, E_POW2)
    here, known = tokens < T, experts < E
    chosen = tl.zeros((BLOCK_T, E_POW2), tl.int32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(topk_idx_ptr + tokens * TOP_K + k, mask=here, other=-1)
        chosen += (experts[None, :] == expert[:, None]).to(tl.int32)
    first = tl.load(expert_offsets_ptr + experts, mask=known, other=0)
    first += tl.load(block_offsets_ptr + block.to(tl.int64) * E + experts, mask=known, other=0)
    free = first[None, :] + tl.cumsum(chosen, axis=0) - chosen  # each expert's next row, as each token finds it
    for k in tl.static_range(TOP_K):
        slot = tokens * TOP_K + k
        expert = tl.load(topk_idx_ptr + slot, mask=here, other=-1)
        mine = experts[None, :] == expert[:, None]
        row = tl.sum(tl.where(mine, free, 0), axis=1)
        free += mine.to(tl.int32)
        # Whatever the indices and offsets hold, nothing is written elsewhere.
        valid = here & (expert >= 0) & (expert < E) & (row >= 0) & (row < T * TOP_K)
        tl.store(permutation_ptr + row, slot.to(tl.int32), mask=valid)
        tl.store(inverse_ptr + slot, tl.where(valid, row, 0), mask=here)


@triton.jit(do_not_specialize=["T"])
def _permute_kernel(
    x_ptr,  # (T, D)
    inverse_ptr,  # (N)
    rows_ptr,  # (N, D)
    T,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (cdiv(T, BLOCK_T), cdiv(D, BLOCK_D))."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = tokens < T
    mask = here[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * D + cols[None, :], mask=mask, other=0.0)
    for k in tl.static_range(TOP_K):
        row = tl.load(inverse_ptr + tokens * TOP_K + k, mask=here, other=0).to(tl.int64)
        tl.store(rows_ptr + row[:, None] * D + cols[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["T", "P"])
def _combine_fwd_kernel(
    rows_ptr,  # (N, D)
    topk_weights_ptr,  # (T, K), or None: ones
    inverse_ptr,  # (N)
    partials_ptr,  # (P, N), or None: no sums
    out_ptr,  # (T, D)
    sums_ptr,  # (T, K), or None
    T,
    P,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid: (cdiv(T, BLOCK_T), cdiv(D, BLOCK_D)). The programs of the first columns see to the sums as well."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = tokens < T
    mask = here[:, None] & (cols < D)[None, :]
    out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(inverse_ptr + tokens * TOP_K + k, mask=here, other=0).to(tl.int64)
        y = tl.load(rows_ptr + row[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if topk_weights_ptr is not None:
            y *= tl.load(topk_weights_ptr + tokens * TOP_K + k, mask=here, other=0.0)[:, None]
        out += y
    tl.store(out_ptr + tokens[:, None] * D + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)

    if partials_ptr is not None:
        part = tl.arange(0, BLOCK_P)
        if tl.program_id(1) == 0:
            for k in tl.static_range(TOP_K):
                row = tl.load(inverse_ptr + tokens * TOP_K + k, mask=here, other=0).to(tl.int64)
                sums = tl.zeros((BLOCK_T,), tl.float32)
                for start in range(0, P, BLOCK_P):
                    parts = (start + part).to(tl.int64)
                    at = parts[None, :] * (T * TOP_K) + row[:, None]
                    wanted = here[:, None] & (parts < P)[None, :]
                    sums += tl.sum(tl.load(partials_ptr + at, mask=wanted, other=0.0), axis=1)
                tl.store(sums_ptr + tokens * TOP_K + k, sums, mask=here)


@triton.jit(do_not_specialize=["T"])
def _combine_bwd_kernel(
    grad_out_ptr,  # (T, D)
    y_ptr,  # (N, D)
    topk_weights_ptr,  # (T, K)
    inverse_ptr,  # (N)
    grad_y_ptr,  # (N, D)
    grad_weights_ptr,  # (T, K)
    T,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    K_POW2: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (cdiv(T, BLOCK_T),). A program goes along its tokens' rows, for the products over all of D."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.arange(0, K_POW2)
    here = tokens < T
    grad_weights = tl.zeros((BLOCK_T, K_POW2), tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mask = here[:, None] & (cols < D)[None, :]
        grad = tl.load(grad_out_ptr + tokens[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        for k in tl.static_range(TOP_K):
            row = tl.load(inverse_ptr + tokens * TOP_K + k, mask=here, other=0).to(tl.int64)
            weight = tl.load(topk_weights_ptr + tokens * TOP_K + k, mask=here, other=0.0)
            at = row[:, None] * D + cols[None, :]
            y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_y_ptr + at, (weight[:, None] * grad).to(grad_y_ptr.dtype.element_ty), mask=mask)
            product = tl.sum(grad * y, axis=1)
            grad_weights += tl.where(slots[None, :] == k, product[:, None], 0.0)
    at_weights = tokens[:, None] * TOP_K + slots[None, :]
    tl.store(grad_weights_ptr + at_weights, grad_weights, mask=here[:, None] & (slots < TOP_K)[None, :])


def _tile(columns: int, widest: int, elements: int) -> tuple[int, int]:
    """Tokens and columns of a tile."""
    block_d = min(widest, power_of_2(columns))
    return min(64, elements // block_d), block_d


def combine_rows(
    rows: Tensor, topk_weights: Tensor | None, inverse_permutation: Tensor, top_k: int, partials: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Launch the sum of each token's rows; without autograd. For `combine`, `permute` and the expert MLP.

    Args:
        rows: `(N, D)`, contiguous.
        topk_weights: `(T, K)` fp32 to multiply the rows with, or None.
        inverse_permutation: `(N)` int32, flat slot → row.
        top_k: K.
        partials: `(P, N)` fp32 by row, or None.
    Returns:
        `(T, D)` in the dtype of rows, and, of partials, their sums over P by slot, `(T, K)` fp32 (else None).
    Raises:
        ValueError: sizes disagree, or the tensors are not where kernels run.
    """
    check_device("rows", rows)
    n, columns = rows.shape
    tokens = n // top_k
    check(inverse_permutation.shape == (n,), "inverse_permutation", f"shape ({n},)", tuple(inverse_permutation.shape))
    check(n == tokens * top_k, "rows", f"a multiple of top_k = {top_k} rows", n)
    if topk_weights is not None:
        check_tensor("topk_weights", topk_weights, (tokens, top_k), torch.float32)
    if partials is not None:
        check_tensor("partials", partials, ("P", n), torch.float32)
    out = rows.new_empty(tokens, columns)
    sums = None if partials is None else partials.new_empty(tokens, top_k)
    if tokens:
        block_t, block_d = _tile(columns, _WIDEST, _TILE)
        _combine_fwd_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(columns, block_d))](
            rows,
            topk_weights,
            inverse_permutation,
            partials,
            out,
            sums,
            tokens,
            0 if partials is None else partials.shape[0],
            D=columns,
            TOP_K=top_k,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            BLOCK_P=_PARTIALS,
        )
    return out, sums


@torch.library.custom_op("moe_engine::sort_by_expert", mutates_args=())
@on_device_of_arguments
def _sort(topk_idx: Tensor, expert_offsets: Tensor, block_offsets: Tensor) -> tuple[Tensor, Tensor]:
    check_device("topk_idx", topk_idx)
    (tokens, top_k), experts = topk_idx.shape, block_offsets.shape[1]
    permutation = topk_idx.new_empty(topk_idx.numel())
    inverse_permutation = torch.empty_like(permutation)
    if tokens:
        _sort_kernel[(block_offsets.shape[0],)](
            topk_idx,
            expert_offsets,
            block_offsets,
            permutation,
            inverse_permutation,
            tokens,
            E=experts,
            TOP_K=top_k,
            BLOCK_T=block_tokens(experts),
            E_POW2=power_of_2(experts),
            num_warps=16 if experts > 128 else 8,
        )
    return permutation, inverse_permutation


@torch.library.custom_op("moe_engine::permute", mutates_args=())
@on_device_of_arguments
def _permute(x: Tensor, inverse_permutation: Tensor, top_k: int) -> Tensor:
    check_device("x", x)
    tokens, columns = x.shape
    rows = x.new_empty(tokens * top_k, columns)
    if tokens:
        block_t, block_d = _tile(columns, _WIDEST, _TILE)
        _permute_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(columns, block_d))](
            x, inverse_permutation, rows, tokens, D=columns, TOP_K=top_k, BLOCK_T=block_t, BLOCK_D=block_d
        )
    return rows


@torch.library.custom_op("moe_engine::permute_backward", mutates_args=())
@on_device_of_arguments
def _permute_backward(grad_rows: Tensor, inverse_permutation: Tensor, top_k: int) -> Tensor:
    return combine_rows(grad_rows, None, inverse_permutation, top_k)[0]


@torch.library.custom_op("moe_engine::combine", mutates_args=())
@on_device_of_arguments
def _combine(y: Tensor, topk_weights: Tensor, inverse_permutation: Tensor) -> Tensor:
    return combine_rows(y, topk_weights, inverse_permutation, topk_weights.shape[1])[0]


@torch.library.custom_op("moe_engine::combine_backward", mutates_args=())
@on_device_of_arguments
def _combine_backward(
    grad_out: Tensor, y: Tensor, topk_weights: Tensor, inverse_permutation: Tensor
) -> tuple[Tensor, Tensor]:
    check_device("grad_out", grad_out)
    grad_y, grad_weights = torch.empty_like(y), torch.empty_like(topk_weights)
    (tokens, top_k), columns = topk_weights.shape, y.shape[1]
    if tokens:
        block_t, block_d = _tile(columns, _WIDEST_BACKWARD, _TILE // 2)
        _combine_bwd_kernel[(triton.cdiv(tokens, block_t),)](
            grad_out,
            y,
            topk_weights,
            inverse_permutation,
            grad_y,
            grad_weights,
            tokens,
            D=columns,
            TOP_K=top_k,
            K_POW2=power_of_2(top_k),
            BLOCK_T=block_t,
            BLOCK_D=block_d,
        )
    return grad_y, grad_weights


@_sort.register_fake
def _(topk_idx, expert_offsets, block_offsets):
    permutation = topk_idx.new_empty(topk_idx.numel())
    return permutation, torch.empty_like(permutation)


@_permute.register_fake
def _(x, inverse_permutation, top_k):
    return x.new_empty(x.shape[0] * top_k, x.shape[1])


@_permute_backward.register_fake
def _(grad_rows, inverse_permutation, top_k):
    return grad_rows.new_empty(grad_rows.shape[0] // top_k, grad_rows.shape[1])


@_combine.register_fake
def _(y, topk_weights, inverse_permutation):
    return y.new_empty(topk_weights.shape[0], y.shape[1])


@_combine_backward.register_fake
def _(grad_out, y, topk_weights, inverse_permutation):
    return torch.empty_like(y), torch.empty_like(topk_weights)


def _permute_save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, inverse_permutation, ctx.top_k = inputs
    ctx.save_for_backward(inverse_permutation)


def _permute_autograd(ctx: Any, grad_rows: Tensor) -> tuple:
    return _permute_backward(grad_rows.contiguous(), *ctx.saved_tensors, ctx.top_k), None, None


def _combine_save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_autograd(ctx: Any, grad_out: Tensor) -> tuple:
    return *_combine_backward(grad_out.contiguous(), *ctx.saved_tensors), None


_permute.register_autograd(_permute_autograd, setup_context=_permute_save)
_combine.register_autograd(_combine_autograd, setup_context=_combine_save)


def sort_by_expert(topk_idx: Tensor, expert_offsets: Tensor, block_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Order of the N routed rows: by expert and, within one, by token.

    Args:
        topk_idx: `(T, K)` int32, contiguous.
        expert_offsets: `(E + 1)` int32, block_offsets: `(B, E)` int32; both of the gate that chose topk_idx, with
            B = cdiv(T, block_tokens(E)).
    Returns:
        permutation and inverse_permutation, `(N)` int32 each. A slot whose index is not an expert gets no row of its
        own: its inverse is 0.
    Raises:
        ValueError: an argument is not as described.
    """
    check_tensor("topk_idx", topk_idx, ("T", "K"), torch.int32)
    check_tensor("expert_offsets", expert_offsets, ("E + 1",), torch.int32, like=topk_idx)
    (tokens, top_k), experts = topk_idx.shape, expert_offsets.shape[0] - 1
    check(1 <= experts <= MAX_EXPERTS, "expert_offsets", f"2 to {MAX_EXPERTS + 1} offsets", experts + 1)
    check(1 <= top_k <= min(experts, MAX_TOP_K), "topk_idx", f"1 to {min(experts, MAX_TOP_K)} columns", top_k)
    size = block_tokens(experts)
    check_tensor("block_offsets", block_offsets, ((tokens + size - 1) // size, experts), torch.int32, like=topk_idx)
    return _sort(topk_idx, expert_offsets, block_offsets)


def permute(x: Tensor, permutation: Tensor, inverse_permutation: Tensor) -> Tensor:
    """Every token's row, once for each of its experts, in the order of the experts: `rows[r] = x[permutation[r] // K]`.

    Args:
        x: `(T, D)`, contiguous, fp32, fp16 or bf16; differentiable.
        permutation, inverse_permutation: `(N)` int32 of `sort_by_expert`. The kernel goes by the second alone.
    Returns:
        `(N, D)` in x's dtype.
    Raises:
        ValueError: an argument is not as described, or N is not a multiple of T.
    """
    check_tensor("x", x, ("T", "D"), FLOATS)
    check_tensor("permutation", permutation, ("N",), torch.int32, like=x)
    (tokens, columns), n = x.shape, permutation.shape[0]
    check(columns >= 1, "x", "at least one column", columns)
    check_tensor("inverse_permutation", inverse_permutation, (n,), torch.int32, like=x)
    top_k = n // tokens if tokens else 1
    if not (n == tokens * top_k and 1 <= top_k <= MAX_TOP_K):  # a number in the text would bind a compiled graph to it
        check(False, "permutation", f"1 to {MAX_TOP_K} times {tokens} rows", n)
    return _permute(x, inverse_permutation, top_k)


def combine(y: Tensor, topk_weights: Tensor, inverse_permutation: Tensor) -> Tensor:
    """Weighted sum of each token's rows: `out[t] = Σ_k topk_weights[t, k] · y[inverse_permutation[t·K + k]]`.

    Args:
        y: `(N, D)`, contiguous, fp32, fp16 or bf16; differentiable.
        topk_weights: `(T, K)` fp32; differentiable.
        inverse_permutation: `(N)` int32 of `sort_by_expert`.
    Returns:
        `(T, D)` in y's dtype; summed in fp32.
    Raises:
        ValueError: an argument is not as described.
    """
    check_tensor("topk_weights", topk_weights, ("T", "K"), torch.float32)
    tokens, top_k = topk_weights.shape
    check(1 <= top_k <= MAX_TOP_K, "topk_weights", f"1 to {MAX_TOP_K} columns", top_k)
    check_tensor("y", y, (tokens * top_k, "D"), FLOATS, like=topk_weights)
    check(y.shape[1] >= 1, "y", "at least one column", y.shape[1])
    check_tensor("inverse_permutation", inverse_permutation, (tokens * top_k,), torch.int32, like=topk_weights)
    return _combine(y, topk_weights, inverse_permutation)
