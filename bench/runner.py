"""Timing that can be compared, and rows that say where they are from.

A row is one result as a JSON object:

    benchmark, name    what was measured; `name` is one of the things that a run compares
    settings           shape, dtype and options: two rows are of the same thing when these three are equal
    p20, p50, p80      seconds, with `rounds` of them; `band` is how far p50 may be off when it is measured again
    …                  what else was found: bytes, FLOPs, ratios
    device, threads, versions, commit (`+`: and changes), time

Rows are only ever added to a file; the newest one of a thing counts.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_engine.train.device import device_name
from moe_engine.train.environment import git_commit, versions
from moe_engine.train.errors import InputError

LEAST_BAND = {"cpu": 0.08, "cuda": 0.05}
"""A median of one run is not known better than this, however little its rounds differ: clocks and neighbours change. On
a CPU what two runs in a row differed by; a GPU's is assumed, not found."""
PACKAGES = ("moe-engine", "torch", "triton", "numpy", "transformers")
WRITTEN = ("bench/results", "docs")
"""Folders that results are written to: they do not make the code another one."""
CPU = torch.device("cpu")


class Timer:
    """Seconds of a call: by the clock on a CPU; by events on a GPU, with its L2 cache emptied before.

    Emptying takes longer than the launches after it, so that the host is ahead when the first event is reached: some
    4 GB are written, a millisecond, since a dozen launches from Python take a few hundred microseconds.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            size = max(4 * cache, 1 << 28)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)
            self._times = max(1, (1 << 32) // size)

    def __call__(self, function: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            function()
            return time.perf_counter() - begin
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self._times):
            self._flush.zero_()
        begin_event.record()
        function()
        end_event.record()
        torch.cuda.synchronize(self.device)
        return begin_event.elapsed_time(end_event) / 1e3


def interleave(
    functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2, device: torch.device = CPU
) -> dict[str, np.ndarray]:
    """Seconds of each function in each round, all of them in turn in every round.

    What disturbs the machine for a while then disturbs all of them.
    """
    timer = Timer(device)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            took = timer(function)
            if number >= warmup:
                seconds[name].append(took)
    return {name: np.array(values) for name, values in seconds.items()}


@functools.cache  # the code of a process is the one that it began with
def _commit() -> str | None:
    code = git_commit(WRITTEN)
    return None if code is None else code["commit"] + ("+" if code["changed"] else "")


def stamp(device: torch.device | str) -> dict[str, Any]:
    """Where and when a result was found.

    Args:
        device: what computed it, or words for it where nothing ran on a device.
    """
    return {
        "device": device if isinstance(device, str) else device_name(device),
        "threads": torch.get_num_threads() if device == CPU else None,
        "versions": versions(*PACKAGES),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def quantiles(seconds: np.ndarray, device: torch.device) -> dict[str, float]:
    """20th, 50th and 80th percentile, the band and the number of rounds, as a row has them."""
    p20, p50, p80 = (float(p) for p in np.percentile(seconds, (20, 50, 80)))
    band = max(LEAST_BAND[device.type], p80 / p50 - 1, 1 - p20 / p50)
    return {"p20": p20, "p50": p50, "p80": p80, "band": band, "rounds": len(seconds)}


def changed(config: Any, *names: str) -> dict[str, Any]:
    """Settings of a run (`TrainConfig`) that are not what they are by default: overrides of the model, and of `names`.

    Left out where they are the default, so that rows which did not tell them apart stay comparable.
    """
    defaults = {f.name: f.default for f in fields(config)}
    found = {name: getattr(config, name) for name in names if getattr(config, name) != defaults[name]}
    model = {name: value for name, value in asdict(config.model).items() if value is not None}
    return found | ({"model": model} if model else {})


def make_row(
    benchmark: str,
    name: str,
    settings: Mapping[str, Any],
    device: torch.device | str = CPU,
    seconds: np.ndarray | None = None,
    **values: Any,
) -> dict[str, Any]:
    """One result.

    Args:
        benchmark: the subcommand.
        name: what was measured.
        settings: everything that has to be equal for two results to be comparable, device and versions apart.
        device: see `stamp`.
        seconds: of each round; None where nothing was timed.
        values: what was found.
    """
    if seconds is not None and isinstance(device, str):
        raise ValueError(f"device: expected the one that took these seconds, got {device!r}")
    timed = {} if seconds is None else quantiles(seconds, device)
    return {"benchmark": benchmark, "name": name, "settings": dict(settings), **timed, **values, **stamp(device)}


def check_writable(**files: str | None) -> None:
    """Find out before a measurement, and not after it, whether its results can be written; leaves no file behind.

    Args:
        files: option → what was given for it.
    Raises:
        InputError: one of them cannot be written.
    """
    for name, file in files.items():
        if not file:
            continue
        is_new = not os.path.lexists(file)
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a"):
                pass
            if is_new:
                os.unlink(file)
        except OSError as error:
            raise InputError(f"--{name}: expected a file that can be written, got {file} ({error.strerror})") from None


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add results to a JSONL file, all in one write: who is stopped leaves no half of a line.

    Raises:
        InputError: the file cannot be written.
    """
    text = "".join(json.dumps(r) + "\n" for r in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)
    except OSError as error:
        raise InputError(f"{path}: expected a file that results can be added to, got {error.strerror}") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, oldest first.

    Raises:
        InputError: there is no such file, it cannot be read, or a line is no row.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a JSONL file of results, found none")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a JSONL file of results, got {type(error).__name__}") from None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows.append(json.loads(line))
            complete = all(key in rows[-1] for key in ("benchmark", "name", "settings", "device", "time"))
        except (ValueError, TypeError, RecursionError):
            complete = False
        if not complete:
            raise InputError(f"{path}, line {number}: expected a result of moe-bench, got {line[:60]!r}")
    return rows


def identity(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a row is a result of."""
    return row["benchmark"], row["name"], json.dumps(row["settings"], sort_keys=True)


def newest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each thing and device, in the order of their first appearance."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for r in rows:
        found[*identity(r), r["device"]] = r
    return list(found.values())
