"""Matrix products of ragged groups of rows with one weight per group, and their gradients.

    y[r]  = x[r] @ w[e(r)] + bias[e(r)]            or, with a gather in the load, x[permutation[r] // K] @ …
    dx[r] = dy[r] @ w[e(r)]ᵀ
    dw[e] = Σ_{r of e} x[r]ᵀ dy[r],   dbias[e] = Σ_{r of e} dy[r]

Rows are sorted by expert, and the host does not read the offsets: see `tiles.py`. `multiply_rows` and `weight_grad`
launch without autograd, for the expert MLP.

Saved for backward: x, w, offsets and, with a gather, the permutations.

T = tokens, E = experts, N = routed rows, K = top_k; a product is (N, DEPTH) @ (E, DEPTH, COLUMNS)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.kernels import launch
from moe_engine.kernels.launch import FLOATS, Tile, check, check_device, check_tensor, on_device_of_arguments
from moe_engine.kernels.permutation import combine_rows
from moe_engine.kernels.row_sums import sum_rows
from moe_engine.kernels.tiles import check_offsets, check_permutation, find_tile, multiply, row_tile_bound, row_tiles


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_gemm_kernel(
    x_ptr,  # (N, DEPTH); GATHER: (T, DEPTH)
    permutation_ptr,  # (N), if GATHER
    w,  # (E, DEPTH, COLUMNS), TRANSPOSED: (E, COLUMNS, DEPTH)
    bias_ptr,  # (E, COLUMNS), if BIAS
    expert_offsets_ptr,  # (E + 1)
    y_ptr,  # (N, COLUMNS)
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (bound on row tiles · column tiles)."""
    expert, row, row_end, column_tile, _ = find_tile(
        expert_offsets_ptr, num_rows, NUM_EXPERTS, COLUMNS, BLOCK_M, BLOCK_N, GROUP_M
    )
    if expert < 0:
        return
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
    source = tl.minimum(rows, row_end - 1)  # beyond the end: any row that exists, so that loads need no mask
    if GATHER:
        source = (tl.load(permutation_ptr + source) // TOP_K).to(tl.int64)
    column = column_tile * BLOCK_N
    acc = multiply(x_ptr, source, w, expert, column, DEPTH, COLUMNS, TRANSPOSED, DESCRIPTOR, BLOCK_M, BLOCK_N, BLOCK_K)
    columns = column + tl.arange(0, BLOCK_N)
    if BIAS:
        bias = tl.load(bias_ptr + expert * COLUMNS + columns, mask=columns < COLUMNS, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    mask = (rows < row_end)[:, None]
    if COLUMNS % BLOCK_N:
        mask = mask & (columns < COLUMNS)[None, :]
    tl.store(y_ptr + rows[:, None] * COLUMNS + columns[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _weight_grad_kernel(
    x_ptr,  # (N, DEPTH); GATHER_X: (T, DEPTH)
    dy_ptr,  # (N, COLUMNS); GATHER_DY: (T, COLUMNS)
    permutation_ptr,  # (N), if GATHER_X or GATHER_DY
    expert_offsets_ptr,  # (E + 1)
    partials_ptr,  # (row tiles of PARTIAL_M, COLUMNS) fp32 sums over a tile's rows, if BIAS
    dw_ptr,  # (E, DEPTH, COLUMNS)
    dbias_ptr,  # (E, COLUMNS), if BIAS
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER_X: tl.constexpr,
    GATHER_DY: tl.constexpr,
    BIAS: tl.constexpr,
    PARTIAL_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (E · tiles of an expert's weight). BLOCK_M, BLOCK_N tile the weight, BLOCK_K steps through the rows."""
    EXPERTS: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    M_TILES: tl.constexpr = (DEPTH + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    expert = pid // (M_TILES * N_TILES)
    in_expert = pid % (M_TILES * N_TILES)
    group = in_expert // (GROUP_M * N_TILES)
    in_group = in_expert % (GROUP_M * N_TILES)
    size = tl.minimum(M_TILES - group * GROUP_M, GROUP_M)
    m_tile = group * GROUP_M + in_group % size
    n_tile = in_group // size

    begin = tl.minimum(tl.maximum(tl.load(expert_offsets_ptr + expert), 0), num_rows)
    end = tl.minimum(tl.maximum(tl.load(expert_offsets_ptr + expert + 1), begin), num_rows)
    ms = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row in range(begin, end, BLOCK_K):
        rows = (row + steps).to(tl.int64)
        valid = rows < end
        if GATHER_X or GATHER_DY:
            tokens = (tl.load(permutation_ptr + rows, mask=valid, other=0) // TOP_K).to(tl.int64)
        x_mask = valid[None, :]
        if DEPTH % BLOCK_M:
            x_mask = x_mask & (ms < DEPTH)[:, None]
        dy_mask = valid[:, None]
        if COLUMNS % BLOCK_N:
            dy_mask = dy_mask & (columns < COLUMNS)[None, :]
        x_rows = tokens if GATHER_X else rows
        dy_rows = tokens if GATHER_DY else rows
        # Loaded as xᵀ: a tl.trans between load and dot would keep x from being copied asynchronously on sm_80.
        x = tl.load(x_ptr + x_rows[None, :] * DEPTH + ms[:, None], mask=x_mask, other=0.0)
        dy = tl.load(dy_ptr + dy_rows[:, None] * COLUMNS + columns[None, :], mask=dy_mask, other=0.0)
        acc = tl.dot(x, dy, acc, input_precision="ieee")
    mask = (ms < DEPTH)[:, None] & (columns < COLUMNS)[None, :]
    base = dw_ptr + expert.to(tl.int64) * (DEPTH * COLUMNS)
    tl.store(base + ms[:, None].to(tl.int64) * COLUMNS + columns[None, :], acc.to(dw_ptr.dtype.element_ty), mask=mask)

    if BIAS:  # noqa: SIM102, decided when compiling: without a bias what follows does not exist
        if m_tile == 0:
            _, _, last = row_tiles(expert_offsets_ptr, num_rows, NUM_EXPERTS, PARTIAL_M)
            tile_end = tl.sum(tl.where(tl.arange(0, EXPERTS) == expert, last, 0), 0)
            tile_begin = tile_end - tl.cdiv(end - begin, PARTIAL_M)
            total = tl.zeros((BLOCK_N,), dtype=tl.float32)
            partial = partials_ptr + tile_begin.to(tl.int64) * COLUMNS + columns
            for _ in range(tile_begin, tile_end):
                total += tl.load(partial, mask=columns < COLUMNS, other=0.0)
                partial += COLUMNS
            dbias = dbias_ptr + expert.to(tl.int64) * COLUMNS + columns
            tl.store(dbias, total.to(dbias_ptr.dtype.element_ty), mask=columns < COLUMNS)


def multiply_rows(
    x: Tensor,
    w: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    permutation: Tensor | None = None,
    top_k: int = 1,
    transposed: bool = False,
    autotune: bool = False,
) -> Tensor:
    """Launch `y[r] = x[r] @ w[e(r)] (+ bias[e(r)])`; with a permutation, x is gathered; transposed: `w[e(r)]ᵀ`."""
    num_rows = x.shape[0] if permutation is None else permutation.numel()
    num_experts = w.shape[0]
    depth, columns = (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])
    y = x.new_empty(num_rows, columns)

    def run(tile: Tile) -> None:
        grid = (row_tile_bound(num_rows, num_experts, tile.BLOCK_M) * triton.cdiv(columns, tile.BLOCK_N),)
        descriptor = launch.weight_descriptor(w, tile, transposed)
        _grouped_gemm_kernel[grid](
            x,
            permutation,
            w if descriptor is None else descriptor,
            bias,
            expert_offsets,
            y,
            num_rows,
            NUM_EXPERTS=num_experts,
            DEPTH=depth,
            COLUMNS=columns,
            TOP_K=top_k,
            GATHER=permutation is not None,
            BIAS=bias is not None,
            TRANSPOSED=transposed,
            DESCRIPTOR=descriptor is not None,
            **tile.options(),
        )

    if num_rows:
        kernel = "gemm_transposed" if transposed else "gemm"
        run(launch.choose(kernel, x.dtype, num_rows // num_experts, columns, depth, run if autotune else None))
    return y


def weight_grad(
    x: Tensor,
    dy: Tensor,
    num_rows: int,
    expert_offsets: Tensor,
    permutation: Tensor | None = None,
    top_k: int = 1,
    gather: str = "",
    partials: Tensor | None = None,
    partial_m: int = launch.PARTIAL_M,
    autotune: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launch `dw[e] = Σ_r x[r]ᵀ dy[r]`, and `dbias[e]` from the partial sums of dy over row tiles of partial_m.

    gather: which operand has T rows, to be read through the permutation: `x`, `dy` or neither.
    """
    num_experts, depth, columns = expert_offsets.numel() - 1, x.shape[1], dy.shape[1]
    dw = x.new_empty(num_experts, depth, columns)
    dbias = None if partials is None else x.new_empty(num_experts, columns)

    def run(tile: Tile) -> None:
        grid = (num_experts * triton.cdiv(depth, tile.BLOCK_M) * triton.cdiv(columns, tile.BLOCK_N),)
        if not gather:  # the tile is made for a gather, whose index loads take every other stage of the pipeline
            tile = tile._replace(num_stages=max((tile.num_stages + 1) // 2, 2))
        _weight_grad_kernel[grid](
            x,
            dy,
            permutation,
            expert_offsets,
            partials,
            dw,
            dbias,
            num_rows,
            NUM_EXPERTS=num_experts,
            DEPTH=depth,
            COLUMNS=columns,
            TOP_K=top_k,
            GATHER_X=gather == "x",
            GATHER_DY=gather == "dy",
            BIAS=partials is not None,
            PARTIAL_M=partial_m,
            **tile.options(),
        )

    timed = run if autotune and num_rows else None
    run(launch.choose("weight_grad", x.dtype, num_rows // num_experts, columns, depth, timed))
    return dw, dbias


@torch.library.custom_op("moe_engine::grouped_gemm", mutates_args=())
@on_device_of_arguments
def _grouped_gemm(
    x: Tensor,
    w: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    inverse_permutation: Tensor | None,
    autotune: bool,
) -> Tensor:
    check_device("x", x)
    num_rows = x.shape[0] if permutation is None else permutation.numel()
    check_offsets(expert_offsets, num_rows)
    if permutation is not None:
        check_permutation(permutation, inverse_permutation)
    return multiply_rows(x, w, expert_offsets, bias, permutation, _top_k(x, permutation), autotune=autotune)


def _top_k(x: Tensor, permutation: Tensor | None) -> int:
    return 1 if permutation is None or not x.shape[0] else permutation.numel() // x.shape[0]


@_grouped_gemm.register_fake
def _(x, w, expert_offsets, bias, permutation, inverse_permutation, autotune):
    return x.new_empty(x.shape[0] if permutation is None else permutation.numel(), w.shape[2])


@torch.library.custom_op("moe_engine::grouped_gemm_backward", mutates_args=())
@on_device_of_arguments
def _grouped_gemm_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor | None,
    inverse_permutation: Tensor | None,
    bias: bool,
    autotune: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_device("dy", dy)
    num_rows, top_k = dy.shape[0], _top_k(x, permutation)
    dx = multiply_rows(dy, w, expert_offsets, transposed=True, autotune=autotune)
    if inverse_permutation is not None:
        dx, _ = combine_rows(dx, None, inverse_permutation, top_k)
    partials = sum_rows(dy, num_rows, expert_offsets) if bias else None
    gather = "" if permutation is None else "x"
    dw, dbias = weight_grad(x, dy, num_rows, expert_offsets, permutation, top_k, gather, partials, autotune=autotune)
    return dx, dw, x.new_empty(0) if dbias is None else dbias


@_grouped_gemm_backward.register_fake
def _(dy, x, w, expert_offsets, permutation, inverse_permutation, bias, autotune):
    return torch.empty_like(x), torch.empty_like(w), x.new_empty((w.shape[0], w.shape[2]) if bias else 0)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, w, expert_offsets, bias, permutation, inverse_permutation, ctx.autotune = inputs
    ctx.bias = bias is not None
    ctx.save_for_backward(x, w, expert_offsets, permutation, inverse_permutation)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw, dbias = _grouped_gemm_backward(dy.contiguous(), *ctx.saved_tensors, ctx.bias, ctx.autotune)
    return dx, dw, None, dbias if ctx.bias else None, None, None, None


_grouped_gemm.register_autograd(_backward, setup_context=_save)


def grouped_gemm(
    x: Tensor,
    w: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    permutation: Tensor | None = None,
    inverse_permutation: Tensor | None = None,
    autotune: bool = False,
) -> Tensor:
    """`y[r] = x[r] @ w[e(r)] + bias[e(r)]` for rows sorted by expert; differentiable in x, w and bias.

    Args:
        x: `(N, DEPTH)`, fp32, fp16 or bf16; with a permutation `(T, DEPTH)`, and row r reads `x[permutation[r] // K]`,
            K = N / T.
        w: `(E, DEPTH, COLUMNS)` of x's dtype.
        expert_offsets: `(E + 1)` int32, rising from 0 to N; on a GPU they are not read on the host but clamped there.
        bias: `(E, COLUMNS)` of x's dtype, or None.
        permutation, inverse_permutation: `(N)` int32, both or neither; from `sort_by_expert`. A GPU trusts them.
        autotune: time the candidate tiles once for a bucket of shapes; ignored in the interpreter.
    Returns:
        `(N, COLUMNS)` in x's dtype; fp32 accumulation.
    Raises:
        ValueError: an argument is not as described; the message names it, what was expected and what came.
    """
    gathered = permutation is not None
    check_tensor("x", x, ("T" if gathered else "N", "DEPTH"), FLOATS)
    check_tensor("w", w, ("E", x.shape[1], "COLUMNS"), x.dtype, x)
    num_experts, _, columns = w.shape
    check(w.numel() > 0, "w", "experts, depth and columns", tuple(w.shape))
    check_tensor("expert_offsets", expert_offsets, (num_experts + 1,), torch.int32, x)
    if bias is not None:
        check_tensor("bias", bias, (num_experts, columns), x.dtype, x)
    both = gathered == (inverse_permutation is not None)
    check(both, "inverse_permutation", "one with a permutation, None without", type(inverse_permutation).__name__)
    if gathered:
        check_tensor("permutation", permutation, ("N",), torch.int32, x)
        tokens, rows = x.shape[0], permutation.numel()
        whole = rows % max(tokens, 1) == 0 and (rows > 0) == (tokens > 0)
        if not whole:  # a number in the text would bind a compiled graph to it
            check(False, "permutation", f"a multiple of T = {tokens} rows", rows)
        check_tensor("inverse_permutation", inverse_permutation, (permutation.numel(),), torch.int32, x)
    return _grouped_gemm(x, w, expert_offsets, bias, permutation, inverse_permutation, autotune)
