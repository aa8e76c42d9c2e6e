"""The two grouped GEMMs of the expert MLP whose epilogues do more than store.

    up_forward      h[r] = x[t(r)] @ w_up[e] + b_up[e];  a[r] = act(h[r])
    down_backward   da[r] = g[t(r)] @ w_down[e]ᵀ;  s·a[r],  grad_h[r] = s·da ⊙ act'(h[r]),  Σ_F da·a,  Σ_rows grad_h

Both gather their rows in the load, t(r) = permutation[r] // K; s is the row's gate weight. Columns of gate and up
alternate, so a thread holds a pair in neighbouring registers. The epilogue goes part by part through the tile's columns
(`Tile.SUBTILES`), and reads and writes pairs as one word: taken whole, it would spill registers on every GPU.
These functions launch; the autograd function is in `expert_mlp.py`.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k, N = T·K routed rows
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.kernels import launch
from moe_engine.kernels.launch import Tile
from moe_engine.kernels.swiglu import gated_activation, gated_activation_backward, load_pair, store_pair
from moe_engine.kernels.tiles import column_parts, find_tile, multiply, row_tile_bound


@triton.jit
def _up_epilogue(
    acc,  # (BLOCK_M, WIDTH) columns of h from `column` on
    b_up_ptr,
    h_ptr,
    a_ptr,
    expert,
    rows,
    row_end,
    column,
    F: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    BIAS: tl.constexpr,
    STORE_H: tl.constexpr,
    STORE_A: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Bias, rounding, activation of a part of the tile; writes h and a."""
    columns = column + tl.arange(0, WIDTH)
    mask = (rows < row_end)[:, None]
    if BIAS:
        bias = tl.load(b_up_ptr + expert * (2 * F) + columns, mask=columns < 2 * F, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    h = acc.to(h_ptr.dtype.element_ty)
    if STORE_H:
        h_mask = mask
        if RAGGED:
            h_mask = mask & (columns < 2 * F)[None, :]
        tl.store(h_ptr + rows[:, None] * (2 * F) + columns[None, :], h, mask=h_mask)
    if STORE_A:
        gate, up = tl.split(tl.reshape(h.to(tl.float32), (BLOCK_M, WIDTH // 2, 2)))
        a = gated_activation(gate, up, ALPHA, OFFSET, LIMIT)
        pairs = column // 2 + tl.arange(0, WIDTH // 2)
        if RAGGED:
            mask = mask & (pairs < F)[None, :]
        tl.store(a_ptr + rows[:, None] * F + pairs[None, :], a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _up_fwd_kernel(
    x_ptr,  # (T, D)
    permutation_ptr,  # (N)
    w_up,  # (E, D, 2F), a pointer or a tensor descriptor
    b_up_ptr,  # (E, 2F), if BIAS
    expert_offsets_ptr,  # (E + 1)
    h_ptr,  # (N, 2F), if STORE_H
    a_ptr,  # (N, F), if STORE_A
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    BIAS: tl.constexpr,
    STORE_H: tl.constexpr,
    STORE_A: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (bound on row tiles · column tiles of h)."""
    expert, row, row_end, column_tile, _ = find_tile(
        expert_offsets_ptr, num_rows, NUM_EXPERTS, 2 * F, BLOCK_M, BLOCK_N, GROUP_M
    )
    if expert < 0:
        return
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
    slots = tl.load(permutation_ptr + tl.minimum(rows, row_end - 1))
    tokens = (slots // TOP_K).to(tl.int64)
    column = column_tile * BLOCK_N
    acc = multiply(x_ptr, tokens, w_up, expert, column, D, 2 * F, False, DESCRIPTOR, BLOCK_M, BLOCK_N, BLOCK_K)
    parts = column_parts(acc, BLOCK_M, BLOCK_N, SUBTILES)
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    for i in tl.static_range(SUBTILES):
        _up_epilogue(
            parts[i], b_up_ptr, h_ptr, a_ptr, expert, rows, row_end, column + i * WIDTH,
            F, ALPHA, OFFSET, LIMIT, BIAS, STORE_H, STORE_A, 2 * F % BLOCK_N != 0, BLOCK_M, WIDTH,
        )  # fmt: skip


@triton.jit
def _down_epilogue(
    da,  # (BLOCK_M, WIDTH) columns of F from `column` on
    h_ptr,
    scale,  # (BLOCK_M) gate weight of each row
    scaled_a_ptr,
    grad_h_ptr,
    partials_ptr,  # at the tile's row
    rows,
    row_end,
    column,
    F: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Activation backward on a part of the tile; writes s·a, grad_h and its column sums; returns Σ da·a `(BLOCK_M)`.

    The sums need no mask: rows beyond the end have scale 0, columns beyond F have da = h = 0.
    """
    pairs = column + tl.arange(0, WIDTH)
    mask = (rows < row_end)[:, None]
    if RAGGED:
        mask = mask & (pairs < F)[None, :]
    offset = rows[:, None] * F + pairs[None, :]
    gate, up = load_pair(h_ptr, offset, mask)
    a, grad_gate, grad_up = gated_activation_backward(gate, up, da, ALPHA, OFFSET, LIMIT)
    dot = tl.sum(da * a, 1)
    tl.store(scaled_a_ptr + offset, (scale[:, None] * a).to(scaled_a_ptr.dtype.element_ty), mask=mask)
    grad_gate = scale[:, None] * grad_gate
    grad_up = scale[:, None] * grad_up
    store_pair(grad_h_ptr, offset, grad_gate, grad_up, mask)
    if BIAS:
        tl.store(partials_ptr + 2 * pairs, tl.sum(grad_gate, 0), mask=pairs < F)
        tl.store(partials_ptr + 2 * pairs + 1, tl.sum(grad_up, 0), mask=pairs < F)
    return dot


@triton.jit(do_not_specialize=["num_rows"])
def _down_bwd_kernel(
    grad_out_ptr,  # (T, D)
    permutation_ptr,  # (N)
    w_down,  # (E, F, D), a pointer or a tensor descriptor
    h_ptr,  # (N, 2F)
    topk_weights_ptr,  # (T, K) fp32
    expert_offsets_ptr,  # (E + 1)
    scaled_a_ptr,  # (N, F)
    grad_h_ptr,  # (N, 2F)
    dots_ptr,  # (column tiles, N) fp32: Σ da·a over a tile's columns
    partials_ptr,  # (row tiles, 2F) fp32: Σ grad_h over a tile's rows, if BIAS
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    BIAS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (bound on row tiles · column tiles of F)."""
    expert, row, row_end, column_tile, tile = find_tile(
        expert_offsets_ptr, num_rows, NUM_EXPERTS, F, BLOCK_M, BLOCK_N, GROUP_M
    )
    if expert < 0:
        return
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
    slots = tl.load(permutation_ptr + tl.minimum(rows, row_end - 1)).to(tl.int64)
    column = column_tile * BLOCK_N
    da = multiply(
        grad_out_ptr, slots // TOP_K, w_down, expert, column, D, F, True, DESCRIPTOR, BLOCK_M, BLOCK_N, BLOCK_K
    )
    parts = column_parts(da, BLOCK_M, BLOCK_N, SUBTILES)
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    scale = tl.load(topk_weights_ptr + slots, mask=rows < row_end, other=0.0)
    partials = partials_ptr
    if BIAS:
        partials += tile.to(tl.int64) * (2 * F)
    dot = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for i in tl.static_range(SUBTILES):
        dot += _down_epilogue(
            parts[i], h_ptr, scale, scaled_a_ptr, grad_h_ptr, partials, rows, row_end, column + i * WIDTH,
            F, ALPHA, OFFSET, LIMIT, BIAS, F % BLOCK_N != 0, WIDTH,
        )  # fmt: skip
    tl.store(dots_ptr + column_tile.to(tl.int64) * num_rows + rows, dot, mask=rows < row_end)


def up_forward(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    permutation: Tensor,
    expert_offsets: Tensor,
    top_k: int,
    activation: tuple[float, float, float],
    store_h: bool,
    store_a: bool,
    autotune: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """h and a, those of them that are wanted."""
    num_rows, (num_experts, d, width) = permutation.numel(), w_up.shape
    h = x.new_empty(num_rows, width) if store_h else None
    a = x.new_empty(num_rows, width // 2) if store_a else None

    def run(tile: Tile) -> None:
        grid = (row_tile_bound(num_rows, num_experts, tile.BLOCK_M) * triton.cdiv(width, tile.BLOCK_N),)
        descriptor = launch.weight_descriptor(w_up, tile, transposed=False)
        _up_fwd_kernel[grid](
            x,
            permutation,
            w_up if descriptor is None else descriptor,
            b_up,
            expert_offsets,
            h if store_h else a,  # of the right type, for the rounding
            a,
            num_rows,
            NUM_EXPERTS=num_experts,
            D=d,
            F=width // 2,
            TOP_K=top_k,
            **_constants(activation),
            BIAS=b_up is not None,
            STORE_H=store_h,
            STORE_A=store_a,
            DESCRIPTOR=descriptor is not None,
            **tile.options(),
        )

    if num_rows:
        run(launch.choose("up_forward", x.dtype, num_rows // num_experts, width, d, run if autotune else None))
    return h, a


def _constants(activation: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("ALPHA", "OFFSET", "LIMIT"), activation, strict=True))


def down_backward(
    grad_out: Tensor,
    w_down: Tensor,
    h: Tensor,
    topk_weights: Tensor,
    permutation: Tensor,
    expert_offsets: Tensor,
    activation: tuple[float, float, float],
    up_bias: bool,
    extra_dots: int,
    autotune: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """What the epilogue of `da = g @ w_downᵀ` makes: s·a, grad_h, partial sums of da·a and of grad_h.

    Returns:
        scaled_a `(N, F)`, grad_h `(N, 2F)`, dots `(column tiles + extra_dots, N)` of which the last extra_dots are
        left to the caller, partials `(row tiles, 2F)` or None, rows of such a tile.
    """
    num_rows, (num_experts, f, d) = permutation.numel(), w_down.shape
    scaled_a, grad_h = h.new_empty(num_rows, f), torch.empty_like(h)

    def run(tile: Tile) -> tuple[Tensor, Tensor | None]:
        row_tiles, column_tiles = row_tile_bound(num_rows, num_experts, tile.BLOCK_M), triton.cdiv(f, tile.BLOCK_N)
        dots = topk_weights.new_empty(column_tiles + extra_dots, num_rows)
        partials = topk_weights.new_empty(row_tiles, 2 * f) if up_bias else None
        descriptor = launch.weight_descriptor(w_down, tile, transposed=True)
        if num_rows:
            _down_bwd_kernel[(row_tiles * column_tiles,)](
                grad_out,
                permutation,
                w_down if descriptor is None else descriptor,
                h,
                topk_weights,
                expert_offsets,
                scaled_a,
                grad_h,
                dots,
                partials,
                num_rows,
                NUM_EXPERTS=num_experts,
                D=d,
                F=f,
                TOP_K=topk_weights.shape[1],
                **_constants(activation),
                BIAS=up_bias,
                DESCRIPTOR=descriptor is not None,
                **tile.options(),
            )
        return dots, partials

    timed = run if autotune and num_rows else None
    tile = launch.choose("down_backward", h.dtype, num_rows // num_experts, f, d, timed)
    dots, partials = run(tile)
    return scaled_a, grad_h, dots, partials, tile.BLOCK_M
