"""Triton's interpreter computes what a GPU computes, once repaired."""

import json
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from moe_engine.kernels.launch import INTERPRETED
from moe_engine.testing import assert_budget_bites, assert_close, normal

interpreted = pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")

# What is wrong without the repair, as programs that print whether it is.
PRELUDE = """
import numpy as np, triton, triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
builder = InterpreterBuilder()
def handle(values, dtype=tl.float32, numpy_dtype=np.float32):
    return TensorHandle(np.array(values, dtype=numpy_dtype), dtype)
def bf16(bits):
    return handle(bits, tl.bfloat16, np.uint16)
ONE, TWO, MINUS_ONE, MINUS_TWO = 0x3F80, 0x4000, 0xBF80, 0xC000
"""
FAULTS = {
    "rounding": "builder.cast_impl(handle([1.00585938]), tl.bfloat16).data[0] != 0x3F81",
    "subnormal cast": "builder.cast_impl(handle([2.0**-127]), tl.bfloat16).data[0] != 0x0040",
    "integer to bf16": "builder.create_si_to_fp(handle([2], tl.int32, np.int32), tl.bfloat16).data[0] != TWO",
    "dot": "builder.create_dot(bf16([[ONE]]), bf16([[TWO]]), handle([[0.0]]), None, 0).data[0, 0] != 2",
    "sum": "builder.create_fadd(bf16([ONE]), bf16([ONE])).data[0] != TWO",
    "negative": "builder.unary_op(bf16([ONE]), np.negative).data[0] != MINUS_ONE",
    "fma": "builder.create_fma(bf16([ONE]), bf16([ONE]), bf16([ONE])).data[0] != TWO",
    "comparison": "bool(builder.create_fcmpOLT(bf16([MINUS_TWO]), bf16([MINUS_ONE])).data[0]) is False",
    "constant": "not hasattr(builder, 'get_bf16')",
}
if triton.__version__.startswith("3.6."):  # mended in a later one
    FAULTS |= {
        "minimum drops NaN": "np.isnan(builder.create_minnumf(handle([np.nan]), handle([1.0])).data[0])",
        "clamp drops NaN": "np.isnan(builder.create_clampf(handle([np.nan]), handle([0.0]), handle([1.0]),"
        " ir.PROPAGATE_NAN.NONE).data[0])",
    }


def _faults(repaired: bool) -> dict[str, bool]:
    lines = [f"found[{name!r}] = bool({expression})" for name, expression in FAULTS.items()]
    repair = ["from moe_engine import simulator", "simulator.repair()", "simulator.repair()"] if repaired else []
    code = "\n".join([*repair, PRELUDE, "found = {}", *lines, "import json", "print(json.dumps(found))"])
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_faults_are_there_without_repair():
    mended = [name for name, faulty in _faults(repaired=False).items() if not faulty]
    assert not mended, (
        f"Triton {triton.__version__} needs no repair of {mended}: take it out of moe_engine/simulator.py"
    )


def test_faults_are_gone_with_repair():
    assert not any(_faults(repaired=True).values())


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < N
    tl.store(out_ptr + offset, tl.load(x_ptr + offset, mask=mask).to(out_ptr.dtype.element_ty), mask=mask)


def _cast(x, dtype):
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _cast_kernel[(triton.cdiv(x.numel(), 1024 if x.is_cuda else 1 << 16),)](
        x, out, x.numel(), BLOCK=1024 if x.is_cuda else 1 << 16
    )
    return out


def _all_fp32(device):
    """Every upper half of an fp32 with lower halves on both sides of the ties: every sign, exponent, Inf and NaN."""
    upper = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (upper | lower).flatten().to(torch.int32).view(torch.float32).to(device)


def _all_16_bit(dtype, device):
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).to(device)


