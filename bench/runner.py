"""Timing that can be compared, and rows that say where they are from."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_engine.train.device import device_name


def interleave(functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, np.ndarray]:
    """Seconds of each function in each round, all of them in turn in every round.

    What disturbs the machine for a while then disturbs all of them. CPU only: nothing is synchronised.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return {name: np.array(values) for name, values in seconds.items()}


def row(benchmark: str, name: str, seconds: np.ndarray, **values: Any) -> dict[str, Any]:
    """One result: what was measured, on what, and its 20th, 50th and 80th percentile in seconds."""
    p20, p50, p80 = (float(p) for p in np.percentile(seconds, (20, 50, 80)))
    versions = {package: metadata.version(package) for package in ("moe-engine", "torch", "numpy", "transformers")}
    return {
        "benchmark": benchmark,
        "name": name,
        **values,
        "p20": p20,
        "p50": p50,
        "p80": p80,
        "rounds": len(seconds),
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add results to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
