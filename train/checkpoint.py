"""Checkpoints: everything that a run needs to go on exactly where it was.

    out_dir/ckpt/step_00001000/    model and optimizer (torch.distributed.checkpoint, each rank its shard),
                                   state.json (iteration, loader, best loss, arguments), rng_rank00000.pt, …
    out_dir/ckpt/latest, best      names of folders, replaced atomically, after the folder is whole

A folder is written under a temporary name and renamed when every rank is done. What fails before that leaves the last
good checkpoint alone.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from moe_engine.train.errors import InputError
from moe_engine.train.parallel import World, any_rank

STATE_FILE = "state.json"
_TEMPORARY = ".tmp"
_FULL_BELOW = 1 << 20  # bytes free; a disk with less is a full one


def folder_of(iteration: int) -> str:
    return f"step_{iteration:08d}"


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves the old or the new one."""
    temporary = path.with_name(path.name + _TEMPORARY)
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _rng_state(device: torch.device) -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        out_dir: the run folder.
        world: this process among the others; every rank makes every call.
        keep_last_n: checkpoints that survive pruning, the best one not counted; 0 for all.
    """

    def __init__(self, out_dir: Path, world: World, keep_last_n: int = 0) -> None:
        self.folder = Path(out_dir) / "ckpt"
        self.world = world
        self.keep_last_n = keep_last_n

    def _barrier(self) -> None:
        if self.world.size > 1:
            dist.barrier()

    def _pointer(self, name: str) -> str | None:
        path = self.folder / name
        return path.read_text(encoding="utf-8").strip() if path.exists() else None

    def complete(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step_????????") if (path / STATE_FILE).exists())

    def latest(self) -> Path | None:
        """The checkpoint to resume from: the newest whole one."""
        complete = self.complete()
        return complete[-1] if complete else None

    def read_state(self, path: Path) -> dict[str, Any]:
        """The small part of a checkpoint: iteration, loader, best loss, arguments.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"checkpoint {path}: cannot read {STATE_FILE}: {error}") from None
        if not isinstance(state, dict) or not isinstance(state.get("iteration"), int):
            raise InputError(f"checkpoint {path}: {STATE_FILE} holds no iteration")
        return state

    def save(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        device: torch.device,
        *,
        is_best: bool = False,
    ) -> Path:
        """Write a checkpoint and prune old ones.

        Args:
            model, optimizer: as trained; sharded or not.
            state: JSON-able, with `iteration`.
            device: for its random state.
            is_best: whether `best` is to name this one.
        Returns:
            The new folder.
        Raises:
            OSError: it could not be written, for want of space say; nothing of it is left, older ones are untouched.
        """
        final = self.folder / folder_of(state["iteration"])
        temporary = final.with_name(final.name + _TEMPORARY)
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._barrier()
        failure = None
        try:
            weights, moments = get_state_dict(model, optimizer)
            with _one_process_is_meant():
                dcp.save(
                    {"model": weights, "optimizer": moments}, checkpoint_id=temporary, no_dist=self.world.size == 1
                )
            torch.save(_rng_state(device), temporary / f"rng_rank{self.world.rank:05d}.pt")
        except (OSError, CheckpointException, RuntimeError) as error:
            failure = _as_os_error(error, temporary)
        if any_rank(failure is not None, self.world, device):
            shutil.rmtree(temporary, ignore_errors=True)
            raise failure or OSError(None, "checkpoint not written: another rank failed", str(temporary))
        if self.world.is_main:
            write_atomically(temporary / STATE_FILE, json.dumps(state, indent=2))
            if final.exists():  # the same iteration saved again, after a stop right behind a save
                shutil.rmtree(final)
            os.replace(temporary, final)
            write_atomically(self.folder / "latest", final.name + "\n")
            if is_best:
                write_atomically(self.folder / "best", final.name + "\n")
            self._prune()
        self._barrier()
        return final

    def _prune(self) -> None:
        best = self._pointer("best")
        old = self.complete()[: -self.keep_last_n] if self.keep_last_n else []
        for path in old:
            if path.name != best:
                (path / STATE_FILE).unlink()  # first: from here on it does not count as whole
                shutil.rmtree(path)

    def load(
        self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device
    ) -> dict[str, Any]:
        """Restore model, optimizer (None: leave it out) and, with the optimizer, random state; returns the small part.

        A rank that the checkpoint does not know keeps its random state: nothing in training draws from it.

        Raises:
            InputError: the checkpoint does not fit the model, or cannot be read.
        """
        state = self.read_state(path)
        weights, moments = get_state_dict(model, optimizer if optimizer is not None else [])
        wanted = {"model": weights, **({"optimizer": moments} if optimizer is not None else {})}
        try:
            with _one_process_is_meant():
                dcp.load(wanted, checkpoint_id=path, no_dist=self.world.size == 1)
        except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"checkpoint {path}: cannot be loaded: {_first_line(error)}") from error
        set_state_dict(
            model,
            optimizer if optimizer is not None else [],
            model_state_dict=wanted["model"],
            optim_state_dict=wanted.get("optimizer", {}),
        )
        rng = path / f"rng_rank{self.world.rank:05d}.pt"
        if optimizer is not None and rng.exists():
            _set_rng_state(torch.load(rng, weights_only=True), device)
        return state


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

    PyTorch's own file writer answers a full disk with a RuntimeError: the disk is asked then.
    """
    cause = error
    if isinstance(error, CheckpointException) and error.failures:
        cause = next(iter(error.failures.values()))[0]
    number = cause.errno if isinstance(cause, OSError) else None
    if number is None and path.exists() and shutil.disk_usage(path).free < _FULL_BELOW:
        number = errno.ENOSPC
    reason = os.strerror(number) if number else _first_line(error)
    return OSError(number, f"checkpoint not written: {reason}", str(path))
