"""The gated activation against fp64, and the pairs that the fused kernels read and write."""

import math

import pytest
import torch
import triton
import triton.language as tl

from moe_engine import reference
from moe_engine.config import ACTIVATIONS, Activation
from moe_engine.kernels.swiglu import gated, gated_activation, gated_activation_backward, load_pair, store_pair
from moe_engine.testing import assert_budget_bites, assert_close, normal

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SWIGLU, OAI = ACTIVATIONS["swiglu"], ACTIVATIONS["swiglu_oai"]


def _inputs(rows, width, dtype, device):
    """h `(N, 2F)` of trained size, some values beyond the limit and some exactly on it, and grad_a `(N, F)`."""
    h = 3 * normal(rows, 2 * width, seed=1)
    flat = h.view(-1)
    flat[::11], flat[5::17], flat[3::13] = 7.0, -7.0, -9.0
    return h.to(dtype).to(device), normal(rows, width, seed=2).to(dtype).to(device)


def _twin(h, grad_a, activation):
    """a and grad_h by autograd of the reference, in h's dtype."""
    h = h.clone().requires_grad_()
    a = reference.gated_activation(h, activation)
    return a.detach(), *torch.autograd.grad(a, h, grad_a)


def _op(h, grad_a, activation):
    h = h.clone().requires_grad_()
    a = gated(h, *activation)
    return a.detach(), *torch.autograd.grad(a, h, grad_a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [SWIGLU, OAI], ids=["swiglu", "swiglu_oai"])
@pytest.mark.parametrize(
    "rows, width",
    [
        (1, 1),  # the least
        (5, 3),  # rows of 12 bytes: no row but the first is aligned to 16
        (8, 128),  # one block exactly
        (33, 130),  # one row and two columns past the last full block
        (17, 96),  # columns of less than a block
    ],
)
def test_forward_and_backward_match_fp64(device, dtype, activation, rows, width):
    h, grad_a = _inputs(rows, width, dtype, device)
    exact = _twin(h.double(), grad_a.double(), activation)
    same = _twin(h, grad_a, activation)
    for name, actual, e, s in zip(("a", "grad_h"), _op(h, grad_a, activation), exact, same, strict=True):
        assert actual.dtype == dtype
        # fp32: a handful of roundings, the sigmoid's among them; 16-bit: the last one alone.
        assert_close(actual, e, s, roundings=4 if dtype == torch.float32 else 0, name=name)
        if rows * width > 64:
            assert_budget_bites(e, s)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_passes_at_the_bounds_and_not_beyond(device, dtype):
    step = torch.finfo(dtype).eps * 8  # to the next number after 7 in this dtype, or further
    values = torch.tensor([7.0, 7.0 + step, -7.0, -7.0 - step, 1.0], dtype=dtype, device=device)
    ones = torch.ones_like(values)
    grad_a = torch.ones(5, 1, dtype=dtype, device=device)
    _, grad_h = _op(torch.stack([values, ones], dim=1), grad_a, OAI)
    assert (grad_h[:, 0] != 0).tolist() == [True, False, True, True, True]
    _, grad_h = _op(torch.stack([ones, values], dim=1), grad_a, OAI)
    assert (grad_h[:, 1] != 0).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("activation", [SWIGLU, OAI], ids=["swiglu", "swiglu_oai"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_come_out_where_the_reference_has_them(device, dtype, activation):
    special = [math.nan, math.inf, -math.inf, 0.0, 2.0]
    h = torch.tensor([[g, u] for g in special for u in special], dtype=dtype, device=device)
    grad_a = torch.ones(len(h), 1, dtype=dtype, device=device)
    (a, grad_h), (exact_a, exact_grad) = _op(h, grad_a, activation), _twin(h.double(), grad_a.double(), activation)
    assert torch.equal(a.isnan(), exact_a.isnan())
    assert a[h.isnan().any(dim=1)].isnan().all()  # no bound swallows one
    assert torch.equal(grad_h.isfinite(), exact_grad.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [SWIGLU, OAI, Activation(1.702, 0.0, math.inf)])  # the last: α·gate overflows
def test_largest_gates_give_finite_gradients(device, dtype, activation):
    h = torch.tensor([[3e38, 1.0], [-3e38, 1.0], [1e30, -1.0], [-1e30, 1.0], [-90.0, 1.0]], dtype=dtype, device=device)
    grad_a = torch.ones(5, 1, dtype=dtype, device=device)
    exact = _twin(h.double(), grad_a.double(), activation)
    for actual, e in zip(_op(h, grad_a, activation), exact, strict=True):
        assert_close(actual, e, roundings=4 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (0, 0)])
def test_empty(device, shape):
    h = torch.zeros(shape, device=device, requires_grad=True)
    a = gated(h)
    assert a.shape == (shape[0], shape[1] // 2)
    a.sum().backward()
    assert h.grad.shape == shape


def test_expanded_gradient(device):
    h, _ = _inputs(9, 20, torch.float32, device)
    by_sum = h.clone().requires_grad_()
    gated(by_sum).sum().backward()  # hands a gradient with strides of 0 to the backward
    assert torch.equal(by_sum.grad, _op(h, torch.ones(9, 20, device=device), SWIGLU)[1])


@triton.jit
def _copy_pairs_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    pair = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    gate, up = load_pair(x_ptr, pair, pair < N)
    store_pair(out_ptr, pair, gate, up, pair < N)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_are_copied_bit_for_bit(device, dtype):
    bits = torch.arange(1 << 16, dtype=torch.int32)
    x = bits.to(torch.int16).view(dtype) if dtype != torch.float32 else (bits << 16 | 0x1234).view(dtype)
    x = x[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))].to(device)  # any gate beside any up
    pairs = (1 << 15) - 3
    out = torch.empty_like(x)
    _copy_pairs_kernel[(triton.cdiv(pairs, 1024),)](x, out, pairs, BLOCK=1024)
    number = ~x[: 2 * pairs].isnan()
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out[: 2 * pairs].isnan(), ~number)
    assert torch.equal(out.view(integers)[: 2 * pairs][number], x.view(integers)[: 2 * pairs][number])
    assert out[2 * pairs :].isnan().all()  # beyond the mask nothing is written


