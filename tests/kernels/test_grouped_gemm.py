"""The grouped GEMM and its gradients against fp64, and what keeps one expert's numbers from another's."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_engine import simulator, torch_backend
from moe_engine.kernels import launch
from moe_engine.kernels.grouped_gemm import grouped_gemm, multiply_rows, weight_grad
from moe_engine.kernels.launch import INTERPRETED
from moe_engine.kernels.row_sums import sum_rows
from moe_engine.testing import assert_budget_bites, assert_close, normal, routing_logits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("y", "dx", "dw", "dbias")


class Routing(NamedTuple):
    expert_offsets: Tensor
    permutation: Tensor | None = None
    inverse: Tensor | None = None


class Inputs(NamedTuple):
    x: Tensor
    w: Tensor
    bias: Tensor | None
    dy: Tensor

    def map(self, change) -> Inputs:
        return Inputs(*(None if tensor is None else change(tensor) for tensor in self))


def _offsets(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def _routed(kind: str, tokens: int, experts: int, top_k: int) -> Routing:
    """Made without our kernels."""
    idx = routing_logits(kind, tokens, experts).topk(top_k).indices.to(torch.int32)
    counts = torch.bincount(idx.flatten(), minlength=experts).to(torch.int32)
    expert_offsets, permutation = torch_backend.sort_by_expert(idx, counts)
    return Routing(expert_offsets, permutation, torch.argsort(permutation).to(torch.int32))


def _inputs(tokens: int, rows: int, experts: int, depth: int, columns: int, dtype, bias: bool = True) -> Inputs:
    """Of the size that a layer sees: outputs near 1."""
    return Inputs(
        normal(tokens, depth, seed=1),
        normal(experts, depth, columns, seed=2) / math.sqrt(depth),
        normal(experts, columns, seed=3) if bias else None,
        normal(rows, columns, seed=4),
    ).map(lambda tensor: tensor.to(dtype))


def twin(x: Tensor, w: Tensor, expert_offsets: Tensor, bias: Tensor | None, permutation: Tensor | None) -> Tensor:
    """Expert after expert in plain PyTorch, in any dtype."""
    rows = x if permutation is None else x[permutation // (permutation.numel() // len(x))]
    parts = [rows[begin:end] @ w[e] for e, (begin, end) in enumerate(pairwise(expert_offsets.tolist()))]
    if bias is not None:
        parts = [part + b for part, b in zip(parts, bias, strict=True)]
    return torch.cat(parts)


def _with_gradients(function, inputs: Inputs, *rest: Tensor | None) -> tuple[Tensor, ...]:
    """y, dx, dw and, with a bias, dbias."""
    x, w, bias = (None if tensor is None else tensor.clone().requires_grad_() for tensor in inputs[:3])
    y = function(x, w, rest[0], bias, *rest[1:])
    leaves = [leaf for leaf in (x, w, bias) if leaf is not None]
    return y.detach(), *torch.autograd.grad(y, leaves, inputs.dy)


def _op(inputs: Inputs, routing: Routing, device: str) -> tuple[Tensor, ...]:
    moved = [None if tensor is None else tensor.to(device) for tensor in routing]
    return tuple(t.cpu() for t in _with_gradients(grouped_gemm, inputs.map(lambda t: t.to(device)), *moved))


def _twin(inputs: Inputs, routing: Routing) -> tuple[Tensor, ...]:
    return _with_gradients(twin, inputs, *routing[:2])


def _check(inputs: Inputs, routing: Routing, device: str, bites: bool = True) -> None:
    """Every output within its budget, and no budget that would let a fault pass."""
    exact = _twin(inputs.map(Tensor.double), routing)
    same, actual = _twin(inputs, routing), _op(inputs, routing, device)
    # fp32 alone: of few elements the reference's are right by luck, and ours are summed in another order.
    roundings = 4 if inputs.x.dtype == torch.float32 else 0.5
    for name, a, e, s in zip(NAMES, actual, exact, same, strict=False):
        assert a.dtype == inputs.x.dtype
        assert_close(a, e, s, roundings=roundings, name=name)
        if bites and e.any() and e.numel() > e.shape[-1]:
            assert_budget_bites(e, s)
    empty = routing.expert_offsets.diff() == 0
    assert all(not gradient[empty].any() for gradient in actual[2:])


class Case(NamedTuple):
    why: str
    counts: tuple[int, ...]  # rows of each expert
    depth: int
    columns: int

    def __str__(self) -> str:
        return self.why


# Interpreter tiles: 32 rows, 64 columns, steps of 32; of a weight gradient 64 × 64, steps of 32 rows. See launch.py.
CASES = [
    Case("ordinary", (40, 20, 36), 64, 64),
    Case("an expert without rows", (30, 0, 40), 64, 64),
    Case("only the middle expert has rows", (0, 0, 70, 0), 64, 64),
    Case("only the last expert has rows", (0, 33), 64, 64),
    Case("no rows", (0, 0, 0), 40, 24),
    Case("one row", (0, 1), 64, 64),
    Case("depth and columns no multiple of 8", (40, 25), 45, 83),
    Case("depth alone ragged", (40, 25), 40, 64),
    Case("columns alone ragged", (40, 25), 64, 72),
    Case("below every tile", (9, 4), 7, 5),
    Case("one column", (9, 4), 33, 1),
    Case("depth of one", (9, 4), 1, 33),
    Case("rows a tile exactly", (32, 64, 32), 32, 64),
    Case("rows one past a tile", (33, 65, 1), 32, 64),
    Case("rows one short of a tile", (31, 63), 32, 64),
    Case("an expert with more rows than a tile of column sums", (5, launch.PARTIAL_M + 33), 16, 24),
    Case("one expert", (50,), 64, 64),
    Case("experts no power of two", (7, 9, 0, 11, 1), 32, 32),
    Case("many experts, few rows", (0,) * 20 + (2, 0, 1) + (0,) * 36 + (2,), 8, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(device, case, dtype):
    rows = sum(case.counts)
    _check(
        _inputs(rows, rows, len(case.counts), case.depth, case.columns, dtype), Routing(_offsets(*case.counts)), device
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind, top_k, depth, columns",
    [
        ("balanced", 1, 64, 64),
        ("skewed", 2, 64, 64),
        ("empty_expert", 2, 45, 67),  # with ragged tails, whose loads go by the permutation too
        ("one_expert", 4, 32, 40),
    ],
)
def test_gather_matches_fp64(device, kind, top_k, depth, columns, dtype):
    routing = _routed(kind, 36, 5, top_k)
    _check(_inputs(36, 36 * top_k, 5, depth, columns, dtype), routing, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", [Routing(_offsets(30, 0, 20)), _routed("skewed", 25, 3, 2)], ids=["rows", "gather"])
def test_without_bias(device, routing, dtype):
    tokens = 50 if routing.permutation is None else 25
    inputs = _inputs(tokens, 50, 3, 40, 48, dtype, bias=False)
    assert len(_op(inputs, routing, device)) == 3
    _check(inputs, routing, device)


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_tokens_to_gather(device, top_k):
    nothing = torch.zeros(0, dtype=torch.int32)
    y, dx, dw, dbias = _op(_inputs(0, 0, 3, 8, 12, torch.float32), Routing(_offsets(0, 0, 0), nothing, nothing), device)
    assert y.shape == (0, 12) and dx.shape == (0, 8)
    assert dw.shape == (3, 8, 12) and not dw.any() and dbias.shape == (3, 12) and not dbias.any()


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_shape(device, data):
    experts = data.draw(st.integers(1, 6), label="experts")
    top_k = data.draw(st.integers(1, min(experts, 4)), label="top_k")
    tokens = data.draw(st.integers(1, 25), label="tokens")
    depth, columns = (data.draw(st.integers(1, 70), label=label) for label in ("depth", "columns"))
    kind = data.draw(st.sampled_from(["balanced", "skewed", "one_expert", "empty_expert"]), label="kind")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    bias = data.draw(st.booleans(), label="bias")
    if data.draw(st.booleans(), label="gather"):
        routing, rows = _routed(kind, tokens, experts, top_k), tokens * top_k
    else:
        counts = data.draw(st.lists(st.integers(0, 40), min_size=experts, max_size=experts), label="counts")
        routing, tokens = Routing(_offsets(*counts)), sum(counts)
        rows = tokens
    _check(_inputs(tokens, rows, experts, depth, columns, dtype, bias), routing, device, bites=False)


def test_the_twin_is_its_own_gradient():
    inputs, routing = _inputs(6, 12, 3, 4, 5, torch.float64), _routed("empty_expert", 6, 3, 2)
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
    assert torch.autograd.gradcheck(lambda x, w, bias: twin(x, w, routing[0], bias, routing[1]), leaves)


# What must not reach other experts


@pytest.mark.parametrize("where, descriptor", [("w", False), ("w", True), ("bias", False), ("x", False), ("dy", False)])
@pytest.mark.parametrize("gather", [False, True], ids=["rows", "gather"])
def test_nan_and_inf_stay_with_their_expert_and_row(device, tiles, gather, where, descriptor):
    tiles(descriptor=descriptor)
    routing = _routed("empty_expert", 24, 4, 2) if gather else Routing(_offsets(33, 9, 0, 6))
    # Depth and columns end in the middle of a tile; in memory another expert's numbers follow.
    inputs = _inputs(24 if gather else 48, 48, 4, 40, 72, torch.float16)
    bad = inputs.map(Tensor.clone)
    # An expert between two others; its first row, which follows another's, and its last, read in place of those beyond.
    indices = torch.tensor([1])
    if where in ("x", "dy"):
        indices = routing.expert_offsets[1:3] - torch.tensor([0, 1])
        indices = routing.permutation[indices] // 2 if gather and where == "x" else indices
    for index in indices.tolist():
        getattr(bad, where)[index].view(-1)[::2], getattr(bad, where)[index].view(-1)[1::2] = math.nan, math.inf
    exact = _twin(bad.map(Tensor.double), routing)
    assert not all(e.isfinite().all() for e in exact)
    for name, a, c, e in zip(NAMES, _op(bad, routing, device), _op(inputs, routing, device), exact, strict=True):
        assert torch.equal(a.isfinite(), e.isfinite()), name
        assert torch.equal(a[e.isfinite()], c[e.isfinite()]), name


@pytest.mark.skipif(not INTERPRETED, reason="looks at the interpreter's stores")
def test_every_element_is_written_once(device):
    """Twice, and it would hold whatever the program wrote that a GPU happens to run last."""
    stores: dict[int, list[np.ndarray]] = {}
    with simulator.observe(lambda a: a.is_store and stores.setdefault(a.launch.number, []).append(a.addresses)):
        _op(_inputs(48, 48, 4, 40, 72, torch.float16), Routing(_offsets(33, 9, 0, 6)), device)
        _op(_inputs(24, 48, 4, 40, 72, torch.float16), _routed("empty_expert", 24, 4, 2), device)
    assert len(stores) == 4 + 5  # y, dx, partial sums, dw; with a gather, combine
    for number, addresses in stores.items():
        _, times = np.unique(np.concatenate(addresses), return_counts=True)
        assert times.max() == 1, number


# Both ways to load a weight


@pytest.fixture
def tiles(monkeypatch):
    """Change what every tile says; returns what `weight_descriptor` gave, launch by launch."""
    default, make = launch.default_tile, launch.weight_descriptor

    def change(**fields):
        made = []

        def weight_descriptor(w, tile, transposed):
            made.append(make(w, tile, transposed))
            return made[-1]

        monkeypatch.setattr(launch, "default_tile", lambda *what: default(*what)._replace(**fields))
        monkeypatch.setattr(launch, "weight_descriptor", weight_descriptor)
        return made

    return change


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "depth, columns, possible",
    [
        (64, 64, True),
        (45, 72, True),  # the last tile sticks out both ways
        (7, 8, True),  # within a tile
        (40, 67, False),  # rows of the weight are no multiple of 16 bytes apart
    ],
)
def test_descriptor_gives_the_bits_that_pointers_give(device, tiles, depth, columns, possible, dtype):
    inputs, routing = _inputs(40, 80, 3, depth, columns, dtype), _routed("skewed", 40, 3, 2)
    made = tiles(descriptor=False)
    by_pointers = _op(inputs, routing, device)
    assert made == [None, None]  # y, and dx with the weight transposed
    made = tiles(descriptor=True)
    by_descriptor = _op(inputs, routing, device)
    assert [descriptor is not None for descriptor in made] == [possible] * 2
    for one, two in zip(by_pointers, by_descriptor, strict=True):
        assert torch.equal(one, two)


def test_tile_order_leaves_the_bits_alone(device, tiles):
    inputs, routing = _inputs(73, 73, 3, 24, 130, torch.bfloat16), Routing(_offsets(33, 0, 40))
    first = _op(inputs, routing, device)
    for group_m in (1, 100):  # 100: more than there are row tiles
        tiles(GROUP_M=group_m)
        for one, two in zip(first, _op(inputs, routing, device), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_agree_bit_for_bit(device, dtype):
    inputs, routing = _inputs(40, 80, 3, 45, 72, dtype), _routed("skewed", 40, 3, 2)
    for one, two in zip(_op(inputs, routing, device), _op(inputs, routing, device), strict=True):
        assert torch.equal(one, two)


# Offsets that are wrong


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the host does not read the offsets")
@pytest.mark.parametrize(
    "values",
    [
        [1, 5, 20],  # does not start at 0
        [0, 5, 19],  # does not end at N
        [0, 5, 21],
        [0, 21, 20],  # does not rise
        [0, -1, 20],
        [0, 0, 0],
    ],
)
def test_offsets_that_are_none(values):
    inputs = _inputs(20, 20, 2, 8, 8, torch.float32)
    with pytest.raises(ValueError, match=r"expert_offsets: expected values that rise from 0 to N = 20, got \["):
        grouped_gemm(inputs.x, inputs.w, torch.tensor(values, dtype=torch.int32))


@pytest.mark.parametrize(
    "values",
    [
        [0, 300, 0, 300, 0, 300, 0, 300],  # as many tiles as there may be, several times over
        [5, -7, 309, 2**31 - 1, -(2**31), 3, 300, 0],
        [7] * 8,
    ],
)
def test_no_offsets_reach_beyond_a_tensor(device, values):
    """What a GPU does with offsets that nobody checked: the bands and range checks of conftest.py are the judge."""
    offsets = torch.tensor(values, dtype=torch.int32, device=device)
    x, w, bias, dy = (tensor.to(device) for tensor in _inputs(300, 300, 7, 24, 72, torch.float32))
    assert multiply_rows(x, w, offsets, bias).shape == (300, 72)
    assert multiply_rows(dy, w, offsets, transposed=True).shape == (300, 24)
    partials = sum_rows(dy, 300, offsets)
    dw, _ = weight_grad(x, dy, 300, offsets, partials=partials)
    assert dw.isfinite().all()


# As an op of PyTorch


@pytest.mark.parametrize("gather, bias", [(False, False), (True, True)], ids=["plain", "gather and bias"])
def test_custom_ops_are_well_formed(device, gather, bias):
    routing = _routed("skewed", 6, 3, 2) if gather else Routing(_offsets(5, 0, 7))
    inputs = _inputs(6 if gather else 12, 12, 3, 8, 16, torch.bfloat16, bias).map(lambda tensor: tensor.to(device))
    offsets, *permutations = (None if tensor is None else tensor.to(device) for tensor in routing)
    x, w, b, dy = inputs
    torch.library.opcheck(
        torch.ops.moe_engine.grouped_gemm_backward.default, (dy, x, w, offsets, *permutations, bias, False)
    )
    x, w, b = (None if tensor is None else tensor.requires_grad_() for tensor in (x, w, b))
    torch.library.opcheck(torch.ops.moe_engine.grouped_gemm.default, (x, w, offsets, b, *permutations, False))


@pytest.mark.parametrize("gather", [False, True], ids=["rows", "gather"])
def test_compiles_without_a_graph_break(device, gather):
    routing = _routed("skewed", 10, 3, 2) if gather else Routing(_offsets(9, 0, 11))
    inputs = _inputs(10 if gather else 20, 20, 3, 8, 16, torch.bfloat16).map(lambda tensor: tensor.to(device))
    routing = [None if tensor is None else tensor.to(device) for tensor in routing]
    compiled = torch.compile(lambda *arguments: 2 * grouped_gemm(*arguments), fullgraph=True, backend="aot_eager")
    actual = _with_gradients(compiled, inputs, *routing)
    y, *gradients = _with_gradients(grouped_gemm, inputs._replace(dy=2 * inputs.dy), *routing)
    for one, two in zip(actual, (2 * y, *gradients), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("gather", [False, True], ids=["rows", "gather"])
def test_compiles_once_for_all_token_counts(device, gather):
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(grouped_gemm, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (6, 9, 12):
        routing = _routed("skewed", tokens, 3, 2)
        x, w, bias, _ = _inputs(tokens if gather else 2 * tokens, 0, 3, 8, 16, torch.float32)
        arguments = (x, w, routing.expert_offsets, bias, *(routing[1:] if gather else ()))
        compiled(*(argument.to(device) for argument in arguments))
    assert counter.frame_count == 1


def test_fake_tensors_flow_both_ways():
    with FakeTensorMode():
        x = torch.empty(10, 8, dtype=torch.bfloat16, requires_grad=True)
        w = torch.empty(3, 8, 16, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.empty(3, 16, dtype=torch.bfloat16, requires_grad=True)
        offsets, permutation, inverse = (torch.empty(n, dtype=torch.int32) for n in (4, 20, 20))
        y = grouped_gemm(x, w, offsets, bias, permutation, inverse)
        assert y.shape == (20, 16) and y.dtype == torch.bfloat16
        y.sum().backward()
        for leaf in (x, w, bias):
            assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype
        with pytest.raises(ValueError, match="w: expected shape"):
            grouped_gemm(x, w.mT.contiguous(), offsets)


def test_expanded_gradient(device):
    inputs, routing = _inputs(20, 20, 2, 8, 16, torch.float32), Routing(_offsets(9, 11))
    expected = _op(inputs._replace(dy=torch.ones(20, 16)), routing, device)
    x, w = (tensor.to(device).requires_grad_() for tensor in inputs[:2])
    grouped_gemm(x, w, routing.expert_offsets.to(device), inputs.bias.to(device)).sum().backward()  # strides of 0
    assert torch.equal(x.grad.cpu(), expected[1]) and torch.equal(w.grad.cpu(), expected[2])


@pytest.mark.skipif(not INTERPRETED, reason="would measure, and keep what it found")
def test_autotune_is_nothing_to_the_interpreter():
    inputs, offsets = _inputs(20, 20, 2, 8, 16, torch.float32), _offsets(9, 11)
    x = inputs.x.requires_grad_()
    y = grouped_gemm(x, inputs.w, offsets, autotune=True)
    assert torch.equal(y, grouped_gemm(x, inputs.w, offsets))
    y.sum().backward()


X, W, BIAS = torch.zeros(6, 8), torch.zeros(3, 8, 16), torch.zeros(3, 16)
OFFSETS, ROWS = torch.tensor([0, 1, 4, 12], dtype=torch.int32), torch.arange(12, dtype=torch.int32)
GATHER = {"permutation": ROWS, "inverse_permutation": ROWS}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": X[0]}, r"x: expected shape \(N, DEPTH\), got \(8,\)"),
        ({"x": X.double()}, "x: expected float32 or float16 or bfloat16, got torch.float64"),
        ({"x": X.T.contiguous().T}, "x: expected a contiguous tensor"),
        ({"w": W[0]}, r"w: expected shape \(E, 8, COLUMNS\), got \(8, 16\)"),
        ({"w": W[:, :7].contiguous()}, r"w: expected shape \(E, 8, COLUMNS\), got \(3, 7, 16\)"),
        ({"w": W.half()}, r"w: expected float32, got torch.float16"),
        ({"w": W.mT.contiguous().mT}, "w: expected a contiguous tensor"),
        ({"w": W.to("meta")}, "w: expected a tensor on cpu, got meta"),
        ({"w": W[:0]}, r"w: expected experts, depth and columns, got \(0, 8, 16\)"),
        ({"w": W[..., :0].contiguous()}, r"w: expected experts, depth and columns, got \(3, 8, 0\)"),
        ({"x": X[:, :0].contiguous(), "w": W[:, :0].contiguous()}, r"w: expected experts, depth and columns"),
        ({"expert_offsets": OFFSETS[:3]}, r"expert_offsets: expected shape \(4,\), got \(3,\)"),
        ({"expert_offsets": OFFSETS.long()}, r"expert_offsets: expected int32, got torch.int64"),
        ({"bias": BIAS[:2]}, r"bias: expected shape \(3, 16\), got \(2, 16\)"),
        ({"bias": BIAS.half()}, r"bias: expected float32, got torch.float16"),
        ({"permutation": ROWS}, "inverse_permutation: expected one with a permutation, None without, got NoneType"),
        ({"inverse_permutation": ROWS}, "inverse_permutation: expected one with a permutation, None .*, got Tensor"),
        (GATHER | {"x": X[0]}, r"x: expected shape \(T, DEPTH\), got \(8,\)"),
        (GATHER | {"permutation": ROWS.long()}, "permutation: expected int32, got torch.int64"),
        (GATHER | {"permutation": ROWS[:11]}, "permutation: expected a multiple of T = 6 rows, got 11"),
        (GATHER | {"permutation": ROWS[:0]}, "permutation: expected a multiple of T = 6 rows, got 0"),
        (GATHER | {"x": X[:0]}, "permutation: expected a multiple of T = 0 rows, got 12"),
        (GATHER | {"inverse_permutation": ROWS[:6]}, r"inverse_permutation: expected shape \(12,\), got \(6,\)"),
        (GATHER | {"inverse_permutation": ROWS.long()}, "inverse_permutation: expected int32, got torch.int64"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        grouped_gemm(**({"x": X, "w": W, "expert_offsets": OFFSETS} | arguments))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's tensors are on the CPU")
def test_cpu_tensors_on_a_gpu():
    with pytest.raises(ValueError, match="x: expected a cuda tensor"):
        grouped_gemm(X, W, OFFSETS)
