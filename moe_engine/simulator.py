"""Triton's interpreter made trustworthy: its faults repaired, and every memory access of a kernel made visible.

The interpreter runs kernels on CPU tensors, with numpy, when TRITON_INTERPRET=1 is set before Triton is imported.
It keeps bfloat16 as uint16, and computes with that as with integers: products, sums and comparisons of bfloat16 are
wrong without an error, and casts to it truncate. `repair` mends what it can and refuses the rest. The kernels are
right as they are; nothing in here is used on a GPU.

Needed with Triton 3.6 and 3.8; `tests/kernels/test_interpreter.py` fails where a repair has become needless.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceScanOpInterface, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

_MARK = "_repaired_by_moe_engine"


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits (uint16) of fp32 values rounded to nearest, ties to even, in bfloat16; NaN is 0x7fff, as on a GPU."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    with np.errstate(over="ignore"):  # only a NaN carries out of the word
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _is_bfloat16(handle: TensorHandle) -> bool:
    # The interpreter leaves its operands' type on the result of a comparison, whose data are bool.
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen_bfloat16(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrowed(values: np.ndarray) -> TensorHandle:
    return TensorHandle(round_to_bfloat16(values.astype(np.float32)), tl.bfloat16)


def _elementwise(original: Callable) -> Callable:
    """An operation on bfloat16: in fp32, rounded once, as a GPU has it."""

    @functools.wraps(original)
    def wrapper(self, *operands_and_op):
        *operands, op = operands_and_op
        if op is np.where or not any(_is_bfloat16(operand) for operand in operands):  # a choice moves bits
            return original(self, *operands, op)
        result = original(self, *map(_widened, operands), op)
        return TensorHandle(result.data, tl.int1) if result.data.dtype == bool else _narrowed(result.data)

    return wrapper


def _cast(original: Callable) -> Callable:
    @functools.wraps(original)
    def wrapper(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bfloat16(src) else _narrowed(src.data)
        return original(self, _widened(src), dst_type)

    return wrapper


def _fp_to_fp(original: Callable) -> Callable:
    @functools.wraps(original)
    def wrapper(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            raise NotImplementedError("the interpreter cannot cast bfloat16 with fp_downcast_rounding, or to fp8")
        return original(self, src, dst_type, rounding_mode)

    return wrapper


def _dot(original: Callable) -> Callable:
    @functools.wraps(original)
    def wrapper(self, a, b, d, *options):
        if d.data.dtype != np.float32 or not (a.dtype.scalar.is_floating() and b.dtype.scalar.is_floating()):
            return original(self, a, b, d, *options)
        if 8 in (a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth):
            return original(self, a, b, d, *options)
        product = np.matmul(_widened(a).data.astype(np.float32), _widened(b).data.astype(np.float32))
        return TensorHandle(product + d.data, tl.float32)

    return wrapper


def _fma(original: Callable) -> Callable:
    @functools.wraps(original)
    def wrapper(self, x, y, z):
        if not any(map(_is_bfloat16, (x, y, z))):
            return original(self, x, y, z)
        return _narrowed(original(self, *map(_widened, (x, y, z))).data)

    return wrapper


def _reduction(original: Callable) -> Callable:
    @functools.wraps(original)
    def wrapper(self, inputs):
        if isinstance(inputs, tuple) and any(_is_bfloat16(tensor.handle) for tensor in inputs):
            raise NotImplementedError("the interpreter cannot reduce bfloat16; kernels sum in fp32")
        return original(self, inputs)

    return wrapper


def _launch_quietly(original: Callable) -> Callable:
    @functools.wraps(original)
    def wrapper(self, *args, **kwargs):
        with np.errstate(all="ignore"):  # a GPU does not warn of exp(100)
            return original(self, *args, **kwargs)

    return wrapper


def _range_bounds(original: Callable) -> Callable:
    @functools.wraps(original)
    def wrapper(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return wrapper


_REPAIRS: tuple[tuple[Any, str, Callable], ...] = (
    (InterpreterBuilder, "unary_op", _elementwise),
    (InterpreterBuilder, "binary_op", _elementwise),
    (InterpreterBuilder, "ternary_op", _elementwise),
    (InterpreterBuilder, "cast_impl", _cast),
    (InterpreterBuilder, "create_fp_to_fp", _fp_to_fp),
    (InterpreterBuilder, "create_dot", _dot),
    (InterpreterBuilder, "create_fma", _fma),
    (ReduceScanOpInterface, "apply", _reduction),
    (GridExecutor, "__call__", _launch_quietly),
    (interpreter, "_patch_lang_tensor", _range_bounds),
)


def _minnumf(self, lhs, rhs):
    return self.binary_op(lhs, rhs, np.fmin)


def _maxnumf(self, lhs, rhs):
    return self.binary_op(lhs, rhs, np.fmax)


def _clampf(self, arg, low, high, propagate_nan):
    if propagate_nan == ir.PROPAGATE_NAN.NONE:
        return self.create_minnumf(self.create_maxnumf(arg, low), high)
    return self.ternary_op(arg, low, high, np.clip)


def _get_bf16(self, value):
    return _narrowed(np.array([value], dtype=np.float32))


_REPLACEMENTS: dict[str, Callable] = {
    "create_minnumf": _minnumf,
    "create_maxnumf": _maxnumf,
    "create_clampf": _clampf,
    "get_bf16": _get_bf16,
}


def repair() -> None:
    """Mend the interpreter, in this process, for good. Does nothing the second time, and nothing to compiled kernels.

    - bfloat16: casts round to nearest even; arithmetic, comparisons and `tl.dot` compute with the values; constants
      exist. What stays wrong raises NotImplementedError: reductions in bfloat16, casts with another rounding.
    - `tl.minimum`, `tl.maximum` and `tl.clamp` drop a NaN unless told otherwise, as on a GPU (Triton 3.6 keeps it).
    - A tensor can bound a `range` (Triton 3.6 with numpy 2.4: an error). No warnings of overflow from numpy.
    """
    if getattr(interpreter, _MARK, False):
        return
    for owner, name, wrap in _REPAIRS:
        setattr(owner, name, wrap(getattr(owner, name)))
    for name, function in _REPLACEMENTS.items():
        setattr(InterpreterBuilder, name, function)
    setattr(interpreter, _MARK, True)


class Launch(NamedTuple):
    """A launch of a kernel: its name, its number among those observed, its tensor arguments by parameter name.

    A `TensorDescriptor` counts as its base; the tensors of a tuple are named `parameter.0`, `parameter.1`, ….
    """

    kernel: str
    number: int
    tensors: dict[str, Tensor]


class Access(NamedTuple):
    """A load or store of one program: addresses of the elements that the mask lets through (uint64, in order).

    An atomic operation is two: a load and a store.
    """

    launch: Launch
    is_store: bool
    addresses: np.ndarray
    itemsize: int


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, TensorDescriptor):
        yield name, value.base
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}.{i}", item)
    elif isinstance(value, Tensor):
        yield name, value


def _wrap_accesses(report: Callable[[bool, TensorHandle, np.ndarray | None], None]) -> dict[str, Callable]:
    """Wrappers for the methods of InterpreterBuilder that touch memory; every other one comes down to these."""
    builder = InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    update, compare = builder.create_atomic_rmw, builder.create_atomic_cas

    def create_masked_load(self, ptrs, mask, *rest, **options):
        report(False, ptrs, mask.data)
        return load(self, ptrs, mask, *rest, **options)

    def create_masked_store(self, ptrs, value, mask, *rest, **options):
        report(True, ptrs, mask.data)
        return store(self, ptrs, value, mask, *rest, **options)

    def create_atomic_rmw(self, operation, ptr, value, mask, *rest):
        report(False, ptr, mask.data)
        report(True, ptr, mask.data)
        return update(self, operation, ptr, value, mask, *rest)

    def create_atomic_cas(self, ptr, *rest):
        report(False, ptr, None)
        report(True, ptr, None)
        return compare(self, ptr, *rest)

    return {f.__name__: f for f in (create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas)}


@contextmanager
def observe(callback: Callable[[Access], None]) -> Iterator[list[Launch]]:
    """Call back before every access to memory that kernels make in the interpreter; yields the launches so far.

    An access with nothing to do (all masked) is not reported. What the callback raises comes out of the launch as it
    is, before the access is made. Several may be nested.
    """
    launches: list[Launch] = []
    raised: list[Exception] = []
    original_launch = GridExecutor.__call__

    def report(is_store: bool, pointers: TensorHandle, mask: np.ndarray | None) -> None:
        addresses = pointers.data.ravel() if mask is None else pointers.data[np.broadcast_to(mask, pointers.data.shape)]
        if addresses.size == 0:
            return
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        try:
            callback(Access(launches[-1], is_store, addresses, itemsize))
        except Exception as error:
            raised.append(error)
            raise

    @functools.wraps(original_launch)
    def launch(self, *args, **kwargs):
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = {k: tensor for name, value in named.items() for k, tensor in _tensors(name, value)}
        launches.append(Launch(self.fn.__name__, len(launches), tensors))
        try:
            return original_launch(self, *args, **kwargs)
        except InterpreterError:
            if raised:  # Triton has wrapped it, once for every function it went through
                raise raised.pop() from None
            raise

    wrappers = _wrap_accesses(report)
    originals = {name: getattr(InterpreterBuilder, name) for name in wrappers}
    for name, wrapper in wrappers.items():
        setattr(InterpreterBuilder, name, wrapper)
    GridExecutor.__call__ = launch
    try:
        yield launches
    finally:
        GridExecutor.__call__ = original_launch
        for name, original in originals.items():
            setattr(InterpreterBuilder, name, original)
