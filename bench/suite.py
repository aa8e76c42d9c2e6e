"""Subcommands one after the other, within a time, into one folder: what `moe-bench all` and `moe-bench gpu` share.

Each is a process of its own, so that none sees what another one left, with its own limit; what it has written by then
counts. In the folder are `results.json`, with all rows and how each step ended, a PNG a step, and REPORT.md with
pictures of its own. Status 1 if a step failed or was cut off.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_engine.bench.runner import read_rows, stamp
from moe_engine.train.errors import InputError

PYTHON = (sys.executable, "-P")
"""Without the current folder: a file in it that is called as a package would be taken for the package."""
GRACE = 10.0
"""Seconds that a process has to write what it has, after it was asked to stop."""


@dataclass(frozen=True)
class Step:
    """A command of the list.

    Attributes:
        name: of the subcommand.
        arguments: for it.
        seconds: it may take at most.
        picture: whether it draws one.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    picture: bool = True


@dataclass
class Ended:
    """How a step ended: its status, None when it was cut off, and the seconds that it took."""

    name: str
    status: int | None
    seconds: float
    note: str = ""

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.status is None:
            return "cut off"
        return "ok" if self.status == 0 else f"status {self.status}"


def run_process(command: Sequence[str], seconds: float) -> int | None:
    """Status of a process; None if it did not end in time, was asked to stop, and then had `GRACE`."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        for request in (signal.SIGINT, signal.SIGKILL):  # also on Ctrl-C here
            if process.poll() is None:
                os.killpg(process.pid, request)
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    continue


def run_step(step: Step, out: Path, seconds: float) -> Ended:
    """Run a step, for so many seconds at most."""
    command = [*PYTHON, "-m", "moe_engine.bench", step.name, *step.arguments]
    command += ["--output", str(out / "rows" / f"{step.name}.jsonl")]
    command += ["--picture", str(out / f"{step.name}.png")] if step.picture else []
    print(f"\n== moe-bench {' '.join((step.name, *step.arguments))}", flush=True)
    begin = time.perf_counter()
    status = run_process(command, min(step.seconds, seconds))
    return Ended(step.name, status, time.perf_counter() - begin)


def open_folder(folder: str) -> Path:
    """The folder for what is found, which is new or empty."""
    out = Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: expected a new or an empty folder")
    (out / "rows").mkdir(parents=True)
    return out


def finish(out: Path, ended: list[Ended], device: torch.device) -> int:
    """Report, one JSON of everything, a summary; returns the exit status."""
    report = [*PYTHON, "-m", "moe_engine.bench", "report", "--results", str(out / "rows"), "--out", str(out)]
    begin = time.perf_counter()
    ended.append(Ended("report", run_process(report, 60), time.perf_counter() - begin))
    rows: list[dict[str, Any]] = []
    for path in sorted((out / "rows").glob("*.jsonl")):
        rows += read_rows(path)
    steps = [{"name": e.name, "status": e.status, "seconds": round(e.seconds, 1), "note": e.note} for e in ended]
    results = json.dumps({"steps": steps, **stamp(device), "rows": rows}, indent=1)
    (out / "results.json").write_text(results + "\n", encoding="utf-8")
    print(f"\n{'step':14}{'s':>6}  ended")
    for e in ended:
        print(f"{e.name:14}{e.seconds:6.0f}  {e.verdict}" + (f": {e.note}" if e.note else ""))
    print(f"{out / 'results.json'}: {len(rows)} rows")
    return int(any(e.status != 0 for e in ended))
