"""What the checks of `moe-doctor` have in common: their result, how one is run, and what they look at.

A check's body gets the `Setup` and returns an `Outcome`. It may raise InputError, which is a FAIL with that message,
or `NotChecked`, where another check's FAIL stands in the way. No check can hide the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from moe_engine.config import ModelConfig
from moe_engine.train.config import TrainConfig
from moe_engine.train.errors import InputError
from moe_engine.train.shards import Meta, Shard, Split, find_shards, read_meta, read_shard
from moe_engine.train.tokenizer import Tokenizer, load_tokenizer

Status = Literal["PASS", "WARN", "FAIL"]


class NotChecked(Exception):
    """A check cannot be made; the message says what stands in the way."""


class Outcome(NamedTuple):
    """What a check found; `remedy` is one line, empty for PASS."""

    status: Status
    found: str
    remedy: str = ""


def passed(found: str) -> Outcome:
    """All is well."""
    return Outcome("PASS", found)


def warn(found: str, remedy: str) -> Outcome:
    """Training can start, and the user should know this."""
    return Outcome("WARN", found, remedy)


def fail(found: str, remedy: str) -> Outcome:
    """Training cannot start, or would go wrong."""
    return Outcome("FAIL", found, remedy)


@dataclass(frozen=True)
class Result:
    """The outcome of a check, with its name."""

    name: str
    status: Status
    found: str
    remedy: str


@dataclass(frozen=True)
class Check:
    """One check. `remedy` is for the InputErrors of its body."""

    name: str
    body: Callable[[Setup], Outcome]
    remedy: str = ""

    def run(self, setup: Setup) -> Result:
        """The result; whatever goes wrong in the body is part of it."""
        try:
            outcome = self.body(setup)
        except NotChecked as obstacle:
            outcome = warn(f"not checked: {obstacle}", "put that right and run moe-doctor again")
        except InputError as error:
            outcome = fail(str(error), self.remedy)
        except Exception as error:  # a broken driver or library may raise anything, and the next check must still run
            message = (str(error).splitlines() or [""])[0]
            outcome = fail(f"{type(error).__name__}: {message}", self.remedy or "unforeseen: report this line")
        return Result(self.name, *outcome)


class Setup:
    """The run that is looked at: its configuration, machine and data, each read once.

    Attributes:
        config: what `moe-train` would run with.
        deep: whether to read every byte of the data.
        memory: whether to estimate the memory of a step.
        devices: the visible GPUs; empty where a CPU would train.
        meta: the contents of meta.json; where `meta_error` is not None, a stand-in that lets the .npy shards be
            looked at all the same.
    """

    def __init__(self, config: TrainConfig, deep: bool = False, memory: bool = False) -> None:
        self.config, self.deep, self.memory = config, deep, memory
        self.data_dir = Path(config.data_dir)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self.devices = [torch.device("cuda", i) for i in range(count)]
        self.meta_error: InputError | None = None
        self._shards: dict[Split, tuple[list[Shard], list[str]]] = {}
        try:
            self.meta = read_meta(self.data_dir)
        except InputError as error:
            self.meta_error = error
            self.meta = self._stand_in()

    @property
    def device(self) -> torch.device:
        """The first GPU, or the CPU."""
        return self.devices[0] if self.devices else torch.device("cpu")

    @property
    def ranks(self) -> int:
        """Data-parallel processes on this machine."""
        return max(1, len(self.devices))

    @cached_property
    def preset_model(self) -> ModelConfig:
        """The preset's own model."""
        return self.config.model_config(1)

    @cached_property
    def model(self) -> ModelConfig:
        """The preset's model with room for the data's vocabulary."""
        return self.config.model_config(self.meta.vocab_size)

    @cached_property
    def _tokenizer(self) -> Tokenizer | InputError:
        # A failure is kept too: without an answer from the network it takes a minute.
        try:
            return load_tokenizer(self.meta.tokenizer)
        except InputError as error:
            return error

    @property
    def tokenizer(self) -> Tokenizer:
        """That of meta.json. Raises InputError; NotChecked where meta.json names none."""
        if self.meta_error:
            raise NotChecked("meta.json cannot be read")
        if isinstance(self._tokenizer, InputError):
            raise self._tokenizer
        return self._tokenizer

    def tokenizer_if_any(self) -> Tokenizer | None:
        """The same, None where it cannot be had."""
        return None if self.meta_error or isinstance(self._tokenizer, InputError) else self._tokenizer

    def shards(self, split: Split) -> tuple[list[Shard], list[str]]:
        """The readable shards of a split, and what is wrong with each of the others.

        Raises InputError when the folder has no files of the split; NotChecked when it cannot be looked into.
        """
        if split not in self._shards:
            names = self._names(split)
            readable, errors = [], []
            for name in names:
                try:
                    readable.append(read_shard(self.data_dir, name, self.meta))
                except InputError as error:
                    errors.append(str(error))
            self._shards[split] = readable, errors
        return self._shards[split]

    def readable(self, split: Split) -> list[Shard]:
        """The readable shards of a split, at least one; NotChecked when there are none."""
        try:
            shards = self.shards(split)[0]
        except InputError:
            shards = []
        if not shards:
            raise NotChecked(f"no {split} shard can be read")
        return shards

    def _names(self, split: Split) -> list[str]:
        if self.meta_error and not _has_entries(self.data_dir):
            raise NotChecked("the data folder cannot be read")
        names = find_shards(self.data_dir, split, self.meta)
        if self.meta_error and not names[0].endswith(".npy"):
            raise NotChecked(f"{names[0]} has no header of its own, and meta.json cannot be read")
        return names

    def _stand_in(self) -> Meta:
        """For want of a meta.json: the preset's vocabulary, and the dtype of the first .npy file that can be read."""
        dtype = np.dtype(np.uint16)
        for path in sorted(self.data_dir.glob("*.npy")):
            try:
                dtype = np.lib.format.open_memmap(path, mode="r").dtype  # nothing but .npy, whatever its name says
                break
            except (OSError, ValueError, EOFError):
                continue  # what is wrong with it is for the check of the shards to say
        return Meta("", self.preset_model.vocab_size, "", dtype, None, None)


def _has_entries(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False
