"""Writes a data set's folder so that it never looks complete and is not.

Everything is written in `DIR/.preparing/`, which the loader does not look into. When all of it is on disk, `commit`
moves the shards up and then `meta.json`, each by rename. What a killed run leaves behind, the next one knows and
removes: the subfolder, and the files that `commit.json` in it lists.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_engine.train.errors import InputError
from moe_engine.train.shards import is_file_name

META = "meta.json"
_STAGING = ".preparing"
_PLAN = "commit.json"
_LOCK = "lock"
_SHARD_SUFFIXES = (".npy", ".bin")


class DatasetFolder:
    """A context manager: on leaving without `commit`, everything it made is removed again.

    Raises (on entering):
        InputError: the folder holds a finished data set and `overwrite` is false, or token files that `moe-prepare`
            did not write, or another `moe-prepare` is at work there.
    """

    def __init__(self, path: Path, overwrite: bool):
        self.path = path
        self.staging = path / _STAGING
        self._overwrite = overwrite
        self._made: list[Path] = []  # folders, innermost first
        self._lock: BinaryIO | None = None

    def __enter__(self) -> "DatasetFolder":
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out_dir {self.path}: is a file, expected a folder")
        if self.staging.is_symlink():  # what is in there will be removed
            raise InputError(f"--out_dir {self.path}: {self.staging} is a link; remove it")
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.staging / _LOCK, "wb")
        except OSError as error:
            self._leave()
            raise InputError(f"--out_dir {self.path}: cannot write there ({error.strerror})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise InputError(f"--out_dir {self.path}: another moe-prepare is writing there") from None
        except OSError:
            pass  # some network file systems have no locks: there, two runs into one folder are the user's to avoid
        try:
            self._remove_leftovers()
            self._check()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._leave()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"--out_dir {self.path}: no space left on the device; what was written has been removed"
            ) from None

    def commit(self, meta: dict[str, Any]) -> None:
        """Move the staged shards that `meta` lists, then `meta` itself, into place; an old data set goes first."""
        names = [shard["file"] for shard in meta["shards"]]
        old = _shards_of(self.path / META)
        _write_json(self.staging / META, meta)
        _write_json(self.staging / _PLAN, sorted({*old, *names}))
        (self.path / META).unlink(missing_ok=True)
        _sync_folder(self.path)
        for name in old:
            (self.path / name).unlink(missing_ok=True)
        for name in names:
            (self.staging / name).rename(self.path / name)
        _sync_folder(self.path)
        (self.staging / META).rename(self.path / META)
        _sync_folder(self.path)
        self._made = []

    def _remove_leftovers(self) -> None:
        """What a run that did not end, a killed one or this, has written."""
        plan = self.staging / _PLAN
        # With a meta.json the folder is whole: the moving had not begun, or had ended.
        if plan.exists() and not (self.path / META).exists():
            for name in _listed(plan, lambda names: names):
                (self.path / name).unlink(missing_ok=True)
        for entry in self.staging.iterdir():
            if entry.name != _LOCK:
                entry.unlink()

    def _check(self) -> None:
        meta = self.path / META
        if meta.exists() and not self._overwrite:
            raise InputError(f"--out_dir {self.path}: holds a finished data set; give --overwrite or another folder")
        own = set(_shards_of(meta))
        foreign = sorted(p.name for p in self.path.iterdir() if p.suffix in _SHARD_SUFFIXES and p.name not in own)
        if foreign:
            raise InputError(
                f"--out_dir {self.path}: holds token files that moe-prepare did not write ({', '.join(foreign[:3])}"
                f"{', …' if len(foreign) > 3 else ''}); give another folder"
            )

    def _leave(self) -> None:
        if self.staging.is_dir():
            self._remove_leftovers()
            shutil.rmtree(self.staging)
        if self._lock is not None:
            self._lock.close()
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # somebody put something there meanwhile
                return


class ShardWriter:
    """Cuts one split's token stream into files of at most `shard_tokens` tokens (0: no limit), with their checksums.

    A context manager, so that no file stays open after an error; `close` is what ends the last file properly.

    Args:
        folder: where the files go.
        pattern: the file name with one `{}` for the number of the shard, or with none for a single file.
        split: "train" or "val".
        dtype: uint16 or uint32, written little-endian.
        shard_tokens: tokens per file.
    """

    def __init__(self, folder: Path, pattern: str, split: str, dtype: str, shard_tokens: int):
        self._folder, self._pattern, self._split = folder, pattern, split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._limit = shard_tokens
        self._file: BinaryIO | None = None
        self._written = 0
        self._digest = hashlib.sha256()
        self.shards: list[dict[str, Any]] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk, met again
                self._file.close()

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens `(n)`, opening and closing files as needed."""
        while len(tokens):
            if self._file is None:
                self._open()
            part = tokens[: self._limit - self._written] if self._limit else tokens
            self._put(np.ascontiguousarray(part, dtype=self._dtype).data.cast("B"))
            self._written += len(part)
            tokens = tokens[len(part) :]
            if self._written == self._limit:
                self.close()

    def close(self) -> None:
        """Finish the file at hand: header, disk, record."""
        if self._file is None:
            return
        name = os.path.basename(self._file.name)
        if self._is_npy and self._written != self._limit:  # the header promised a full shard
            self._file.seek(0)
            self._file.write(self._header(self._written))
            self._file.flush()
            with open(self._file.name, "rb") as file:
                self._digest = hashlib.file_digest(file, "sha256")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        record = {"file": name, "split": self._split, "tokens": self._written, "sha256": self._digest.hexdigest()}
        self.shards.append(record)

    def _open(self) -> None:
        path = self._folder / self._pattern.format(f"{len(self.shards):06d}")
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._written, self._digest = 0, hashlib.sha256()
        if self._is_npy:
            self._put(self._header(self._limit))

    @property
    def _is_npy(self) -> bool:
        return self._pattern.endswith(".npy")

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)

    def _header(self, tokens: int) -> bytes:
        # numpy pads the header so that the length may grow: it has the same size for every number of tokens.
        header = io.BytesIO()
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": (tokens,)}
        np.lib.format.write_array_header_1_0(header, description)
        return header.getvalue()


def _shards_of(meta: Path) -> list[str]:
    """The files that a meta.json of ours lists; none if it is another's or unreadable."""
    return _listed(meta, lambda table: [shard["file"] for shard in table["shards"]])


def _listed(path: Path, names: Callable[[Any], Any]) -> list[str]:
    """The files that a JSON file names; none if it cannot be read or is another's."""
    try:
        return _names(names(json.loads(path.read_text())))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def _names(names: Iterable[str]) -> list[str]:
    """Only plain shard names: nothing outside the folder is ever removed, whatever a file says."""
    return [
        name
        for name in names
        if os.path.basename(name) == name and name.endswith(_SHARD_SUFFIXES)
        if is_file_name(name)
    ]


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
