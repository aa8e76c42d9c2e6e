"""Checkpoints: everything that a run needs to go on exactly where it was.

    out_dir/ckpt/step_00001000/   ckpt_rank00000.safetensors, … (weights, moments, random state: each rank its part),
                                  metadata.json (what is where), state.json (iteration, loader, best loss, arguments),
                                  SHA256SUMS (of all of these; `sha256sum -c` reads it)
    out_dir/ckpt/latest, best     names of folders, replaced atomically, after the folder is whole

A checkpoint begins with a copy of the rank's tensors, which is all that training waits for; a thread writes the copy.
When every rank's file is on the disk, the first rank adds the small files and gives the folder its name by a rename.
Whatever happens before that leaves the checkpoints before it alone.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from moe_engine.train.errors import InputError
from moe_engine.train.optim import part_number
from moe_engine.train.parallel import World, from_first, gathered
from moe_engine.train.published import (
    FORMAT,
    OLD,
    STATE_FILE,
    SUMS_FILE,
    UNFINISHED,
    PublishedCheckpoints,
    folder_of,
    rename_over,
    write_atomically,
)
from moe_engine.train.storage import (
    METADATA_FILE,
    Reader,
    Staging,
    random_state,
    restore_random_state,
    sha256_of,
    sync_file,
)

# What comes of files that are whole and hold something else than a checkpoint.
_BROKEN = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError)
_SLOWEST = 10e6  # bytes a second; a disk that is slower is taken to hang
_FULL_BELOW = 1 << 20  # bytes free; a disk with less is a full one


@dataclass
class Published:
    """What became of a save: where it is, how large, and what it took."""

    path: Path
    bytes: int
    stall_seconds: float  # that training waited
    write_seconds: float  # from the first byte to the last rank's data on the disk, beside training
    note: str = ""  # on the first rank, what a person should know


@dataclass
class _Write:
    """A checkpoint on its way to the disk."""

    folder: Path  # with its temporary name
    state: dict[str, Any]
    rng: dict[str, Tensor]
    is_best: bool
    stall: float
    begun: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    result: dict[str, Any] | None = None
    error: BaseException | None = None
    note: str = ""
    thread: threading.Thread | None = None  # the one that writes

    @property
    def final(self) -> Path:
        return self.folder.with_name(folder_of(self.state["iteration"]))


class Checkpoints(PublishedCheckpoints):
    """Writes and loads the checkpoints of one run folder.

    Args:
        out_dir: the run folder.
        world: this process among the others; every rank makes every call that says so.
        keep_last_n: checkpoints that survive pruning, the best one not counted; 0 for all.
        asynchronous: whether training goes on while a checkpoint is written, which takes a copy of weights and moments
            in the host's memory.
    """

    def __init__(self, out_dir: Path, world: World, keep_last_n: int = 0, asynchronous: bool = True) -> None:
        super().__init__(out_dir, world)
        self.keep_last_n = keep_last_n
        self.asynchronous = asynchronous
        self._staging = Staging(world.rank, copies=asynchronous)
        self._write: _Write | None = None
        self._start: str | None = None  # names this start of the run in the folders that it has not finished

    # Saving

    def save(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        device: torch.device,
        *,
        is_best: bool = False,
    ) -> None:
        """Begin a checkpoint: when this returns, model and optimizer may change. Every rank calls this.

        One that is on its way is waited for. `settle` or `finish` publishes.

        Args:
            model, optimizer: as trained; sharded or not.
            state: JSON-able, with `iteration`.
            device: for its random state.
            is_best: whether `best` is to name this one.
        Raises:
            OSError: the one before it could not be written.
        """
        self.finish()
        begin = time.perf_counter()
        if self._start is None:
            self._start = from_first(lambda: secrets.token_hex(4), self.world)
        folder = self.folder / f"{folder_of(state['iteration'])}{UNFINISHED}-{self._start}"
        try:
            with _one_process_is_meant():
                dcp.save(
                    state_tensors(model, optimizer),
                    storage_writer=self._staging,
                    planner=DefaultSavePlanner(flatten_state_dict=False),
                    no_dist=self.world.size == 1,
                )
        except CheckpointException as error:  # which all ranks get when one cannot copy, for want of memory say
            raise _as_os_error(error, self.folder) from error
        self._write = write = _Write(folder, state, random_state(device), is_best, time.perf_counter() - begin)
        write.thread = threading.Thread(target=self._write_part, args=(write,), name="checkpoint", daemon=True)
        write.thread.start()
        if not self.asynchronous:
            self._wait()
            write.stall += write.seconds

    def _write_part(self, write: _Write) -> None:
        try:
            write.result = self._staging.write(write.folder, write.rng)
        except Exception as error:  # told to the run by `settle`, on all ranks
            write.error = error
        write.seconds = time.perf_counter() - write.begun

    @property
    def writing(self) -> bool:
        """Whether this rank's part of a checkpoint is not on the disk yet."""
        return self._write is not None and self._write.thread.is_alive()

    @property
    def pending(self) -> int | None:
        """The iteration of the checkpoint that is not published yet."""
        return None if self._write is None else self._write.state["iteration"]

    def settle(self) -> Published | None:
        """Publish the checkpoint that all ranks have written, and prune. Every rank calls this, and none is `writing`.

        Returns:
            What was published; None if nothing was on its way.
        Raises:
            OSError: a rank could not write; nothing of it is left, older checkpoints are untouched.
        """
        if self._write is None:
            return None
        write, self._write = self._write, None
        begin = time.perf_counter()
        failure = None if write.error is None else _as_os_error(write.error, self.folder)
        parts = gathered((write.result, write.seconds, failure), self.world)
        failures = [f"rank {rank}: {part[2].strerror}" for rank, part in enumerate(parts) if part[2] is not None]
        if not failures:
            failure = from_first(lambda: self._publish(write, [part[0] for part in parts]), self.world)
            failures = [] if failure is None else [failure.strerror]
        if failures:
            if self.world.is_main:
                shutil.rmtree(write.folder, ignore_errors=True)
            number = next((part[2].errno for part in parts if part[2] is not None), None)
            raise failure or OSError(number, "; ".join(failures), str(write.folder))
        size = sum(part[0]["bytes"] for part in parts)
        stall = write.stall + time.perf_counter() - begin
        return Published(write.final, size, stall, max(part[1] for part in parts), write.note)

    def _publish(self, write: _Write, parts: list[dict[str, Any]]) -> OSError | None:
        """Add the small files, sync, rename, point; returns what went wrong."""
        folder, final = write.folder, write.final
        try:
            for part in parts:
                _check_size(folder / part["file"], part["bytes"])
            texts = {
                METADATA_FILE: json.dumps(self._staging.metadata),
                STATE_FILE: json.dumps({"format": FORMAT, "is_best": write.is_best, **write.state}, indent=2) + "\n",
            }
            sums = {part["file"]: part["sha256"] for part in parts}
            for name, text in texts.items():
                write_atomically(folder / name, text)
                sums[name] = sha256_of(folder / name)
            lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
            write_atomically(folder / SUMS_FILE, "".join(lines))
            if final.exists():  # saved again, after an evaluation that a stop had left out
                rename_over(final, OLD)
            os.rename(folder, final)
            sync_file(self.folder)
            sync_file(self.folder.parent)
            write_atomically(self.folder / "latest", final.name + "\n")
            if write.is_best:
                write_atomically(self.folder / "best", final.name + "\n")
        except OSError as error:
            return _as_os_error(error, self.folder)
        try:
            self._prune(final, self.keep_last_n)
        except OSError as error:  # the checkpoint is there all the same
            write.note = f"old checkpoints cannot be removed: {error.strerror} ({error.filename})"
        return None

    def _wait(self) -> None:
        """Until every rank's part is on the disk. `waiting` is called for as long as a slow disk would take."""
        patience = 60 + self._staging.bytes / _SLOWEST
        while self._write is not None and any(gathered(self.writing, self.world)):
            self._write.thread.join(1.0)
            if time.perf_counter() - self._write.begun < patience:
                self.waiting()

    def finish(self) -> Published | None:
        """Wait for a checkpoint on its way and publish it; as `settle`."""
        self._wait()
        published = self.settle()
        self._join_removal()
        return published

    # Loading

    def load(
        self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device
    ) -> dict[str, Any]:
        """Restore model, optimizer (None: leave it out) and, with the optimizer, random state; returns the small part.

        Every rank calls this, with a checkpoint in which `defect` has found none. A rank that the checkpoint does not
        know keeps its random state: nothing in training draws from it.

        Raises:
            InputError: the checkpoint does not fit the model, or cannot be read.
        """
        state = self.read_state(path)
        optimizers = [] if optimizer is None else optimizer
        weights, moments = get_state_dict(model, optimizers)
        wanted = _tensors(weights, moments)
        reader = Reader(path, self.waiting)
        try:
            known = {_without_part(name) for name in wanted}
            surplus = {name for name in reader.read_metadata().state_dict_metadata if _without_part(name) not in known}
            if optimizer is None:
                surplus = {name for name in surplus if name.startswith("model.")}
            if surplus:
                raise ValueError(f"holds {min(surplus)}, which this model does not have")
            with _one_process_is_meant():
                dcp.load(
                    wanted,
                    storage_reader=reader,
                    planner=DefaultLoadPlanner(flatten_state_dict=False),
                    no_dist=self.world.size == 1,
                )
        except (CheckpointException, OSError, *_BROKEN) as error:
            raise InputError(f"checkpoint {path}: cannot be loaded: {_first_line(error)}") from error
        set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=moments)
        if optimizer is not None:
            try:
                restore_random_state(path, self.world.rank, device)
            except (OSError, SafetensorError, *_BROKEN) as error:
                raise InputError(f"checkpoint {path}: random state cannot be loaded: {_first_line(error)}") from error
        return state


