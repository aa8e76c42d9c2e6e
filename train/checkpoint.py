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
from collections.abc import Callable, Iterator
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
from moe_engine.train.storage import (
    DATA_FILE,
    METADATA_FILE,
    Reader,
    Staging,
    data_file,
    random_state,
    restore_random_state,
    sha256_of,
    sync_file,
)

STATE_FILE, SUMS_FILE = "state.json", "SHA256SUMS"
FORMAT = 2
_STEP = re.compile(r"step_\d{8}")
_UNFINISHED, _OLD, _DAMAGED = ".tmp", ".old", ".damaged"
# What comes of files that are whole and hold something else than a checkpoint.
_BROKEN = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError)
_OF_THE_DISK = (errno.EIO, errno.ENOENT, errno.EISDIR, errno.ENOTDIR)  # what a damaged disk or folder answers
_SLOWEST = 10e6  # bytes a second; a disk that is slower is taken to hang
_FULL_BELOW = 1 << 20  # bytes free; a disk with less is a full one


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 1 << 62


def _is_loss(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _are_arguments(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(_is_count(value.get(name, 1), 1) for name in ("dp_replicate", "batch_size", "grad_accum_steps"))


def _are_counters(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    history = value.get("spike_history", {})
    numbers = [value.get(name, 0) for name in ("skipped", "skipped_in_a_row")]
    return all(map(_is_count, numbers)) and isinstance(history, dict) and all(
        isinstance(row, list) and all(type(number) in (int, float) for number in row) for row in history.values()
    )  # fmt: skip


# What a run goes on from; the loader looks at its own part.
_OF_A_RUN: dict[str, Callable[[Any], bool]] = {
    "iteration": lambda value: _is_count(value) and value < 10**8,  # the digits of a folder's name
    "loader": lambda value: isinstance(value, dict),
    "undone": lambda value: isinstance(value, list) and all(name in ("evaluate", "sample", "save") for name in value),
    "val_loss": _is_loss,
    "best_val_loss": _is_loss,
    "scaler": lambda value: isinstance(value, dict),
    "counters": lambda value: value is None or _are_counters(value),  # an older checkpoint has none
    "tokens_per_iteration": lambda value: _is_count(value, 1),
    "ranks": lambda value: _is_count(value, 1),
    "tokenizer": lambda value: isinstance(value, str),
    "vocab_size": lambda value: _is_count(value, 1),
    "arguments": _are_arguments,
}


def folder_of(iteration: int) -> str:
    return f"step_{iteration:08d}"


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves the old or the new one."""
    temporary = path.with_name(path.name + _UNFINISHED)
    temporary.unlink(missing_ok=True)  # should it be a link, the file that it leads to is none of ours
    with open(temporary, "x", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    sync_file(path.parent)


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


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        out_dir: the run folder.
        world: this process among the others; every rank makes every call that says so.
        keep_last_n: checkpoints that survive pruning, the best one not counted; 0 for all.
        asynchronous: whether training goes on while a checkpoint is written, which takes a copy of weights and moments
            in the host's memory.
    """

    def __init__(self, out_dir: Path, world: World, keep_last_n: int = 0, asynchronous: bool = True) -> None:
        self.folder = Path(out_dir) / "ckpt"
        self.world = world
        self.keep_last_n = keep_last_n
        self.asynchronous = asynchronous
        self._staging = Staging(world.rank, copies=asynchronous)
        self._write: _Write | None = None
        self.waiting: Callable[[], None] = lambda: None  # called now and then while the disk is waited for
        self._start: str | None = None  # names this start of the run in the folders that it has not finished
        self._removal: threading.Thread | None = None

    # What is there

    def complete(self) -> list[Path]:
        """Published checkpoints, oldest first; whether they are sound is for `defect` to say."""
        names = (path for path in self.folder.glob("step_*") if _STEP.fullmatch(path.name))
        return sorted(path for path in names if path.is_dir())

    def latest(self) -> Path | None:
        """The newest published checkpoint."""
        complete = self.complete()
        return complete[-1] if complete else None

    def _pointer(self, name: str) -> str | None:
        """The checkpoint that `latest` or `best` names."""
        path = self.folder / name
        text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
        return text if _STEP.fullmatch(text) else None

    def defect(self, path: Path) -> str | None:
        """Why a checkpoint cannot be trusted; None if every file is there with its checksum.

        Every rank calls this and looks at its share of the files; all get the same answer.

        Raises:
            InputError: it is of a format that this version does not read, or cannot be read for a reason that need not
                last (no permission, a server that is away): it may well be sound.
        """
        found, unread = None, None
        try:
            found = self._defect_of_share(path)
        except OSError as error:
            reason = f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
            found, unread = (reason, None) if error.errno in _OF_THE_DISK else (None, reason)
        found, unread = (
            next(filter(None, each), None) for each in zip(*gathered((found, unread), self.world), strict=True)
        )
        if unread:
            raise InputError(f"checkpoint {path}: {unread}; nothing was changed")
        return found

    def _defect_of_share(self, path: Path) -> str | None:
        if not (path / SUMS_FILE).exists():
            if (path / ".metadata").exists():
                raise InputError(
                    f"checkpoint {path}: written by a version of moe-engine from before format {FORMAT}, which this "
                    "one does not read"
                )
            return f"{SUMS_FILE} is missing"
        sums = _read_sums(path / SUMS_FILE)
        if isinstance(sums, str):
            return sums
        ranks = sum(bool(DATA_FILE.fullmatch(name)) for name in sums)
        expected = {STATE_FILE, METADATA_FILE, *map(data_file, range(max(ranks, 1)))}
        if expected != set(sums):
            return f"{SUMS_FILE} lists {', '.join(sorted(set(sums) ^ expected))} wrongly or not at all"
        for name in sorted(sums)[self.world.rank :: self.world.size]:
            self.waiting()
            if not (path / name).exists():
                return f"{name} is missing"
            if sha256_of(path / name) != sums[name]:
                return f"{name} is damaged or truncated ({(path / name).stat().st_size} bytes, with another checksum)"
        return None

    def newest_sound(self) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, and what a person should know of those that were passed over.

        Every rank calls this. What was never finished is removed. Checkpoints that are damaged are put aside under
        another name when there is a sound one before them. None means that nothing was ever published.

        Raises:
            InputError: there were checkpoints and none of them is sound.
        """
        notes = from_first(self._tidy, self.world)
        published, aside, named = from_first(
            lambda: (
                [path.name for path in self.complete()],
                [path.name for path in sorted(self.folder.glob(f"step_*{_DAMAGED}"))],
                self._pointer("latest"),
            ),
            self.world,
        )
        damaged: list[tuple[Path, str]] = []
        for path in (self.folder / name for name in reversed(published)):
            defect = self.defect(path)
            if defect is None:
                from_first(lambda: [_rename_over(each, _DAMAGED) for each, _ in damaged], self.world)
                notes += [
                    f"checkpoint {d}: {why}; put aside as {d.name}{_DAMAGED}, the one before it is used"
                    for d, why in damaged
                ]
                from_first(lambda newest=path: self._repair_pointers(newest), self.world)
                return path, notes
            damaged.append((path, defect))
        if damaged or aside or named:
            reasons = [f"{path.name}: {why}" for path, why in damaged] + [f"{name}: put aside before" for name in aside]
            if named and not reasons:
                reasons = [f"{named}, which `latest` names, is not there"]
            raise InputError(
                f"--out_dir {self.folder.parent}: holds no checkpoint that can be used ({'; '.join(reasons)}); "
                "nothing was changed; --fresh starts over"
            )
        return None, notes

    def _tidy(self) -> list[str]:
        """Remove what a run that was killed has left half-done; returns what to say about it."""
        notes = []
        for path in sorted(self.folder.glob("step_*.*")):
            final = path.with_name(path.name.partition(".")[0])
            if not _STEP.fullmatch(final.name) or path.is_symlink():
                continue
            if path.suffix == _OLD and (path / SUMS_FILE).exists() and not final.exists():
                os.rename(path, final)  # killed between the two renames of a replacement
            elif path.suffix == _OLD:
                _remove(path)
            elif path.suffix.startswith(_UNFINISHED):
                _remove(path)
                notes.append(f"checkpoint {final} was never finished: removed")
        return notes

    def _repair_pointers(self, newest: Path) -> None:
        """Have `latest` and `best` name what they would, had the run not been killed before it could write them.

        A pointer to what is damaged goes back, too.
        """
        for name in ("latest", "best"):
            (self.folder / (name + _UNFINISHED)).unlink(missing_ok=True)
        if self._pointer("latest") != newest.name:
            write_atomically(self.folder / "latest", newest.name + "\n")
        best = self._pointer("best")
        known = best if best and (self.folder / best).is_dir() else ""
        for path in reversed(self.complete()):
            if path.name <= known:
                break
            try:
                is_best = self.read_state(path).get("is_best", False)
            except InputError:  # an old one that is damaged: nobody has to read it
                continue
            if is_best:
                write_atomically(self.folder / "best", path.name + "\n")
                break

    def read_state(self, path: Path) -> dict[str, Any]:
        """The small part of a checkpoint: iteration, loader, best loss, arguments.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"checkpoint {path}: cannot read {STATE_FILE}: {error}") from None
        if not isinstance(state, dict) or not isinstance(state.get("iteration"), int):
            raise InputError(f"checkpoint {path}: {STATE_FILE} holds no iteration")
        if state.get("format") != FORMAT:
            raise InputError(f"checkpoint {path}: expected format {FORMAT}, got {state.get('format')}")
        return state

    def read_run(self, path: Path) -> dict[str, Any]:
        """`read_state` of a checkpoint of a training run: every value is of the kind that a run relies on.

        Raises:
            InputError: as `read_state`; or a value is missing or of another kind.
        """
        state = self.read_state(path)
        wrong = [name for name, is_right in _OF_A_RUN.items() if not is_right(state.get(name))]
        if wrong:
            raise InputError(f"checkpoint {path}: {STATE_FILE}: no usable value for {', '.join(wrong)}")
        return state

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
        folder = self.folder / f"{folder_of(state['iteration'])}{_UNFINISHED}-{self._start}"
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
                _rename_over(final, _OLD)
            os.rename(folder, final)
            sync_file(self.folder)
            sync_file(self.folder.parent)
            write_atomically(self.folder / "latest", final.name + "\n")
            if write.is_best:
                write_atomically(self.folder / "best", final.name + "\n")
        except OSError as error:
            return _as_os_error(error, self.folder)
        try:
            self._prune(final)
        except OSError as error:  # the checkpoint is there all the same
            write.note = f"old checkpoints cannot be removed: {error.strerror} ({error.filename})"
        return None

    def _prune(self, newest: Path) -> None:
        """Take the names of old checkpoints away now, and remove their files beside training."""
        best = self._pointer("best")
        old = [path for path in self.complete() if path != newest]
        surplus = old[: max(0, len(old) + 1 - self.keep_last_n)] if self.keep_last_n else []
        self._join_removal()
        for path in surplus:
            if path.name != best and path.is_symlink():
                path.unlink()  # where it leads is somebody else's
            elif path.name != best:
                _rename_over(path, _OLD)
        doomed = list(self.folder.glob(f"step_*{_OLD}"))
        for path in doomed:
            (path / SUMS_FILE).unlink(missing_ok=True)  # first: from here on nobody takes it for a whole one
        if doomed:
            self._removal = threading.Thread(target=_remove_all, args=(doomed,), name="prune", daemon=True)
            self._removal.start()

    def _join_removal(self) -> None:
        if self._removal is not None:
            self._removal.join()
            self._removal = None

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
            surplus = set(reader.read_metadata().state_dict_metadata) - set(wanted)
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


def _read_sums(path: Path) -> dict[str, str] | str:
    """Checksums by file name, or what is wrong with the file."""
    sums = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", digest) or not (
            name in (STATE_FILE, METADATA_FILE) or DATA_FILE.fullmatch(name)
        ):
            return f"{path.name} is damaged (line {line[:90]!r})"
        sums[name] = digest
    return sums


def _check_size(path: Path, size: int) -> None:
    """Whether the first rank sees what another has written; raises OSError if not.

    It does not where --out_dir is another folder on each host, which nobody must first learn from a resume.
    """
    found = path.stat().st_size if path.exists() else None
    if found != size:
        what = "no such file" if found is None else f"{found} bytes"
        raise OSError(f"{path.name}: {size} bytes written, rank 0 finds {what} (is --out_dir one for all ranks?)")


def _rename_over(path: Path, ending: str) -> None:
    """Give a folder a name with an ending; one that has that name already is removed."""
    target = path.with_name(path.name + ending)
    if os.path.lexists(target):
        _remove(target)
    os.rename(path, target)


def _remove(path: Path) -> None:
    """Remove a folder; of a link, only the link and never what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _remove_all(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # what stays is removed at the next start


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
