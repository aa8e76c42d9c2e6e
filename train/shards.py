"""Token shards on disk: what `meta.json` says, which files make up a split, their headers, sizes and memory maps.

Numpy only; no tokens are read here but through `Shard.map`. What is made of them stands in `data.py`.
"""

import json
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tokenize import TokenError
from typing import Any, Literal

import numpy as np

from moe_engine.train.errors import InputError

Split = Literal["train", "val"]

_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
# The last `_train_` or `_val_` decides, so that a data set called `x_val` can have training shards.
_NPY_NAME = re.compile(r".*_(train|val)_.*\.npy", re.DOTALL)


@dataclass(frozen=True)
class ShardRecord:
    """What meta.json says about one shard."""

    tokens: int
    sha256: str | None


@dataclass(frozen=True)
class Meta:
    """The contents of meta.json.

    `dtype` is the recorded one, else that of the first .npy shard, else the smallest that fits the vocabulary.
    `shards` maps names relative to the data folder to their records; None when meta.json lists no shards.
    """

    tokenizer: str
    vocab_size: int
    dataset: str
    dtype: np.dtype
    eot: int | None
    shards: Mapping[str, ShardRecord] | None


@dataclass(frozen=True)
class Shard:
    """One readable shard: `tokens` values of `dtype` from byte `offset` of the file on."""

    name: str
    path: Path
    dtype: np.dtype
    offset: int
    tokens: int
    sha256: str | None = None

    @property
    def end(self) -> int:
        """The least size in bytes that the file must have."""
        return self.offset + self.tokens * self.dtype.itemsize

    def check_size(self) -> None:
        """InputError when the file has gone or shrunk: reading a map past the end of its file kills the process."""
        try:
            size = os.stat(self.path).st_size
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read any more ({error.strerror})") from error
        if size < self.end:
            raise InputError(f"{self.path}: truncated: {self.tokens} tokens need {self.end} bytes, the file has {size}")

    def map(self) -> np.ndarray:
        """The tokens as a read-only memory map `(tokens,)`. Raises InputError when the file cannot be mapped."""
        self.check_size()
        if self.tokens == 0:  # nothing cannot be mapped
            return np.empty(0, self.dtype)
        try:
            mapped = np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: cannot be mapped into memory ({error})") from error
        if hasattr(mmap, "MADV_RANDOM"):
            # Windows are read in random order: reading ahead would fetch megabytes of a cold file for each of them.
            mapped._mmap.madvise(mmap.MADV_RANDOM)
        return mapped.view(np.ndarray)  # slicing a plain array is several times faster than slicing a np.memmap


def read_meta(data_dir: str | os.PathLike) -> Meta:
    """Reads `data_dir/meta.json`, ours or one with only tokenizer, vocab_size and dataset.

    Raises InputError when the folder or the file is missing, or a value is missing or of the wrong kind.
    """
    folder = _folder(data_dir)
    path = folder / "meta.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; expected a JSON object with tokenizer, vocab_size and dataset") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(data).__name__}")
    vocab_size = _number(path, data, "vocab_size", 1, 2**32)
    shards = _shard_records(path, data["shards"]) if data.get("shards") is not None else None
    if data.get("dtype") is None:
        dtype = _first_npy_dtype(folder, shards) or np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    elif data["dtype"] in _DTYPES:
        dtype = np.dtype(data["dtype"])
    else:
        raise InputError(f"{path}: dtype must be one of {', '.join(_DTYPES)}, got {data['dtype']!r}")
    return Meta(
        tokenizer=_text(path, data, "tokenizer"),
        vocab_size=vocab_size,
        dataset=_text(path, data, "dataset"),
        dtype=dtype,
        eot=_number(path, data, "eot", 0, vocab_size - 1) if data.get("eot") is not None else None,
        shards=shards,
    )


def find_shards(data_dir: str | os.PathLike, split: Split, meta: Meta) -> list[str]:
    """The sorted names of a split's shards: those that meta.json lists, else `*_train_*.npy` or `train.bin`.

    Raises InputError when there are none, or when the folder holds both formats and meta.json lists neither.
    """
    folder = _folder(data_dir)
    names = _names_of_split(folder, meta.shards, split)
    if not names:
        where = f"{folder / 'meta.json'} lists" if meta.shards is not None else "the folder has"
        raise InputError(
            f"--data_dir {folder}: no {split} files; expected *_{split}_*.npy or {split}.bin, and {where} neither"
        )
    if meta.shards is None and f"{split}.bin" in names and len(names) > 1:
        raise InputError(
            f"--data_dir {folder}: both {split}.bin and *_{split}_*.npy are present and meta.json lists no shards;"
            " remove one of the two"
        )
    return names


