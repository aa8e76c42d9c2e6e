"""Where `torch.distributed.checkpoint` keeps tensors: one safetensors file a rank, and `metadata.json`.

    ckpt_rank00000.safetensors, …   the parts of tensors that a rank holds, under the tensors' names, and `rng.*`, the
                                    rank's random state
    metadata.json                   dtype and shape of every tensor, and where which part of it is

PyTorch's own files are pickles, which can run code when they are loaded; these hold numbers and names. PyTorch plans
who writes and who reads what, also for another number of ranks. `Staging` takes a plan's tensors into the host's
memory, which is all that training has to wait for, and writes them later, from a thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

METADATA_FILE = "metadata.json"
DATA_FILE = re.compile(r"ckpt_rank(\d{5})\.safetensors")
_RNG = "rng."


def data_file(rank: int) -> str:
    return f"ckpt_rank{rank:05d}.safetensors"


def sync_file(path: Path) -> None:
    """Have a file, or the entries of a folder, on the disk and not only on their way there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems have no such thing for folders
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Staging(StorageWriter):
    """One rank's part of a checkpoint, in the host's memory between `torch.distributed.checkpoint.save` and the disk.

    Its memory is used again by the next checkpoint: 12 bytes for each of the rank's parameters with AdamW in fp32,
    in pages that the GPU copies to directly where there is one.

    Args:
        rank: whose part.
        copies: False where nothing changes the tensors before `write`: those in the host's memory are then written from
            where they are.
    """

    def __init__(self, rank: int, copies: bool = True) -> None:
        self.file, self.copies = data_file(rank), copies
        self.metadata: dict[str, Any] | None = None  # on the first rank, of the whole checkpoint
        self._buffers: dict[str, Tensor] = {}
        self._staged: dict[str, Tensor] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._staged, self.metadata = {}, None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Copy this rank's tensors into the host's memory; nothing is written yet."""
        results, devices = [], set()
        for item in plan.items:
            tensor = planner.resolve_data(item).detach()
            key = item.index.fqn
            while key in self._staged:  # two parts of one tensor on one rank
                key += "'"
            self._staged[key] = self._copy(key, tensor)
            devices |= {tensor.device} if tensor.is_cuda else set()
            results.append(WriteResult(item.index, tensor.nbytes, (self.file, key)))
        for device in devices:
            torch.cuda.synchronize(device)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        if not self.copies and tensor.device.type == "cpu":
            return tensor.contiguous()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank: keep, as JSON, what every rank is going to write where."""
        places = {result.index: result.storage_data for of_rank in results for result in of_rank}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            chunks = []
            for chunk in tensor.chunks:
                file, key = places[MetadataIndex(name, chunk.offsets)]
                chunks.append({"offset": list(chunk.offsets), "shape": list(chunk.sizes), "file": file, "key": key})
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(tensor.size), "chunks": chunks}
        self.metadata = {"tensors": tensors}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    @property
    def bytes(self) -> int:
        """Of what is staged."""
        return sum(tensor.nbytes for tensor in self._staged.values())

    def write(self, folder: Path, extra: dict[str, Tensor]) -> dict[str, Any]:
        """Write the staged tensors and `extra` into a folder, made if need be; on the disk when this returns.

        Returns:
            `file`, its `bytes` and its `sha256`, computed from what the system gives back for the file.
        Raises:
            OSError, SafetensorError: it could not be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file
        save_file({**self._staged, **extra}, path)
        with contextlib.suppress(
            OSError
        ):  # some file systems have no modes; safetensors gives files to their owner alone
            path.chmod(folder.stat().st_mode & 0o666)
        sync_file(path)
        return {"file": self.file, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


class Reader(StorageReader):
    """Reads a checkpoint's tensors, each rank only the parts that it needs.

    Args:
        folder: a checkpoint, its checksums already compared.
        waiting: called before each file.
    """

    def __init__(self, folder: Path, waiting: Callable[[], None] = lambda: None) -> None:
        self.folder, self._waiting = folder, waiting
        self._places: dict[MetadataIndex, tuple[str, str]] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        """Raises ValueError where `metadata.json` is not what `Staging.finish` makes."""
        table = json.loads((self.folder / METADATA_FILE).read_text(encoding="utf-8"))
        tensors = {}
        for name, tensor in table["tensors"].items():
            dtype = getattr(torch, tensor["dtype"], None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{METADATA_FILE}: {name}: no such dtype {tensor['dtype']!r}")
            chunks = []
            for chunk in tensor["chunks"]:
                if not DATA_FILE.fullmatch(chunk["file"]):  # nor can it lead out of the folder
                    raise ValueError(f"{METADATA_FILE}: {name}: {chunk['file']!r} is not a file of a checkpoint")
                offset = torch.Size(chunk["offset"])
                chunks.append(ChunkStorageMetadata(offset, torch.Size(chunk["shape"])))
                self._places[MetadataIndex(name, offset)] = (chunk["file"], chunk["key"])
            if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(tensor["shape"]) or any(
                not 0 <= begin <= begin + length <= size
                for chunk in chunks
                for begin, length, size in zip(chunk.offsets, chunk.sizes, tensor["shape"], strict=True)
            ):  # what is not read would stay as it was
                raise ValueError(f"{METADATA_FILE}: {name}: its parts do not make up a tensor of {tensor['shape']}")
            properties = TensorProperties(dtype=dtype)
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of a plan in place."""
        by_file: dict[str, list[tuple[str, Any]]] = {}
        for item in plan.items:
            file, key = self._places[item.storage_index]
            by_file.setdefault(file, []).append((key, item))
        for file, items in sorted(by_file.items()):
            self._waiting()
            with safe_open(self.folder / file, framework="pt") as opened:
                for key, item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_part_of(opened, key, item.storage_offsets, item.lengths))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def _part_of(opened: Any, key: str, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    if not lengths:  # a single number, which has no slices
        return opened.get_tensor(key)
    where = tuple(slice(begin, begin + length) for begin, length in zip(offsets, lengths, strict=True))
    return opened.get_slice(key)[where]


# Random state


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of this process' random generators (torch, Python, numpy, the device's) as named tensors."""
    _, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "gauss": torch.tensor([float("nan") if gauss is None else gauss, cached], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return {_RNG + name: tensor for name, tensor in state.items()}


def restore_random_state(folder: Path, rank: int, device: torch.device) -> None:
    """Take the random state that a rank had. A rank that the checkpoint does not know keeps its own."""
    path = folder / data_file(rank)
    if not path.exists():
        return
    with safe_open(path, framework="pt") as opened:
        state = {key.removeprefix(_RNG): opened.get_tensor(key) for key in opened.keys() if key.startswith(_RNG)}  # noqa: SIM118
    gauss, cached = state["gauss"].tolist()
    torch.set_rng_state(state["torch"])
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