def state_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and moments by the names that they have in a checkpoint, in the memory that training uses."""
    stepped = bool(optimizer.state)
    tensors = _tensors(*get_state_dict(model, optimizer))
    if not stepped:  # PyTorch has made the moments by a step with gradients of 0, and has counted it
        for moments in optimizer.state.values():
            moments["step"].zero_()
    return tensors


def _tensors(weights: dict[str, Any], moments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model's and an optimizer's state dict by name, sharing their memory.

    What an optimizer has besides (learning rate, betas, …) comes from the configuration. Moments in 8 bits are taken
    apart: codes and scales of a rank's part have names with the part's number.
    """
    tensors = {f"model.{name}": value for name, value in weights.items()}
    for parameter, state in moments.get("state", {}).items():
        for key, value in state.items():
            name = f"optimizer.{parameter}.{key}"
            local = value.to_local() if isinstance(value, DTensor) else value
            if hasattr(local, "__tensor_flatten__"):
                part = f"{name}.part{part_number(value):05d}"
                tensors |= {f"{part}.{inner}": getattr(local, inner) for inner in local.__tensor_flatten__()[0]}
            else:
                tensors[name] = value
    return tensors


def _without_part(name: str) -> str:
    """A tensor's name for all parts alike: each rank has the 8-bit moments of its own part only."""
    return re.sub(r"\.part\d{5}\.", ".part.", name)


def _check_size(path: Path, size: int) -> None:
    """Whether the first rank sees what another has written; raises OSError if not.

    It does not where --out_dir is another folder on each host, which nobody must first learn from a resume.
    """
    found = path.stat().st_size if path.exists() else None
    if found != size:
        what = "no such file" if found is None else f"{found} bytes"
        raise OSError(f"{path.name}: {size} bytes written, rank 0 finds {what} (is --out_dir one for all ranks?)")


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Keep torch.distributed.checkpoint from warning that it runs in a single process: it was told to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _first_line(error: BaseException) -> str:
    """The innermost cause, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _as_os_error(error: BaseException, path: Path) -> OSError:
    """What stopped a save, as an OSError with its number where there is one.

    safetensors has its own kind of error, with the system's number at the end of the text.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    if number is None and path.exists() and shutil.disk_usage(path).free < _FULL_BELOW:
        number = errno.ENOSPC
    reason = os.strerror(number) if number else _first_line(error)
    return OSError(number, f"checkpoint not written: {reason}", str(path))