def read_shard(data_dir: str | os.PathLike, name: str, meta: Meta) -> Shard:
    """Checks one shard's header, size and record in meta.json; reads no tokens.

    Raises InputError when the file is missing, truncated, not one-dimensional, not of `meta.dtype`, or not as long as
    meta.json says.
    """
    path = Path(data_dir) / name
    record = (meta.shards or {}).get(name)
    raw = meta.dtype.newbyteorder("<")  # a .bin has no header that could say otherwise
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            dtype, offset, tokens = _npy_header(path, file) if name.endswith(".npy") else (raw, 0, None)
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing, but listed in meta.json") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if dtype.name != meta.dtype.name:
        raise InputError(f"{path}: expected dtype {meta.dtype} (from meta.json or the first shard), got {dtype}")
    if tokens is None:
        tokens, rest = divmod(size, dtype.itemsize)
        if rest:
            raise InputError(
                f"{path}: {size} bytes is not a whole number of {dtype} tokens ({dtype.itemsize} bytes each);"
                " the file is truncated or meta.json names another dtype"
            )
    shard = Shard(name, path, dtype, offset, tokens, record.sha256 if record else None)
    shard.check_size()
    if record and record.tokens != tokens:
        raise InputError(f"{path}: meta.json lists {record.tokens} tokens, the file has {tokens}")
    return shard


def _folder(data_dir: str | os.PathLike) -> Path:
    folder = Path(data_dir)
    try:
        if not folder.exists():
            raise InputError(f"--data_dir {folder}: no such folder")
        if not folder.is_dir():
            raise InputError(f"--data_dir {folder}: not a folder")
        if not any(folder.iterdir()):
            raise InputError(f"--data_dir {folder}: the folder is empty; expected meta.json and token shards")
    except OSError as error:
        raise InputError(f"--data_dir {folder}: cannot be read ({error.strerror})") from error
    return folder


def _split_of(name: str) -> str | None:
    base = PurePosixPath(name).name
    if base in ("train.bin", "val.bin"):
        return base.removesuffix(".bin")
    match = _NPY_NAME.fullmatch(base)
    return match.group(1) if match and not base.startswith(".") else None


def _names_of_split(folder: Path, shards: Mapping[str, ShardRecord] | None, split: str) -> list[str]:
    names = os.listdir(folder) if shards is None else shards
    return sorted(name for name in names if _split_of(name) == split)


def _first_npy_dtype(folder: Path, shards: Mapping[str, ShardRecord] | None) -> np.dtype | None:
    for name in _names_of_split(folder, shards, "train") + _names_of_split(folder, shards, "val"):
        if name.endswith(".npy"):
            try:
                with open(folder / name, "rb") as file:
                    return _npy_header(folder / name, file)[0]
            except OSError as error:
                raise InputError(f"{folder / name}: cannot be read ({error.strerror})") from error
    return None


def _npy_header(path: Path, file: Any) -> tuple[np.dtype, int, int]:
    """dtype, byte offset of the data and promised number of tokens of an open .npy file."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    except (ValueError, SyntaxError, TokenError, TypeError, RecursionError, MemoryError) as error:  # of literal_eval
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable .npy file ({reason})") from error
    if dtype.name not in _DTYPES:
        raise InputError(f"{path}: expected integer tokens ({', '.join(_DTYPES)}), got dtype {dtype}")
    if len(shape) != 1 or shape[0] < 0:
        raise InputError(f"{path}: expected a one-dimensional array of tokens, got shape {shape}")
    return dtype, file.tell(), shape[0]


def is_file_name(name: str) -> bool:
    """Whether the system can have a file of that name: JSON can hold NUL, and halves of characters."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _text(where: Path | str, data: dict, key: str) -> str:
    if not isinstance(data.get(key), str) or not data[key]:
        raise InputError(f"{where}: {key} must be a non-empty string, got {data.get(key)!r}")
    return data[key]


def _number(where: Path | str, data: dict, key: str, low: int, high: int | None = None) -> int:
    value = data.get(key)
    if type(value) is not int or value < low or (high is not None and value > high):  # JSON's true is an int too
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{where}: {key} must be a whole number {span}, got {value!r}")
    return value


def _shard_records(path: Path, listed: Any) -> dict[str, ShardRecord]:
    """From a list of `{"file", "tokens"}` with, where known, `"split"` and `"sha256"`."""
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise InputError(f"{path}: shards must be a list of objects with file and tokens")
    records: dict[str, ShardRecord] = {}
    for entry in listed:
        name, sha256 = _text(path, entry, "file"), entry.get("sha256")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not is_file_name(name):
            raise InputError(f"{path}: shards: {name!r} must be a path inside the data folder")
        if _split_of(name) is None:
            raise InputError(f"{path}: shards: {name!r} is neither *_train_*.npy, *_val_*.npy, train.bin nor val.bin")
        if entry.get("split", _split_of(name)) != _split_of(name):
            raise InputError(f"{path}: shards: {name} has split {entry['split']!r}, which its name contradicts")
        if name in records:
            raise InputError(f"{path}: shards: {name} is listed twice")
        if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
            raise InputError(f"{path}: shards: {name}: sha256 must be 64 hexadecimal digits, got {sha256!r}")
        records[name] = ShardRecord(_number(f"{path}: shards: {name}", entry, "tokens", 0), sha256)
    return records
