"""For the tests of kernels: where they run, and the watch on what they read and write.

Every test here runs under two checks. In the interpreter no load or store may leave the tensors that its launch got.
Everywhere, memory from `torch.empty` and its kin comes filled with NaN (integers: their largest value), so that an
element that no kernel wrote shows, and lies between two bands that no kernel may write into.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_engine import simulator
from moe_engine.kernels.launch import INTERPRETED

BAND = 256  # bytes before and after; a multiple of every alignment that a kernel may assume
BAND_VALUE = 0xA5
LARGEST = 1 << 26  # bytes; larger buffers are left alone: tests of 64-bit offsets count on memory that is never touched


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: a GPU if there is one, else the interpreter's CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def compiler_knows_torch() -> None:
    """torch.compile looks PyTorch's functions up once, at its first use: under `bands` it would find what is below."""
    torch.compile(lambda x: torch.empty_like(x).fill_(1) + x, backend="eager", fullgraph=True)(torch.ones(1))


class Bands:
    """Buffers with guard bands around them."""

    def __init__(self) -> None:
        self._bands: list[tuple[Tensor, Tensor]] = []

    def surround(self, template: Tensor) -> Tensor:
        """A poisoned tensor like the template in everything but its memory."""
        size = template.untyped_storage().nbytes()
        if type(template) is not Tensor or template.is_meta or not 0 < size <= LARGEST:
            return template
        buffer = torch.full((2 * BAND + size,), BAND_VALUE, dtype=torch.uint8, device=template.device)
        # A storage of its own: not a view, nothing before it, nothing behind it, as PyTorch would have made it.
        storage = buffer.untyped_storage()[BAND : BAND + size]
        tensor = torch.tensor([], dtype=template.dtype, device=template.device)
        tensor.set_(storage, 0, template.shape, template.stride())
        if template.dtype.is_floating_point or template.dtype.is_complex:
            tensor.fill_(math.nan)
        else:
            tensor.fill_(True if template.dtype == torch.bool else torch.iinfo(template.dtype).max)
        self._bands.append((buffer[:BAND], buffer[BAND + size :]))
        return tensor.requires_grad_(template.requires_grad)

    def check(self) -> None:
        """Raise AssertionError if a band was written to; forget them all."""
        bands, self._bands = self._bands, []
        for before, after in bands:
            assert (before == BAND_VALUE).all(), "memory before the start of a tensor was written to"
            assert (after == BAND_VALUE).all(), "memory behind the end of a tensor was written to"


def _poisoned(allocate: Callable[..., Tensor], bands: Bands) -> Callable[..., Tensor]:
    def wrapper(*args, **kwargs):
        return bands.surround(allocate(*args, **kwargs))

    return wrapper


@pytest.fixture(autouse=True)
def bands(monkeypatch):
    """Poison and guard whatever is allocated uninitialised in this test."""
    bands = Bands()
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name), bands))
    yield bands
    bands.check()


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and one-past-last byte of a tensor that has elements."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _extents(launch: simulator.Launch) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of what the launch's tensors cover, sorted; those that overlap are one."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted(_span(tensor) for tensor in launch.tensors.values() if tensor.numel()):
        if spans and start < spans[-1][1]:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((start, end))
    bounds = np.array(spans, dtype=np.uint64).reshape(-1, 2)
    return bounds[:, 0], bounds[:, 1]


class RangeCheck:
    """Callback of `simulator.observe` that lets no access out of the tensors of its launch."""

    def __init__(self) -> None:
        self._launch: simulator.Launch | None = None

    def __call__(self, access: simulator.Access) -> None:
        if access.launch is not self._launch:
            self._launch = access.launch
            self._starts, self._ends = _extents(access.launch)
        index = np.searchsorted(self._starts, access.addresses, side="right")
        inside = index > 0
        if len(self._ends):
            inside &= access.addresses + np.uint64(access.itemsize) <= self._ends[index - 1]
        if not inside.all():
            verb = "writes" if access.is_store else "reads"
            raise AssertionError(f"{access.launch.kernel} {verb} outside its tensors: {self._describe(access, inside)}")

    def _describe(self, access: simulator.Access, inside: np.ndarray) -> str:
        address = int(access.addresses[~inside][0])
        distances = []
        for name, tensor in access.launch.tensors.items():
            start, end = _span(tensor) if tensor.numel() else (tensor.data_ptr(),) * 2
            distances.append(
                (start - address, f"before {name}") if address < start else (address - end, f"past {name}")
            )
        nearest, where = min(distances, default=(address, "past no tensor at all"))
        return f"{int((~inside).sum())} elements, the first {nearest} bytes {where}"


@pytest.fixture(autouse=True)
def launches():
    """The launches of this test so far, their accesses checked; in the interpreter only, elsewhere None."""
    if not INTERPRETED:
        yield None
        return
    with simulator.observe(RangeCheck()) as launches:
        yield launches
