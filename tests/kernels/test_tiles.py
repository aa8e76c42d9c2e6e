"""Which program computes which tile: every tile once, whatever the offsets, and no program without need."""

from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_engine.kernels.tiles import column_parts, find_tile, row_tile_bound

BLOCK_M, BLOCK_N = 16, 32


@triton.jit
def _find_tile_kernel(
    expert_offsets_ptr,
    found_ptr,  # (programs, 5): what find_tile returns
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    expert, row, row_end, column_tile, tile = find_tile(
        expert_offsets_ptr, num_rows, NUM_EXPERTS, COLUMNS, BLOCK_M, BLOCK_N, GROUP_M
    )
    found = found_ptr + tl.program_id(0) * 5
    tl.store(found, expert.to(tl.int32))
    tl.store(found + 1, row)
    tl.store(found + 2, row_end)
    tl.store(found + 3, column_tile)
    tl.store(found + 4, tile)


def _find(device: str, counts: list[int], columns: int, group_m: int) -> list[tuple[int, ...]]:
    """What every program of the grid finds: expert, first row, end, column tile, row tile."""
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32).to(device)
    programs = row_tile_bound(sum(counts), len(counts), BLOCK_M) * triton.cdiv(columns, BLOCK_N)
    found = torch.empty(programs, 5, dtype=torch.int32, device=device)
    if programs:
        _find_tile_kernel[(programs,)](
            offsets,
            found,
            sum(counts),
            NUM_EXPERTS=len(counts),
            COLUMNS=columns,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            GROUP_M=group_m,
        )
    return [tuple(row) for row in found.tolist()]


def _tiles(counts: list[int], columns: int) -> list[tuple[int, ...]]:
    """Every tile there is, in the order of rows."""
    offsets = torch.tensor([0, *counts]).cumsum(0).tolist()
    rows = [
        (expert, row, end)
        for expert, (begin, end) in enumerate(pairwise(offsets))
        for row in range(begin, end, BLOCK_M)
    ]
    column_tiles = range(triton.cdiv(columns, BLOCK_N))
    return [(*row, column_tile, tile) for tile, row in enumerate(rows) for column_tile in column_tiles]


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 70)), min_size=1, max_size=9),
    columns=st.integers(1, 100),
    group_m=st.integers(1, 20),
)
@example(counts=[50], columns=64, group_m=1)  # one expert: tl.arange of one element
@example(counts=[0], columns=64, group_m=4)  # no rows: the bound is 0
@example(counts=[0, 0, 0], columns=64, group_m=4)  # no rows: programs of the bound find nothing
@example(counts=[0, 33, 0, 0, 16, 0], columns=33, group_m=2)  # tiles pass over experts without rows
@example(counts=[16, 32, 48], columns=32, group_m=4)  # rows end with their tiles
@example(counts=[17, 33, 1], columns=32, group_m=4)  # rows end one past a tile
@example(counts=[1] * 9, columns=70, group_m=100)  # the bound is reached, and no group is ever full
def test_every_tile_once(device, counts, columns, group_m):
    found = _find(device, counts, columns, group_m)
    busy = [tile for tile in found if tile[0] >= 0]
    assert sorted(busy, key=lambda tile: (tile[4], tile[3])) == _tiles(counts, columns)
    assert found[: len(busy)] == busy  # those without work come last
    assert all(tile[0] == -1 for tile in found[len(busy) :])


def test_tiles_go_in_groups(device):
    found = _find(device, [48], 64, 2)
    assert [(tile, column_tile) for _, _, _, column_tile, tile in found] == [
        *((0, 0), (1, 0), (0, 1), (1, 1)),  # two row tiles through the columns: they share a weight's columns in L2
        *((2, 0), (2, 1)),
    ]


@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=70), block_m=st.sampled_from([16, 64, 128]))
def test_the_bound_suffices(counts, block_m):
    assert sum(triton.cdiv(count, block_m) for count in counts) <= row_tile_bound(sum(counts), len(counts), block_m)


def test_the_bound_can_be_reached():
    assert row_tile_bound(1 + 1 + 17, 3, 16) == 4 == 1 + 1 + 2


@triton.jit
def _parts_kernel(x_ptr, out_ptr, M: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    at = tl.arange(0, M)[:, None] * WIDTH
    parts = column_parts(tl.load(x_ptr + at + tl.arange(0, WIDTH)[None, :]), M, WIDTH, PARTS)
    for i in tl.static_range(PARTS):
        columns = i * (WIDTH // PARTS) + tl.arange(0, WIDTH // PARTS)
        tl.store(out_ptr + at + columns[None, :], parts[i])


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_of_columns_are_in_order(device, parts):
    x = torch.arange(16 * 64, dtype=torch.float32, device=device).view(16, 64)
    out = torch.empty_like(x)
    _parts_kernel[(1,)](x, out, M=16, WIDTH=64, PARTS=parts)
    assert torch.equal(out, x)
