"""Offsets of more than 2³¹ elements, in every kernel that has a row, a token or an expert to multiply with a stride.

The tensors are of 4 to 9 GB, of which only a few rows at the end are ever touched: memory from `torch.empty` that
nobody touches costs nothing on a CPU. In the interpreter only the programs that have to do with these rows run. A copy
of the kernels with int32 for int64 shows that every case would notice an overflow.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

import moe_engine.kernels
from moe_engine import reference
from moe_engine.config import Activation
from moe_engine.kernels.launch import INTERPRETED
from moe_engine.testing import assert_close, normal

LIMIT = 1 << 31
TAIL = 5  # rows that lie behind it
HALF = torch.float16
OAI = Activation(1.702, 1.0, 7.0)
MODULES = ("fused_gemm", "grouped_gemm", "permutation", "row_sums", "swiglu")
TOUCHED = 200e6  # bytes of memory that a case may really take; the largest tensor that it fills is of 67 MB


class Result(NamedTuple):
    name: str
    actual: Tensor  # a view of the large tensor, which keeps it alive
    exact: Tensor


def _rows(width: int) -> int:
    """Rows of so many columns, the last TAIL of which begin at 2³¹ or later."""
    assert LIMIT % width == 0
    return LIMIT // width + TAIL


def _empty(*shape: int, device: str, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _ending_with(values: Tensor, rows: int, device: str) -> Tensor:
    """A tensor of so many rows; the last ones are these, the others nobody knows."""
    tensor = _empty(rows, *values.shape[1:], device=device, dtype=values.dtype)
    tensor[rows - len(values) :] = values.to(device)
    return tensor


def _normal(*shape: int, seed: int, dtype: torch.dtype = HALF) -> Tensor:
    return normal(*shape, seed=seed, dtype=dtype)


def _last_rows(rows: int, device: str) -> Tensor:
    """Offsets of one expert that has no rows but the last."""
    return torch.tensor([rows - TAIL, rows], dtype=torch.int32, device=device)


def _identity(rows: int, device: str) -> Tensor:
    return torch.arange(rows, dtype=torch.int32, device=device)


# Each case takes the kernels' modules, a device and `window`, and compares what comes out. `window(module, name, first,
# count)` lets a kernel run only programs `first … first + count − 1` of its grid; on a GPU all of them run.


def rows_of_a_product(kernels, device, window, transposed=False) -> list[Result]:
    depth, columns = 1024, 1024
    x, w = _normal(TAIL, depth, seed=1), _normal(1, depth, columns, seed=2) / 32
    n = _rows(1024)
    window(kernels.grouped_gemm, "_grouped_gemm_kernel", 0, 3)
    weight = (w.mT.contiguous() if transposed else w).to(device)
    y = kernels.grouped_gemm.multiply_rows(
        _ending_with(x, n, device), weight, _last_rows(n, device), transposed=transposed
    )
    exact = x.double() @ w[0].double()
    return [Result("y", y[-TAIL:, :64], exact[:, :64])]


def rows_of_a_product_transposed(kernels, device, window) -> list[Result]:
    return rows_of_a_product(kernels, device, window, transposed=True)


def gathered_rows_of_a_product(kernels, device, window) -> list[Result]:
    x, w = _normal(TAIL, 1024, seed=1), _normal(1, 1024, 64, seed=2) / 32
    tokens = _rows(1024)
    window(kernels.grouped_gemm, "_grouped_gemm_kernel", 0, 1)
    y = kernels.grouped_gemm.multiply_rows(
        _ending_with(x, tokens, device), w.to(device), _last_rows(tokens, device), None, _identity(tokens, device), 1
    )
    return [Result("y", y[-TAIL:], x.double() @ w[0].double())]


def experts_of_a_product(kernels, device, window, transposed=False) -> list[Result]:
    """The last expert's weight begins at 2³¹; only its first columns are read."""
    experts, depth, columns = 65, 32, 1 << 20
    shape = (columns, depth) if transposed else (depth, columns)
    assert (experts - 1) * depth * columns == LIMIT
    w, x = _empty(experts, *shape, device=device), _normal(TAIL, depth, seed=1)
    part = _normal(depth, 64, seed=2) / 8
    if transposed:
        w[-1, :64] = part.mT.to(device)
    else:
        w[-1, :, :64] = part.to(device)
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=device)
    offsets[-1] = TAIL
    window(kernels.grouped_gemm, "_grouped_gemm_kernel", 0, 1)
    y = kernels.grouped_gemm.multiply_rows(x.to(device), w, offsets, transposed=transposed)
    return [Result("y", y[:, :64], x.double() @ part.double())]


