"""Tiles of products of ragged row groups: the device functions that all grouped GEMM kernels share.

Rows are sorted by expert: expert e owns [expert_offsets[e], expert_offsets[e + 1]). The host never reads the offsets: a
grid has as many programs as the worst case needs (`row_tile_bound`), and each finds its expert by itself (`find_tile`).

E = experts, N = routed rows; a product is (N, DEPTH) @ (E, DEPTH, COLUMNS)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_engine.kernels.launch import INTERPRETED, check


def row_tile_bound(num_rows: int, num_experts: int, block_m: int) -> int:
    """Row tiles that suffice whatever the offsets are: Σ_e cdiv(n_e, block_m) is never more."""
    return triton.cdiv(num_rows, block_m) + num_experts - 1


def check_offsets(expert_offsets: Tensor, num_rows: int) -> None:
    """Check the offsets' values where reading them waits for nothing; on a GPU the kernels clamp them.

    Raises:
        ValueError: they do not rise from 0 to the number of rows.
    """
    if INTERPRETED:
        values = expert_offsets.tolist()
        rising = values[0] == 0 and values[-1] == num_rows and values == sorted(values)
        check(rising, "expert_offsets", f"values that rise from 0 to N = {num_rows}", values)


def check_permutation(permutation: Tensor, inverse_permutation: Tensor) -> None:
    """Check that one undoes the other, where reading them waits for nothing; on a GPU they are trusted.

    Raises:
        ValueError: they are not two permutations of 0 … N − 1, each the other's inverse.
    """
    if INTERPRETED:
        slots, rows = permutation.tolist(), list(range(permutation.numel()))
        check(sorted(slots) == rows, "permutation", f"each of 0 to {len(rows) - 1} once", slots)
        inverse = inverse_permutation.tolist()
        check([inverse[slot] for slot in slots] == rows, "inverse_permutation", "the inverse", "another")


@triton.jit
def row_tiles(expert_offsets_ptr, num_rows, NUM_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Every expert's first row, end and last row tile, `(EXPERTS)` each.

    Whatever the offsets hold, rows are among those that exist and tiles within `row_tile_bound`.
    """
    EXPERTS: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    experts = tl.arange(0, EXPERTS)
    real = experts < NUM_EXPERTS
    begin = tl.load(expert_offsets_ptr + experts, mask=real, other=0)
    end = tl.load(expert_offsets_ptr + experts + 1, mask=real, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), num_rows)
    end = tl.minimum(tl.maximum(end, begin), num_rows)
    last = tl.cumsum(tl.cdiv(end - begin, BLOCK_M), 0)
    return begin, end, tl.minimum(last, tl.cdiv(num_rows, BLOCK_M) + NUM_EXPERTS - 1)


@triton.jit
def find_tile(
    expert_offsets_ptr,  # (E + 1)
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """What this program computes: expert (int64), first row, end of the expert's rows, column tile, row tile.

    The expert is −1 for a program of the bound that has nothing to do. Tiles go in groups of GROUP_M row tiles, so that
    programs that run at the same time share rows and weights in L2.
    """
    EXPERTS: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    begin, end, last = row_tiles(expert_offsets_ptr, num_rows, NUM_EXPERTS, BLOCK_M)
    total = tl.max(last, 0)
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    group = pid // (GROUP_M * COLUMN_TILES)
    in_group = pid % (GROUP_M * COLUMN_TILES)
    size = tl.maximum(tl.minimum(total - group * GROUP_M, GROUP_M), 1)
    tile = group * GROUP_M + in_group % size
    column_tile = in_group // size

    experts = tl.arange(0, EXPERTS)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    own = experts == expert
    first = tl.sum(tl.where(own, last - tl.cdiv(end - begin, BLOCK_M), 0), 0)
    row = tl.sum(tl.where(own, begin, 0), 0) + (tile - first) * BLOCK_M
    row_end = tl.sum(tl.where(own, end, 0), 0)
    expert = tl.where(pid < total * COLUMN_TILES, expert, -1)
    return expert.to(tl.int64), row, row_end, column_tile, tile


@triton.jit
def multiply(
    x_ptr,  # (·, DEPTH)
    rows,  # (BLOCK_M) int64, rows of x
    w,  # (E, DEPTH, COLUMNS), TRANSPOSED (E, COLUMNS, DEPTH): a pointer, with DESCRIPTOR a tensor descriptor
    expert,  # int64
    column,  # first column of the tile
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`x[rows] @ w[expert][:, column : column + BLOCK_N]`, `(BLOCK_M, BLOCK_N)` fp32; zero beyond COLUMNS."""
    depth = tl.arange(0, BLOCK_K)
    columns = column + tl.arange(0, BLOCK_N)
    x_pointers = x_ptr + rows[:, None] * DEPTH + depth[None, :]
    if not DESCRIPTOR:
        w_base = w + expert * (DEPTH * COLUMNS)
        if TRANSPOSED:
            w_pointers = w_base + depth[:, None] + columns[None, :].to(tl.int64) * DEPTH
        else:
            w_pointers = w_base + depth[:, None].to(tl.int64) * COLUMNS + columns[None, :]
        in_columns = (columns < COLUMNS)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            x = tl.load(x_pointers)
        else:
            x = tl.load(x_pointers, mask=(depth < DEPTH - k)[None, :], other=0.0)
        if DESCRIPTOR:
            if TRANSPOSED:
                tile = w.load([expert.to(tl.int32), column, k])
                tile = tl.trans(tl.reshape(tile, (BLOCK_N, BLOCK_K)))
            else:
                tile = w.load([expert.to(tl.int32), k, column])
                tile = tl.reshape(tile, (BLOCK_K, BLOCK_N))
        else:
            if DEPTH % BLOCK_K == 0 and COLUMNS % BLOCK_N == 0:
                tile = tl.load(w_pointers)
            elif DEPTH % BLOCK_K == 0:
                tile = tl.load(w_pointers, mask=in_columns, other=0.0)
            else:
                tile = tl.load(w_pointers, mask=(depth < DEPTH - k)[:, None] & in_columns, other=0.0)
            w_pointers += BLOCK_K if TRANSPOSED else BLOCK_K * COLUMNS
        acc = tl.dot(x, tile, acc, input_precision="ieee")
        x_pointers += BLOCK_K
    return acc


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Left and right half of `(BLOCK_M, WIDTH)`."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def column_parts(x, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """`(BLOCK_M, WIDTH)` in 1, 2, 4 or 8 parts of its columns, in order: narrow epilogues hold fewer registers."""
    parts = (x,)
    if PARTS >= 2:
        parts = _halves(x, BLOCK_M, WIDTH)
    if PARTS >= 4:
        parts = _halves(parts[0], BLOCK_M, WIDTH // 2) + _halves(parts[1], BLOCK_M, WIDTH // 2)
    if PARTS == 8:
        left = _halves(parts[0], BLOCK_M, WIDTH // 4) + _halves(parts[1], BLOCK_M, WIDTH // 4)
        parts = left + _halves(parts[2], BLOCK_M, WIDTH // 4) + _halves(parts[3], BLOCK_M, WIDTH // 4)
    return parts
