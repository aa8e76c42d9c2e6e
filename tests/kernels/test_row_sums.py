"""Sums over each tile of rows, and products of each row with its expert's bias, against fp64."""

from itertools import pairwise

import pytest
import torch
import triton
from torch import Tensor

from moe_engine import torch_backend
from moe_engine.kernels.launch import PARTIAL_M, SUM_N
from moe_engine.kernels.row_sums import sum_rows
from moe_engine.kernels.tiles import row_tile_bound
from moe_engine.testing import assert_budget_bites, assert_close, normal

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _offsets(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def _routed(*counts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """expert_offsets, and a permutation that gives each expert so many of the slots, here and there."""
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    experts = experts[torch.randperm(len(experts), generator=torch.Generator().manual_seed(0))].to(torch.int32)
    return torch_backend.sort_by_expert(experts.view(-1, top_k), torch.tensor(counts, dtype=torch.int32))


def _twin(dy, offsets, permutation, top_k, scale, bias) -> tuple[Tensor, Tensor | None]:
    """Sums `(tiles, COLUMNS)`, products `(N)`, in scale's or dy's dtype."""
    rows = dy if permutation is None else dy[permutation // top_k]
    scaled = rows if scale is None else rows * scale[permutation, None]
    groups = list(pairwise(offsets.tolist()))
    sums = [
        scaled[row : min(row + PARTIAL_M, end)].sum(0) for begin, end in groups for row in range(begin, end, PARTIAL_M)
    ]
    dots = None
    if bias is not None:
        dots = torch.cat([rows[begin:end] @ bias[e] for e, (begin, end) in enumerate(groups)])
    return torch.stack(sums), dots


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "counts, columns",
    [
        ((40, 25), 64),  # within a tile
        ((PARTIAL_M, 0, 2 * PARTIAL_M + 1, 3), SUM_N + 2),  # tiles to the row and one past it, an empty expert, ragged
        ((0, 1), 1),  # the least
        ((17, 15, 16), SUM_N),  # steps of 16 rows: one past, one short, exactly
    ],
)
def test_sums_match_fp64(device, counts, columns, dtype):
    dy, offsets = normal(sum(counts), columns, dtype=dtype), _offsets(*counts)
    partials = sum_rows(dy.to(device), sum(counts), offsets.to(device)).cpu()
    assert partials.shape == (row_tile_bound(sum(counts), len(counts), PARTIAL_M), columns)
    exact, _ = _twin(dy.double(), offsets, None, 1, None, None)
    same, _ = _twin(dy.float(), offsets, None, 1, None, None)
    assert_close(partials[: len(exact)], exact, same, roundings=2)
    if len(exact) > 1:
        assert_budget_bites(exact, same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [False, True], ids=["", "scale"])
@pytest.mark.parametrize("top_k, columns", [(1, SUM_N), (2, 2 * SUM_N + 3), (4, 20)])
def test_gathered_sums_and_products_match_fp64(device, top_k, columns, scale, dtype):
    counts = (PARTIAL_M + 4, 0, 3, 17)
    n = sum(counts)
    dy, bias = normal(n // top_k, columns, dtype=dtype), normal(len(counts), columns, seed=1, dtype=dtype)
    offsets, permutation = _routed(*counts, top_k=top_k)
    weights = normal(n, seed=2, dtype=torch.float32).abs() if scale else None
    dots = torch.empty(triton.cdiv(columns, SUM_N), n, device=device)
    moved = [None if t is None else t.to(device) for t in (dy, offsets, permutation, weights, bias)]
    partials = sum_rows(moved[0], n, moved[1], moved[2], top_k, moved[3], moved[4], dots).cpu()

    wide = None if weights is None else weights.double()
    exact = _twin(dy.double(), offsets, permutation, top_k, wide, bias.double())
    same = _twin(dy.float(), offsets, permutation, top_k, weights, bias.float())
    actual = partials[: len(exact[0])], dots.cpu().sum(0)
    for name, a, e, s in zip(("sums", "products"), actual, exact, same, strict=True):
        assert_close(a, e, s, roundings=2, name=name)
        assert_budget_bites(e, s)
    for tile in range(len(dots)):  # each part of the products on its own
        here = slice(tile * SUM_N, (tile + 1) * SUM_N)
        _, part = _twin(dy[:, here].double(), offsets, permutation, top_k, None, bias[:, here].double())
        _, reference = _twin(dy[:, here].float(), offsets, permutation, top_k, None, bias[:, here].float())
        assert_close(dots[tile].cpu(), part, reference, roundings=2, name=f"products[{tile}]")


def test_a_nan_stays_in_its_tile_and_column(device):
    dy, offsets = normal(PARTIAL_M + 40, 70, dtype=torch.float32), _offsets(33, PARTIAL_M + 2, 5)
    clean = sum_rows(dy.to(device), len(dy), offsets.to(device)).cpu()[:4]
    dy[32, 3] = torch.nan  # the last row of the first expert
    partials = sum_rows(dy.to(device), len(dy), offsets.to(device)).cpu()[:4]
    assert partials[0, 3].isnan() and partials.isnan().sum() == 1
    assert torch.equal(partials[~partials.isnan()], clean[~partials.isnan()])


def test_two_runs_agree_bit_for_bit(device):
    dy, offsets = normal(200, 70, dtype=torch.bfloat16).to(device), _offsets(150, 50).to(device)
    first, second = (sum_rows(dy, 200, offsets)[:3] for _ in range(2))
    assert torch.equal(first, second)


def test_no_rows(device):
    assert sum_rows(torch.zeros(0, 8, device=device), 0, _offsets(0, 0, 0).to(device)).shape == (2, 8)