def experts_of_a_product_transposed(kernels, device, window) -> list[Result]:
    return experts_of_a_product(kernels, device, window, transposed=True)


def rows_of_a_weight_gradient(kernels, device, window, gather="") -> list[Result]:
    depth, columns = 1024, 1024
    n = _rows(1024)
    x, dy = _normal(TAIL, depth, seed=1), _normal(TAIL, columns, seed=2)
    permutation = _identity(n, device) if gather else None
    window(kernels.grouped_gemm, "_weight_grad_kernel", 0, 1)
    dw, _ = kernels.grouped_gemm.weight_grad(
        *(_ending_with(rows, n, device) for rows in (x, dy)), n, _last_rows(n, device), permutation, 1, gather
    )
    return [Result("dw", dw[0, :64, :64], (x.double().mT @ dy.double())[:64, :64])]


def gathered_rows_of_a_weight_gradient(kernels, device, window) -> list[Result]:
    return rows_of_a_weight_gradient(kernels, device, window, gather="x")


def rows_of_a_weight_gradient_gathered_from_dy(kernels, device, window) -> list[Result]:
    return rows_of_a_weight_gradient(kernels, device, window, gather="dy")


def experts_of_a_weight_gradient(kernels, device, window) -> list[Result]:
    experts, depth, columns = 65, 32, 1 << 20
    x, dy = _normal(TAIL, depth, seed=1), _normal(TAIL, columns, seed=2)
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=device)
    offsets[-1] = TAIL
    window(kernels.grouped_gemm, "_weight_grad_kernel", -1, 1)
    dw, _ = kernels.grouped_gemm.weight_grad(x.to(device), dy.to(device), TAIL, offsets)
    return [Result("dw", dw[-1, :, -64:], x.double().mT @ dy[:, -64:].double())]


def rows_of_column_sums(kernels, device, window, gather=False) -> list[Result]:
    n, columns = _rows(1024), 1024
    dy = _normal(TAIL, columns, seed=1)
    permutation = _identity(n, device) if gather else None
    window(kernels.row_sums, "_row_sums_kernel", 0, 1)
    partials = kernels.row_sums.sum_rows(_ending_with(dy, n, device), n, _last_rows(n, device), permutation)
    return [Result("partials", partials[0, :128], dy.double().sum(0)[:128])]


def gathered_rows_of_column_sums(kernels, device, window) -> list[Result]:
    return rows_of_column_sums(kernels, device, window, gather=True)


def rows_of_the_up_projection(kernels, device, window) -> list[Result]:
    """h and a from 2³¹ on (h, twice as wide, from 2³²)."""
    d, f = 32, 512
    n = _rows(f)
    x, w_up = _normal(TAIL, d, seed=1), _normal(1, d, 2 * f, seed=2) / 6
    window(kernels.fused_gemm, "_up_fwd_kernel", 0, 1)
    h, a = kernels.fused_gemm.up_forward(
        _ending_with(x, n, device), w_up.to(device), None, _identity(n, device), _last_rows(n, device),
        1, OAI, True, True, False,
    )  # fmt: skip
    exact = x.double() @ w_up[0].double()
    exact_a = reference.gated_activation(h[-TAIL:, :64].double().cpu(), OAI)
    return [Result("h", h[-TAIL:, :64], exact[:, :64]), Result("a", a[-TAIL:, :32], exact_a)]


def tokens_of_the_up_projection(kernels, device, window) -> list[Result]:
    d, f = 1024, 32
    tokens = _rows(d)
    x, w_up = _normal(TAIL, d, seed=1), _normal(1, d, 2 * f, seed=2) / 32
    window(kernels.fused_gemm, "_up_fwd_kernel", 0, 1)
    h, _ = kernels.fused_gemm.up_forward(
        _ending_with(x, tokens, device), w_up.to(device), None, _identity(tokens, device), _last_rows(tokens, device),
        1, OAI, True, False, False,
    )  # fmt: skip
    return [Result("h", h[-TAIL:], x.double() @ w_up[0].double())]


