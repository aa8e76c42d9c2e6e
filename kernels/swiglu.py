"""The gated activation of an expert MLP: device functions for the epilogues that fuse it, and a standalone op.

    a = g·σ(α·g)·(u + c),   g = min(gate, limit),   u = clamp(up, -limit, limit)

Gate and up are interleaved in the last dimension of `h`: even columns gate, odd columns up. Values are computed in
fp32. The gradient passes at the bounds themselves (gate = limit). No bound hides a NaN.
swiglu: α = 1, c = 0, limit = inf (Shazeer 2020, arXiv 2002.05202). gpt-oss: α = 1.702, c = 1, limit = 7.
The op saves h alone for backward, which recomputes a.

N = rows, F = expert hidden width
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.kernels.launch import FLOATS, check, check_device, check_tensor, on_device_of_arguments

BLOCK_N, BLOCK_F = 8, 128  # pairs of a program: memory-bound, so any tile that is read in 16-byte accesses will do


@triton.jit
def load_pair(pointer, offset, mask):
    """(gate, up) in fp32 of the pairs `offset` (int64, counted in pairs), 0 where masked.

    The two of a 16-bit type are read as one 32-bit word. Apart, they make the compiler shuffle whole tiles between
    layouts, which spills where the pair is used in an epilogue.
    """
    dtype: tl.constexpr = pointer.dtype.element_ty
    if dtype == tl.float32:
        gate = tl.load(pointer + 2 * offset, mask=mask, other=0.0)
        up = tl.load(pointer + 2 * offset + 1, mask=mask, other=0.0)
    else:
        word = tl.load(pointer.to(tl.pointer_type(tl.uint32), bitcast=True) + offset, mask=mask, other=0)
        if dtype == tl.bfloat16:  # the upper half of an fp32
            gate = (word << 16).to(tl.float32, bitcast=True)
            up = (word & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            gate = word.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
            up = (word >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return gate, up


@triton.jit
def store_pair(pointer, offset, gate, up, mask):
    """Round (gate, up) to the pointer's type and write them at the pairs `offset`, as `load_pair` reads them."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    if dtype == tl.float32:
        tl.store(pointer + 2 * offset, gate, mask=mask)
        tl.store(pointer + 2 * offset + 1, up, mask=mask)
    else:
        low = gate.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = up.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        tl.store(pointer.to(tl.pointer_type(tl.uint32), bitcast=True) + offset, low | (high << 16), mask=mask)


@triton.jit
def _clamped(gate, up, LIMIT: tl.constexpr):
    """The bounds. Written so that a NaN stays one: a plain minimum would drop it on a GPU."""
    if float("inf") != LIMIT:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate, up


@triton.jit
def gated_activation(gate, up, ALPHA: tl.constexpr, OFFSET: tl.constexpr, LIMIT: tl.constexpr):
    """a of fp32 gate and up, in fp32."""
    g, u = _clamped(gate, up, LIMIT)
    return g * tl.sigmoid(ALPHA * g) * (u + OFFSET)


@triton.jit
def gated_activation_backward(gate, up, grad_a, ALPHA: tl.constexpr, OFFSET: tl.constexpr, LIMIT: tl.constexpr):
    """(a, grad_gate, grad_up) of fp32 gate, up and grad_a, in fp32; a has the bits that `gated_activation` gives."""
    g, u = _clamped(gate, up, LIMIT)
    u = u + OFFSET
    s = tl.sigmoid(ALPHA * g)
    gs = g * s
    # The large factor meets the one that vanishes first, so that no gate in range gives 0 · inf.
    grad_gate = grad_a * u * (s + ALPHA * (gs * (1.0 - s)))
    grad_up = grad_a * gs
    if float("inf") != LIMIT:  # as "beyond the bound", which a NaN is not
        grad_gate = tl.where(gate > LIMIT, 0.0, grad_gate)
        grad_up = tl.where((up > LIMIT) | (up < -LIMIT), 0.0, grad_up)
    return gs * u, grad_gate, grad_up