def _assert_same_bits(actual, expected):
    """Bit for bit; a NaN may be any NaN, as its payload differs between processors."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    bits = torch.int32 if actual.element_size() == 4 else torch.int16
    number = ~expected.isnan()
    assert torch.equal(actual.view(bits)[number], expected.view(bits)[number])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_is_rounded_as_in_torch(device, dtype):
    x = _all_fp32(device)
    _assert_same_bits(_cast(x, dtype), x.to(dtype))


@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float16])
def test_16_bit_is_cast_as_in_torch(device, of, to):
    x = _all_16_bit(of, device)
    _assert_same_bits(_cast(x, to), x.to(to))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_integers_are_cast_as_in_torch(device, dtype):
    x = torch.arange(-70000, 70000, 7, dtype=torch.int32, device=device)
    _assert_same_bits(_cast(x, dtype), x.to(dtype))
    back = torch.arange(-1000, 1000, dtype=torch.float32, device=device).to(dtype)
    assert torch.equal(_cast(back, torch.int32), back.to(torch.int32))


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i)
    b = tl.load(b_ptr + i)
    dtype = a.dtype
    half = tl.full((N,), 0.5, dtype)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + N + i, a * b)
    tl.store(out_ptr + 2 * N + i, a - b)
    tl.store(out_ptr + 3 * N + i, tl.where(a < b, half, -a))
    tl.store(out_ptr + 4 * N + i, tl.where((a >= b) & (b != 0), tl.maximum(a, 0.25).to(dtype), tl.abs(b)))
    tl.store(out_ptr + 5 * N + i, (a < b).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_equals_torch(device, dtype):
    a, b = (normal(256, seed=seed).to(dtype).to(device) for seed in (1, 2))
    b[::5] = a[::5]
    b[::7] = 0
    out = torch.empty((6, 256), dtype=dtype, device=device)
    _arithmetic_kernel[(1,)](a, b, out, N=256)
    quarter = torch.tensor(0.25, dtype=dtype, device=device)
    expected = [
        a + b,
        a * b,
        a - b,
        torch.where(a < b, torch.tensor(0.5, dtype=dtype, device=device), -a),
        torch.where((a >= b) & (b != 0), torch.maximum(a, quarter), b.abs()),
        (a < b).to(dtype),
    ]
    for i in range(6):
        _assert_same_bits(out[i], expected[i])


@triton.jit
def _shapes_kernel(x_ptr, out_ptr, words_ptr, M: tl.constexpr, N: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    half = tl.arange(0, N // 2)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    size = M * N
    tl.store(out_ptr + n[:, None] * M + m[None, :], tl.trans(x))
    left, right = tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))
    tl.store(out_ptr + size + m[:, None] * (N // 2) + half[None, :], left)
    tl.store(out_ptr + size + size // 2 + m[:, None] * (N // 2) + half[None, :], right)
    joined = tl.reshape(tl.join(left, right), (M, N))
    tl.store(out_ptr + 2 * size + m[:, None] * N + n[None, :], joined)
    # Two 16-bit values in a word, high one first when read as integers, and back by way of int16.
    word = (left.to(tl.uint16, bitcast=True).to(tl.uint32) << 16) | right.to(tl.uint16, bitcast=True).to(tl.uint32)
    tl.store(words_ptr + m[:, None] * (N // 2) + half[None, :], word.to(tl.int32, bitcast=True))
    back = (word >> 16).to(tl.int16).to(x.dtype, bitcast=True)
    tl.store(out_ptr + 3 * size + m[:, None] * (N // 2) + half[None, :], back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes_and_bits_of_16_bit_values(device, dtype):
    M, N = 32, 64
    x = _all_16_bit(dtype, device)[13 :: (1 << 16) // (M * N)].reshape(M, N).contiguous()  # both signs, NaN, subnormals
    out = torch.empty((4, M * N), dtype=torch.int16, device=device).view(dtype)
    words = torch.empty((M, N // 2), dtype=torch.int32, device=device)
    _shapes_kernel[(1,)](x, out, words, M=M, N=N)
    left, right = x[:, : N // 2], x[:, N // 2 :]
    bits = out.view(torch.int16)
    assert torch.equal(bits[0].view(N, M), x.view(torch.int16).T)
    assert torch.equal(bits[1].view(2, M, N // 2), torch.stack([left, right]).view(torch.int16))
    assert torch.equal(bits[2].view(M, N // 2, 2), torch.stack([left, right], dim=-1).view(torch.int16))
    assert torch.equal(bits[3, : M * N // 2].view(M, N // 2), left.contiguous().view(torch.int16))
    low, high = (part.contiguous().view(torch.int16).long() & 0xFFFF for part in (right, left))
    assert torch.equal(words.long() & 0xFFFFFFFF, high << 16 | low)


@triton.jit
def _integers_kernel(x_ptr, sum_ptr, scan_ptr, M: tl.constexpr, N: tl.constexpr):
    offset = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + offset)
    tl.store(sum_ptr + tl.arange(0, N), tl.sum(x, axis=0))
    tl.store(scan_ptr + offset, tl.cumsum(x, axis=0))


def test_integer_sums_are_exact(device):
    x = torch.arange(-500, 524, dtype=torch.int32, device=device).view(32, 32) * 1_000_003
    total = torch.empty(32, dtype=torch.int32, device=device)
    scan = torch.empty_like(x)
    _integers_kernel[(1,)](x, total, scan, M=32, N=32)
    assert torch.equal(total, x.sum(0, dtype=torch.int32))
    assert torch.equal(scan, x.cumsum(0, dtype=torch.int32))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    out = tl.full((M, N), 1.0, tl.float32)
    out = tl.dot(a, tl.trans(b), out, input_precision="ieee")
    tl.store(out_ptr + m[:, None] * N + n[None, :], out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_is_the_fp32_product_of_the_values(device, dtype):
    a, b = normal(32, 64, seed=1).to(dtype).to(device), normal(16, 64, seed=2).to(dtype).to(device)
    out = torch.empty((32, 16), dtype=torch.float32, device=device)
    _dot_kernel[(1,)](a, b, out, M=32, N=16, K=64)
    exact = a.double() @ b.double().T + 1
    reference = a.float() @ b.float().T + 1
    assert_budget_bites(exact, reference)
    assert_close(out, exact, reference)


@triton.jit
def _drop_nan_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.minimum(x, 7.0))
    tl.store(out_ptr + N + i, tl.clamp(x, -7.0, 7.0))
    tl.store(out_ptr + 2 * N + i, tl.minimum(x, 7.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out_ptr + 3 * N + i, tl.clamp(x, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL))


def test_minimum_drops_a_nan_unless_told_otherwise(device):
    x = torch.full((16,), torch.nan, device=device)
    out = torch.empty((4, 16), device=device)
    _drop_nan_kernel[(1,)](x, out, N=16)
    assert out.isnan().all(dim=1).tolist() == [False, False, True, True]


@triton.jit
def _bf16_sum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), axis=0))


@triton.jit
def _toward_zero_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@interpreted
def test_what_cannot_be_repaired_is_refused():
    x = torch.ones(16)
    with pytest.raises(InterpreterError, match="cannot reduce bfloat16"):
        _bf16_sum_kernel[(1,)](x.bfloat16(), x.bfloat16(), N=16)
    with pytest.raises(InterpreterError, match="cannot cast bfloat16"):
        _toward_zero_kernel[(1,)](x, x.bfloat16(), N=16)
