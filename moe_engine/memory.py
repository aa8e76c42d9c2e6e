"""The memory of a computation, counted without having it: tensors are fake, kernels are not launched.

Under `measuring` PyTorch's operations give tensors that have shapes and lifetimes and no data. Everything else is real:
autograd, hooks, FSDP2, optimizers, and the code around this project's kernels, down to its temporaries. `Footprint`
sees each operation and knows what is alive after it.

Whatever lives inside one of PyTorch's own kernels is not seen (cuBLAS keeps some 10 MB a stream), nor what an
allocator loses to fragments.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_engine import torch_backend

GRAIN = 512
"""Bytes that PyTorch's allocator for GPUs rounds a size up to."""

WEIGHTS, GATHERED, GRADIENTS = "weights", "gathered", "gradients"
OPTIMIZER, ACTIVATIONS, WORKSPACE = "optimizer", "activations", "workspace"
KINDS = (WEIGHTS, GATHERED, GRADIENTS, OPTIMIZER, ACTIVATIONS, WORKSPACE)

_GATHERING = ("c10d::_allgather_base_", "c10d::allgather_", "fsdp::all_gather_copy_in", "fsdp::split_with_sizes_copy")
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


class Footprint(TorchDispatchMode):
    """Bytes alive after each operation, by kind, and their peak.

    A tensor belongs to the kind that `mark` gave it, else to `phase` as it was when it was made. Tensors that share a
    storage count once.

    Attributes:
        phase: kind of the tensors made from now on.
        alive: bytes by kind, now.
        peak: bytes by kind when their sum was largest.
        at: the operation after which that was.
        paused: whether tensors are made that would not be there, and are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ACTIVATIONS
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.at = ""
        self.paused = False
        self._storages: dict[int, tuple[str, int, weakref.ref]] = {}

    def mark(self, tensors: Any, kind: str) -> None:
        """Give the tensors in a tree a kind, whatever they were; of a DTensor, this rank's part."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, DTensor):
                tensor = tensor.to_local()
            if isinstance(tensor, Tensor):
                for plain in _plain(tensor):
                    self._note(plain.untyped_storage(), kind, known=True)

    def _note(self, storage: torch.UntypedStorage, kind: str, *, known: bool) -> None:
        """Count a storage; with `known`, give it this kind if it was counted as another."""
        key = storage._cdata
        before = self._storages.get(key)
        if before is not None and not known:
            return
        if before is not None:
            self.alive[before[0]] -= before[1]
        size = -(-storage.nbytes() // GRAIN) * GRAIN
        watch = before[2] if before else weakref.ref(storage, lambda _: self._forget(key))
        self._storages[key] = (kind, size, watch)
        self.alive[kind] += size

    def _forget(self, key: int) -> None:
        kind, size, _ = self._storages.pop(key)
        self.alive[kind] -= size

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size now: FSDP2 empties and refills those of gathered parameters."""
        before = self._storages.get(storage._cdata)
        self._note(storage, before[0] if before else self.phase, known=True)

    def _look(self, operation: str) -> None:
        if self.alive.total() > self.peak.total():
            self.peak, self.at = Counter(self.alive), operation

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again with the parts
        if func in _READS and isinstance(args[0], FakeTensor):
            return _made_up(args[0])
        name = func.name()
        if (op := OPDEFS.get(name)) is not None and func.namespace == "moe_engine":
            with self:  # its body, and not only its results
                out = op._init_fn(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        kind, known = (GATHERED, True) if name in _GATHERING else (self.phase, False)
        made = (out, kwargs.get("out")) if known else out
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                for plain in _plain(tensor):
                    self._note(plain.untyped_storage(), kind, known=known)
        self._look(name)
        return out


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with a storage of their own that a wrapper (8-bit moments) consists of."""
    if hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, FakeTensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def _made_up(scalar: Tensor) -> float | int | bool:
    """What the host reads of a fake tensor: the value, where it was made of one, else 0, which is finite."""
    if (constant := getattr(scalar, "constant", None)) is not None:
        return constant.item()
    return False if scalar.dtype == torch.bool else 0.0 if scalar.is_floating_point() else 0


@contextmanager
def no_launches(arch: str) -> Iterator[None]:
    """A context in which Triton's kernels are chosen as on a GPU of `arch`, such as `sm_80`, and not run."""
    from triton.runtime.driver import driver
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from moe_engine.kernels import launch, tiles

    def nothing(*_arguments: Any, **_options: Any) -> None:
        pass

    stand_in = SimpleNamespace(get_active_torch_device=lambda: torch.device("cpu"))
    with ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "run", nothing),
            (InterpretedFunction, "run", nothing),
            (launch, "target", lambda: arch),
            (launch, "INTERPRETED", False),
            (tiles, "INTERPRETED", False),
            (type(driver), "active", stand_in),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@contextmanager
def measuring(footprint: Footprint) -> Iterator[None]:
    """A context in which tensors are fake, on device "cpu", and `footprint` watches.

    Values that the host reads are zeros, and experts get rows evenly. Modules come from the meta device:
    `to_empty(device="cpu")` in here. Kernels want `no_launches` around it.
    """
    resize, propagate = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached

    def resize_and_count(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        footprint.resized(storage)

    def propagate_uncounted(*args: Any, **kwargs: Any) -> Any:  # whole tensors, to learn the shapes of results
        before, footprint.paused = footprint.paused, True
        try:
            return propagate(*args, **kwargs)
        finally:
            footprint.paused = before

    def even_offsets(expert_offsets: Tensor, num_rows: int) -> list[int]:
        experts = expert_offsets.numel() - 1
        return [num_rows * e // experts for e in range(experts + 1)]

    with (
        mock.patch.object(torch_backend, "host_offsets", even_offsets),
        mock.patch.object(torch, "get_num_threads", lambda: 1),  # the backend's threads would not be watched
        mock.patch.object(torch.UntypedStorage, "resize_", resize_and_count),
        mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_uncounted),
        torch.compiler.set_stance("force_eager"),  # a compiled step would be traced
        FakeTensorMode(allow_non_fake_inputs=True),
        footprint,
    ):
        yield
