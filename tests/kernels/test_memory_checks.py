"""Every access that a kernel makes is seen, and the checks that all tests of this folder run under notice bad ones."""

import ctypes

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_engine import simulator
from moe_engine.kernels.launch import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")


@triton.jit
def _add_kernel(x_ptr, out_ptr, N, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < N) + SHIFT, mask=i < N)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_observer_sees_every_access(dtype):
    x, out = torch.zeros(20, dtype=dtype), torch.zeros(20, dtype=dtype)
    size, seen, outer = x.element_size(), [], []
    with simulator.observe(outer.append), simulator.observe(seen.append) as launches:
        _add_kernel[(3,)](x, out, 20, SHIFT=1, BLOCK=8)
        _add_kernel[(1,)](out, x, N=0, SHIFT=1, BLOCK=8)  # nothing to do: a launch without accesses
    _add_kernel[(1,)](x, out, 20, SHIFT=1, BLOCK=8)  # nobody looks any more

    assert [(launch.kernel, launch.number) for launch in launches] == [("_add_kernel", 0), ("_add_kernel", 1)]
    assert launches[0].tensors.keys() == {"x_ptr", "out_ptr"} and launches[0].tensors["x_ptr"] is x
    assert all(access.launch is launches[0] and access.itemsize == size for access in seen)
    for is_store, tensor in ((False, x), (True, out)):
        parts = [access.addresses for access in seen if access.is_store == is_store]
        assert [len(part) for part in parts] == [8, 8, 4]
        assert np.array_equal(np.concatenate(parts), tensor.data_ptr() + size * np.arange(20))
    assert len(outer) == len(seen)


@triton.jit
def _descriptor_kernel(x, out, M: tl.constexpr, N: tl.constexpr):
    out.store([0, 0], x.load([tl.program_id(0) * M, 0]) + 1)


@triton.jit
def _atomic_kernel(out_ptr):
    tl.atomic_add(out_ptr, 1)


@triton.jit
def _tuple_kernel(pair, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(pair[1] + i, tl.load(pair[0] + i))


@interpreted
def test_observer_sees_descriptors_atomics_and_tuples():
    x, out, seen = torch.zeros(10, 16), torch.zeros(8, 16), []
    descriptors = [TensorDescriptor.from_tensor(tensor, [8, 16]) for tensor in (x, out)]
    with simulator.observe(seen.append) as launches:
        _descriptor_kernel[(1,)](*descriptors, M=8, N=16)
        _descriptor_kernel[(2,)](*descriptors, M=8, N=16)
        _atomic_kernel[(1,)](torch.zeros(1, dtype=torch.int32))
        _tuple_kernel[(1,)]((x, out), N=16)
    assert launches[0].tensors["x"] is x
    sizes = [(access.launch.number, access.is_store, access.addresses.size) for access in seen]
    assert sizes[:2] == [(0, False, 128), (0, True, 128)]
    assert sizes[4] == (1, False, 32)  # the rows that exist
    assert sizes[6:8] == [(2, False, 1), (2, True, 1)]
    assert launches[3].tensors == {"pair.0": x, "pair.1": out}


# The two checks that every test of this folder runs under


@triton.jit
def _store_one_past_kernel(out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N) + 1, 1.0)


@triton.jit
def _load_one_before(x_ptr, i):
    return tl.load(x_ptr + i - 1)


@triton.jit
def _load_one_before_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, _load_one_before(x_ptr, i))


@triton.jit
def _forgetful_kernel(out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, 1.0, mask=i != 5)


@interpreted
def test_store_past_the_end_is_caught(launches):
    out = torch.empty(16)
    with pytest.raises(AssertionError, match=r"_store_one_past_kernel writes outside .* 0 bytes past out_ptr"):
        _store_one_past_kernel[(1,)](out, N=16)
    assert out.isnan().all()  # before it was made
    assert [launch.kernel for launch in launches] == ["_store_one_past_kernel"]
    # Rows 0 and 2 of a larger tensor are in reach of the pointer, but not arguments.
    with pytest.raises(AssertionError, match="writes outside"):
        _store_one_past_kernel[(1,)](torch.zeros(3, 16)[1], N=16)


@interpreted
def test_load_before_the_beginning_is_caught():
    x = torch.zeros(32)
    with pytest.raises(AssertionError, match=r"_load_one_before_kernel reads outside .* 4 bytes before x_ptr"):
        _load_one_before_kernel[(1,)](x[16:], torch.empty(16), N=16)
    _load_one_before_kernel[(1,)](x[1:], x, N=8)  # overlapping arguments: in the reach of one of them


@interpreted
def test_operation_that_is_refused_stays_an_interpreter_error():
    with pytest.raises(InterpreterError):
        _add_kernel[(1,)](torch.zeros(8), "not a pointer", 8, SHIFT=1, BLOCK=8)


def test_element_that_was_not_written_shows(device):
    for out in (torch.empty(16, device=device), torch.zeros(1, device=device).new_empty(16)):
        _forgetful_kernel[(1,)](out, N=16)
        assert out.isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool])
def test_uninitialised_memory_is_poisoned_and_aligned(device, dtype):
    like = torch.zeros(3, 5, dtype=dtype, device=device)
    strided = torch.empty_like(like.T)
    assert strided.stride() == (1, 5)
    tensors = [torch.empty(3, 5, dtype=dtype, device=device), torch.empty_like(like), like.new_empty(3, 5), strided.T]
    for tensor in tensors:
        assert tensor.shape == (3, 5) and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0
        if dtype.is_floating_point:
            assert tensor.isnan().all()
        else:
            assert (tensor == (True if dtype == torch.bool else torch.iinfo(dtype).max)).all()
    assert torch.empty(0, 4, dtype=dtype).shape == (0, 4)
    assert torch.empty(4, device="meta").is_meta


@triton.jit
def _store_kernel(out_ptr, PLACE: tl.constexpr):
    tl.store(out_ptr + PLACE, 1.0)


@pytest.mark.parametrize("place, message", [(-1, "before the start"), (7, "behind the end")])
def test_bands_notice_a_write(device, bands, place, message):
    out = torch.empty(7, dtype=torch.bfloat16, device=device)
    if INTERPRETED:  # where such a store is caught before it is made
        ctypes.memset(out.data_ptr() + place * out.element_size(), 1, 1)
    else:
        _store_kernel[(1,)](out, PLACE=place)
    with pytest.raises(AssertionError, match=message):
        bands.check()
    bands.check()  # told once
