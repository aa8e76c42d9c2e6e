"""Sums over each tile of rows, in one pass: what the gradient of an expert's bias is made of.

    partials[tile] = Σ_{r of tile} scale[permutation[r]] · dy[r]        dots[·, r] = ⟨dy[r], bias[e(r)]⟩

With a gather, row r reads dy[permutation[r] // K]. A tile's rows are of one expert; `weight_grad` adds the tiles of an
expert in a fixed order.

T = tokens, E = experts, N = routed rows, K = top_k
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.kernels.launch import PARTIAL_M, SUM_N
from moe_engine.kernels.tiles import find_tile, row_tile_bound


@triton.jit(do_not_specialize=["num_rows"])
def _row_sums_kernel(
    dy_ptr,  # (N, COLUMNS); GATHER: (T, COLUMNS)
    permutation_ptr,  # (N), if GATHER
    scale_ptr,  # (N) fp32 by flat slot, if SCALE: row r counts scale[permutation[r]] times
    bias_ptr,  # (E, COLUMNS), if DOT
    expert_offsets_ptr,  # (E + 1)
    partials_ptr,  # (row tiles, COLUMNS) fp32: Σ of a tile's rows
    dots_ptr,  # (column tiles, N) fp32, if DOT: ⟨dy[r], bias[e]⟩ over a tile's columns
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    SCALE: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: (bound on row tiles · column tiles). What the gradients of a bias need, reading each row once."""
    expert, row, row_end, column_tile, tile = find_tile(
        expert_offsets_ptr, num_rows, NUM_EXPERTS, COLUMNS, BLOCK_M, BLOCK_N, 1
    )
    if expert < 0:
        return
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = columns < COLUMNS
    if DOT:
        bias = tl.load(bias_ptr + expert * COLUMNS + columns, mask=in_columns, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for step in range(0, BLOCK_M, CHUNK):
        rows = (row + step + tl.arange(0, CHUNK)).to(tl.int64)
        valid = rows < row_end
        source = rows
        if GATHER or SCALE:
            slots = tl.load(permutation_ptr + rows, mask=valid, other=0).to(tl.int64)
            if GATHER:
                source = slots // TOP_K
        mask = valid[:, None] & in_columns[None, :]
        dy = tl.load(dy_ptr + source[:, None] * COLUMNS + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if DOT:
            dots = dots_ptr + column_tile.to(tl.int64) * num_rows + rows
            tl.store(dots, tl.sum(dy * bias[None, :], 1), mask=valid)
        if SCALE:
            dy *= tl.load(scale_ptr + slots, mask=valid, other=0.0)[:, None]
        total += tl.sum(dy, 0)
    tl.store(partials_ptr + tile.to(tl.int64) * COLUMNS + columns, total, mask=in_columns)


def sum_rows(
    dy: Tensor,
    num_rows: int,
    expert_offsets: Tensor,
    permutation: Tensor | None = None,
    top_k: int = 1,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    dots: Tensor | None = None,
) -> Tensor:
    """Launch the column sums of every row tile, `(row tiles of PARTIAL_M, COLUMNS)` fp32.

    With `scale (N)` by flat slot, rows are scaled in the sums. With `bias (E, COLUMNS)`, ⟨dy[r], bias[e]⟩ goes to
    `dots (cdiv(COLUMNS, SUM_N), N)`, one partial sum a column tile.
    """
    num_experts, columns = expert_offsets.numel() - 1, dy.shape[1]
    tiles = row_tile_bound(num_rows, num_experts, PARTIAL_M)
    partials = dy.new_empty(tiles, columns, dtype=torch.float32)
    if num_rows:
        _row_sums_kernel[(tiles * triton.cdiv(columns, SUM_N),)](
            dy,
            permutation,
            scale,
            bias,
            expert_offsets,
            partials,
            dots,
            num_rows,
            NUM_EXPERTS=num_experts,
            COLUMNS=columns,
            TOP_K=top_k,
            GATHER=permutation is not None,
            SCALE=scale is not None,
            DOT=bias is not None,
            BLOCK_M=PARTIAL_M,
            BLOCK_N=SUM_N,
            CHUNK=16,
            num_warps=4,
        )
    return partials
