"""The checkpoints that a run folder has: which there are, whether they are sound, which one to go on from.

`checkpoint.py` says what a checkpoint is, and writes and loads them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_engine.train.errors import InputError
from moe_engine.train.parallel import World, from_first, gathered
from moe_engine.train.storage import DATA_FILE, METADATA_FILE, data_file, sha256_of, sync_file

STATE_FILE, SUMS_FILE = "state.json", "SHA256SUMS"
FORMAT = 2
_STEP = re.compile(r"step_\d{8}")
UNFINISHED, OLD, _DAMAGED = ".tmp", ".old", ".damaged"  # endings of folders that do not count
_OF_THE_DISK = (errno.EIO, errno.ENOENT, errno.EISDIR, errno.ENOTDIR)  # what a damaged disk or folder answers


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
    "evaluated_at": lambda value: value is None or _is_count(value),
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
    temporary = path.with_name(path.name + UNFINISHED)
    temporary.unlink(missing_ok=True)  # should it be a link, the file that it leads to is none of ours
    with open(temporary, "x", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    sync_file(path.parent)


class PublishedCheckpoints:
    """The published checkpoints of one run folder.

    Args:
        out_dir: the run folder.
        world: this process among the others; every rank makes every call that says so.
    """

    def __init__(self, out_dir: Path, world: World) -> None:
        self.folder = Path(out_dir) / "ckpt"
        self.world = world
        self.waiting: Callable[[], None] = lambda: None  # called now and then while the disk is waited for
        self._removal: threading.Thread | None = None

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
                from_first(lambda: [rename_over(each, _DAMAGED) for each, _ in damaged], self.world)
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
            if path.suffix == OLD and (path / SUMS_FILE).exists() and not final.exists():
                os.rename(path, final)  # killed between the two renames of a replacement
            elif path.suffix == OLD:
                _remove(path)
            elif path.suffix.startswith(UNFINISHED):
                _remove(path)
                notes.append(f"checkpoint {final} was never finished: removed")
        return notes

    def _repair_pointers(self, newest: Path) -> None:
        """Have `latest` and `best` name what they would, had the run not been killed before it could write them.

        A pointer to what is damaged goes back, too.
        """
        for name in ("latest", "best"):
            (self.folder / (name + UNFINISHED)).unlink(missing_ok=True)
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

    def _prune(self, newest: Path, keep_last_n: int) -> None:
        """Take the names of old checkpoints away now, and remove their files beside training."""
        best = self._pointer("best")
        old = [path for path in self.complete() if path != newest]
        surplus = old[: max(0, len(old) + 1 - keep_last_n)] if keep_last_n else []
        self._join_removal()
        for path in surplus:
            if path.name != best and path.is_symlink():
                path.unlink()  # where it leads is somebody else's
            elif path.name != best:
                rename_over(path, OLD)
        doomed = list(self.folder.glob(f"step_*{OLD}"))
        for path in doomed:
            (path / SUMS_FILE).unlink(missing_ok=True)  # first: from here on nobody takes it for a whole one
        if doomed:
            self._removal = threading.Thread(target=_remove_all, args=(doomed,), name="prune", daemon=True)
            self._removal.start()

    def _join_removal(self) -> None:
        if self._removal is not None:
            self._removal.join()
            self._removal = None


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


def rename_over(path: Path, ending: str) -> None:
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