@triton.jit
def _both_kernel(h_ptr, forward_ptr, backward_ptr, N, BLOCK: tl.constexpr):
    pair = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    gate, up = load_pair(h_ptr, pair, pair < N)
    tl.store(forward_ptr + pair, gated_activation(gate, up, 1.702, 1.0, 7.0), mask=pair < N)
    a, _, _ = gated_activation_backward(gate, up, gate, 1.702, 1.0, 7.0)
    tl.store(backward_ptr + pair, a, mask=pair < N)


def test_backward_recomputes_the_same_bits(device):
    h, _ = _inputs(40, 20, torch.bfloat16, device)
    forward, backward = torch.empty(2, 800, device=device)
    _both_kernel[(4,)](h, forward, backward, 800, BLOCK=256)
    assert torch.equal(forward, backward)


def test_two_runs_agree_bit_for_bit(device):
    h, grad_a = _inputs(33, 130, torch.bfloat16, device)
    for one, two in zip(_op(h, grad_a, OAI), _op(h, grad_a, OAI), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES)
def test_custom_op_is_well_formed(device, dtype):
    h, _ = _inputs(5, 6, dtype, device)
    torch.library.opcheck(torch.ops.moe_engine.gated.default, (h.requires_grad_(), *OAI))


def test_compiles_without_a_graph_break(device):
    h, grad_a = _inputs(9, 20, torch.bfloat16, device)
    compiled = torch.compile(lambda h: 2 * gated(h, *OAI), fullgraph=True, backend="aot_eager")
    leaf = h.clone().requires_grad_()
    a = compiled(leaf)
    a.backward(grad_a)
    expected_a, expected_grad = _op(h, 2 * grad_a, OAI)
    assert torch.equal(a, 2 * expected_a) and torch.equal(leaf.grad, expected_grad)


H = torch.zeros(2, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"h": H[0]}, r"h: expected shape \(N, 2F\), got \(4,\)"),
        ({"h": H[:, :3]}, "h: expected a contiguous tensor"),
        ({"h": H[:, :3].contiguous()}, "h: expected an even number of columns, got 3"),
        ({"h": H.double()}, "h: expected float32 or float16 or bfloat16, got torch.float64"),
        ({"h": H.T.contiguous().T}, "h: expected a contiguous tensor"),
        ({"h": [1.0, 2.0]}, "h: expected a tensor, got list"),
        ({"h": H, "alpha": math.inf}, "alpha: expected a finite number, got inf"),
        ({"h": H, "offset": math.nan}, "offset: expected a finite number, got nan"),
        ({"h": H, "limit": 0.0}, "limit: expected a positive number, got 0.0"),
        ({"h": H, "limit": math.nan}, "limit: expected a positive number, got nan"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        gated(**arguments)


def test_start_in_the_middle_of_a_word(device):
    storage = torch.zeros(9, dtype=torch.bfloat16, device=device)
    assert gated(storage[:8].view(2, 4)).shape == (2, 2)
    with pytest.raises(ValueError, match="h: expected an address divisible by 4, got 2 more"):
        gated(storage[1:].view(2, 4))
