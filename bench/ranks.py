"""One benchmark on several numbers of processes, one number after the other."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_engine.bench.checks import WRONG, WrongResult
from moe_engine.bench.runner import read_rows
from moe_engine.train.errors import InputError

SHARED_CORES = "all ranks share the same cores, so n ranks can be expected to have an efficiency of 1/n"


def arguments(given: Mapping[str, Any]) -> list[str]:
    """A command line from what `train.cli.parse` made of one."""
    flags = []
    for name, value in given.items():
        if isinstance(value, Mapping):
            flags += [f"--{name}.{flag[2:]}" for flag in arguments(value)]
        else:
            text = str(value).lower() if isinstance(value, bool) or value is None else str(value)
            flags.append(f"--{name}={text}")
    return flags


def check_counts(counts: Sequence[int], on_gpu: bool) -> None:
    """Raise InputError unless there can be that many processes."""
    for count in counts:
        if count < 1:
            raise InputError(f"--ranks: expected at least 1, got {count}")
        if on_gpu and count > torch.cuda.device_count():
            raise InputError(f"--ranks: expected at most the {torch.cuda.device_count()} GPUs there are, got {count}")


def over_ranks(module: str, counts: Sequence[int], given: Mapping[str, Any], on_gpu: bool) -> list[dict[str, Any]]:
    """Run a module under torch.distributed.run on each number of processes; returns the rows that it wrote.

    On a CPU the processes share the threads of this one.

    Args:
        module: takes the options given, and `--output`.
        counts: numbers of processes.
        given: its options.
        on_gpu: whether each process has a GPU.
    Raises:
        InputError, WrongResult: what a process ended with.
        RuntimeError: it failed otherwise.
    """
    rows = []
    for count in counts:
        environment = dict(os.environ)
        if not on_gpu:
            environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // count))
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "rows.jsonl"
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
            command = [*launcher, "-m", module, *arguments({**given, "output": str(output)})]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if output.is_file():  # also where a target was missed, which is no success either
                rows += read_rows(output)
                continue
        errors = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        if errors:
            raise WrongResult(errors[0].removeprefix(WRONG)) if errors[0].startswith(WRONG) else InputError(errors[0])
        raise RuntimeError(f"{count} processes failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    return rows


def add_efficiency(rows: Sequence[dict[str, Any]]) -> None:
    """Tell every row what its processes gain: tokens per second over those of the first row's for as many."""
    first = rows[0]["tokens_per_second"] / rows[0]["settings"]["ranks"]
    for row in rows:
        row["efficiency"] = row["tokens_per_second"] / (first * row["settings"]["ranks"])