def _down_backward(kernels, device, window, d, f, n) -> list[Result]:
    grad_out, w_down = _normal(TAIL, d, seed=1), _normal(1, f, d, seed=2) / math.sqrt(f)
    h, weights = _normal(TAIL, 2 * f, seed=3), _normal(TAIL, 1, seed=4, dtype=torch.float32)
    window(kernels.fused_gemm, "_down_bwd_kernel", 0, 1)
    scaled_a, grad_h, *_ = kernels.fused_gemm.down_backward(
        _ending_with(grad_out, n, device), w_down.to(device), _ending_with(h, n, device),
        _ending_with(weights, n, device), _identity(n, device), _last_rows(n, device), OAI, False, 0, False,
    )  # fmt: skip
    leaf = h.double().requires_grad_()
    a = weights.double() * reference.gated_activation(leaf, OAI)
    (exact,) = torch.autograd.grad(a, leaf, grad_out.double() @ w_down[0].double().mT)
    columns = min(f, 64)
    return [
        Result("scaled_a", scaled_a[-TAIL:, :columns], a.detach()[:, :columns]),
        Result("grad_h", grad_h[-TAIL:, : 2 * columns], exact[:, : 2 * columns]),
    ]


def rows_of_the_down_projection_backward(kernels, device, window) -> list[Result]:
    return _down_backward(kernels, device, window, 32, 512, _rows(512))


def tokens_of_the_down_projection_backward(kernels, device, window) -> list[Result]:
    return _down_backward(kernels, device, window, 1024, 32, _rows(1024))


def tokens_and_rows_of_permute(kernels, device, window) -> list[Result]:
    n, d = _rows(512), 512
    x, grad_rows = _normal(TAIL, d, seed=1), _normal(TAIL, d, seed=2)
    inverse = _identity(n, device)
    window(kernels.permutation, "_permute_kernel", -1, 1)
    window(kernels.permutation, "_combine_fwd_kernel", -1, 1)
    leaf = _ending_with(x, n, device).requires_grad_()
    rows = kernels.permutation.permute(leaf, inverse, inverse)
    (grad,) = torch.autograd.grad(rows, leaf, _ending_with(grad_rows, n, device))
    return [Result("rows", rows.detach()[-TAIL:], x.double()), Result("grad_x", grad[-TAIL:], grad_rows.double())]


def rows_and_partial_sums_of_combine(kernels, device, window) -> list[Result]:
    d, parts = 128, 129
    n = _rows(d)
    y, weights = _normal(TAIL, d, seed=1), _normal(TAIL, 1, seed=2, dtype=torch.float32)
    partials = _empty(parts, n, device=device, dtype=torch.float32)
    assert (parts - 1) * n >= LIMIT
    partials[:, -TAIL:] = _normal(parts, TAIL, seed=3, dtype=torch.float32).to(device)
    window(kernels.permutation, "_combine_fwd_kernel", -1, 1)
    out, sums = kernels.permutation.combine_rows(
        _ending_with(y, n, device), _ending_with(weights, n, device), _identity(n, device), 1, partials
    )
    exact = partials[:, -TAIL:].double().sum(0)[:, None]
    return [
        Result("out", out[-TAIL:], weights.double() * y.double()),
        Result("sums", sums[-TAIL:], exact.cpu()),
    ]


def tokens_and_rows_of_combine_backward(kernels, device, window) -> list[Result]:
    n, d = _rows(512), 512
    y, grad_out = _normal(TAIL, d, seed=1), _normal(TAIL, d, seed=2)
    weights = _normal(TAIL, 1, seed=3, dtype=torch.float32)
    window(kernels.permutation, "_combine_fwd_kernel", -1, 1)
    window(kernels.permutation, "_combine_bwd_kernel", -1, 1)
    leaves = [_ending_with(tensor, n, device).requires_grad_() for tensor in (y, weights)]
    out = kernels.permutation.combine(*leaves, _identity(n, device))
    grad_y, grad_weights = torch.autograd.grad(out, leaves, _ending_with(grad_out, n, device))
    exact = (grad_out.double() * y.double()).sum(1, keepdim=True)
    return [
        Result("grad_y", grad_y[-TAIL:], weights.double() * grad_out.double()),
        Result("grad_weights", grad_weights[-TAIL:], exact),
    ]