@triton.jit(do_not_specialize=["N"])
def _gated_fwd_kernel(
    h_ptr,  # (N, 2F)
    a_ptr,  # (N, F)
    N,
    F: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Grid: (cdiv(N, BLOCK_N), cdiv(F, BLOCK_F))."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    col = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (row < N)[:, None] & (col < F)[None, :]
    offset = row[:, None] * F + col[None, :]  # of the pair in h, and of its value in a
    gate, up = load_pair(h_ptr, offset, mask)
    a = gated_activation(gate, up, ALPHA, OFFSET, LIMIT)
    tl.store(a_ptr + offset, a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _gated_bwd_kernel(
    grad_a_ptr,  # (N, F)
    h_ptr,  # (N, 2F)
    grad_h_ptr,  # (N, 2F)
    N,
    F: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Grid: (cdiv(N, BLOCK_N), cdiv(F, BLOCK_F))."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    col = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (row < N)[:, None] & (col < F)[None, :]
    offset = row[:, None] * F + col[None, :]
    gate, up = load_pair(h_ptr, offset, mask)
    grad_a = tl.load(grad_a_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    _, grad_gate, grad_up = gated_activation_backward(gate, up, grad_a, ALPHA, OFFSET, LIMIT)
    store_pair(grad_h_ptr, offset, grad_gate, grad_up, mask)


def _grid(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, BLOCK_N), triton.cdiv(width, BLOCK_F)


def _check_words(name: str, h: Tensor) -> None:
    """Pairs are read as 32-bit words: a view that starts in the middle of one cannot be."""
    check_device(name, h)
    check(h.data_ptr() % 4 == 0, name, "an address divisible by 4", f"{h.data_ptr() % 4} more")


@on_device_of_arguments
def _gated_forward(h: Tensor, alpha: float, offset: float, limit: float) -> Tensor:
    _check_words("h", h)
    a = h.new_empty(h.shape[0], h.shape[1] // 2)
    if a.numel():
        constants = {"ALPHA": alpha, "OFFSET": offset, "LIMIT": limit, "BLOCK_N": BLOCK_N, "BLOCK_F": BLOCK_F}
        _gated_fwd_kernel[_grid(*a.shape)](h, a, *a.shape, **constants)
    return a


@on_device_of_arguments
def _gated_backward(grad_a: Tensor, h: Tensor, alpha: float, offset: float, limit: float) -> Tensor:
    _check_words("h", h)
    grad_h = torch.empty_like(h)
    if h.numel():
        constants = {"ALPHA": alpha, "OFFSET": offset, "LIMIT": limit, "BLOCK_N": BLOCK_N, "BLOCK_F": BLOCK_F}
        _gated_bwd_kernel[_grid(*grad_a.shape)](grad_a, h, grad_h, *grad_a.shape, **constants)
    return grad_h


_gated_op = torch.library.custom_op("moe_engine::gated", _gated_forward, mutates_args=())
_gated_backward_op = torch.library.custom_op("moe_engine::gated_backward", _gated_backward, mutates_args=())


@_gated_op.register_fake
def _(h, alpha, offset, limit):
    return h.new_empty(h.shape[0], h.shape[1] // 2)


@_gated_backward_op.register_fake
def _(grad_a, h, alpha, offset, limit):
    return torch.empty_like(h)


def _save(ctx, inputs, output):
    h, *ctx.constants = inputs
    ctx.save_for_backward(h)


def _grad(ctx, grad_a):
    (h,) = ctx.saved_tensors
    return _gated_backward_op(grad_a.contiguous(), h, *ctx.constants), None, None, None


_gated_op.register_autograd(_grad, setup_context=_save)


def gated(h: Tensor, alpha: float = 1.0, offset: float = 0.0, limit: float = math.inf) -> Tensor:
    """Gated activation of interleaved rows: `(N, 2F)` → `(N, F)`, in h's dtype, computed in fp32.

    Args:
        h: `(N, 2F)`, contiguous, fp32, fp16 or bf16; column 2j is gate j, column 2j + 1 is up j.
        alpha, offset, limit: α, c and the limit of the module's equation.
    Raises:
        ValueError: h is not as described or starts at an odd element of its storage; limit is not positive; alpha or
            offset is not finite.
    """
    check_tensor("h", h, ("N", "2F"), FLOATS)
    check(h.shape[1] % 2 == 0, "h", "an even number of columns", h.shape[1])
    check(-math.inf < alpha < math.inf, "alpha", "a finite number", alpha)
    check(-math.inf < offset < math.inf, "offset", "a finite number", offset)
    check(limit > 0, "limit", "a positive number", limit)
    return _gated_op(h, float(alpha), float(offset), float(limit))