def rows_of_the_activation(kernels, device, window) -> list[Result]:
    """The pairs of h from 2³¹ on."""
    f = 512
    n = _rows(f)
    h, grad_a = _normal(TAIL, 2 * f, seed=1), _normal(TAIL, f, seed=2)
    window(kernels.swiglu, "_gated_fwd_kernel", -1, 1)
    window(kernels.swiglu, "_gated_bwd_kernel", -1, 1)
    leaf = _ending_with(h, n, device).requires_grad_()
    a = kernels.swiglu.gated(leaf, *OAI)
    (grad,) = torch.autograd.grad(a, leaf, _ending_with(grad_a, n, device))
    wide = h.double().requires_grad_()
    exact = reference.gated_activation(wide, OAI)
    (exact_grad,) = torch.autograd.grad(exact, wide, grad_a.double())
    return [Result("a", a.detach()[-TAIL:], exact.detach()), Result("grad_h", grad[-TAIL:], exact_grad)]


CASES = [
    rows_of_a_product,
    rows_of_a_product_transposed,
    gathered_rows_of_a_product,
    experts_of_a_product,
    experts_of_a_product_transposed,
    rows_of_a_weight_gradient,
    gathered_rows_of_a_weight_gradient,
    rows_of_a_weight_gradient_gathered_from_dy,
    experts_of_a_weight_gradient,
    rows_of_column_sums,
    gathered_rows_of_column_sums,
    rows_of_the_up_projection,
    tokens_of_the_up_projection,
    rows_of_the_down_projection_backward,
    tokens_of_the_down_projection_backward,
    tokens_and_rows_of_permute,
    rows_and_partial_sums_of_combine,
    tokens_and_rows_of_combine_backward,
    rows_of_the_activation,
]


class Window:
    """A kernel of whose grid only some programs run, along its first axis."""

    def __init__(self, kernel, first: int, count: int) -> None:
        self._kernel, self._first, self._count = kernel, first, count

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        first = self._first % grid[0]

        def launch(*args, **kwargs):
            index, size = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim
            interpreter_builder.set_grid_dim = lambda *_: size(*grid, *(1,) * (3 - len(grid)))
            interpreter_builder.set_grid_idx = lambda x, y, z: index(first + x, y, z)
            try:
                self._kernel[(self._count, *grid[1:])](*args, **kwargs)
            finally:
                del interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx

        return launch


@pytest.fixture
def window(monkeypatch):
    def limit(module, name: str, first: int, count: int) -> None:
        if INTERPRETED:
            monkeypatch.setattr(module, name, Window(getattr(module, name), first, count))

    return limit


@pytest.fixture(scope="module")
def int32_kernels(tmp_path_factory):
    """The same kernels with int32 for int64 throughout."""
    folder = tmp_path_factory.mktemp("copies")
    package = "int32_kernels"
    (folder / package).mkdir()
    changed = 0
    for path in Path(moe_engine.kernels.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        changed += text.count("tl.int64")
        text = text.replace("tl.int64", "tl.int32").replace("moe_engine.kernels", package)
        (folder / package / path.name).write_text(text.replace("moe_engine::", f"{package}::"), encoding="utf-8")
    assert changed > 20
    sys.path.insert(0, str(folder))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"{package}.{name}") for name in MODULES})
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def kernels():
    return SimpleNamespace(**{name: importlib.import_module(f"moe_engine.kernels.{name}") for name in MODULES})


def _run(case: Callable, *arguments) -> list[Result]:
    try:
        return case(*arguments)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            pytest.skip(f"needs up to 22 GB, of address space on a CPU, of memory on a GPU: {error}")
        raise


def _hold(results: list[Result]) -> None:
    for name, actual, exact in results:
        assert_close(actual.cpu(), exact, roundings=4, name=name)  # sums of fp16 products in fp32, rounded once


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_values_beyond_2_31_elements(device, kernels, window, case):
    process = psutil.Process()
    before = process.memory_info().rss
    results = _run(case, kernels, device, window)
    if device == "cpu":
        assert process.memory_info().rss - before < TOUCHED
    _hold(results)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU an access outside of every tensor is the end of the process")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_32_bits_would_be_noticed(device, int32_kernels, window, case):
    with pytest.raises(AssertionError):
        _hold(_run(case, int32_kernels, device, window))
