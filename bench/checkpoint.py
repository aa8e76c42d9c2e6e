"""Checkpoints: what training waits for, what writing costs the steps beside it, bandwidth, loading.

    moe-bench checkpoint --preset small --out_dir FOLDER      FOLDER: on the disk that is to be measured

One process takes real steps of `moe-train` and saves with its `Checkpoints`. Before anything is timed, a checkpoint is
written while training goes on, found without a defect, and loaded over weights and moments that were spoilt: they have
to be what they were when the save began, bit for bit. A round is then a step with nothing beside it; a save, with steps
until it is on the disk and published; a save with --async_save off; loading, of files that the system was told to
forget. A save prunes the one before it.

The share of training time that saving costs is derived from these: the stall and the slowdown of the steps beside the
writing, over `save_every` steps, which is the preset's unless it is given. Options about learning rate, logs and
samples change nothing here; --async_save is measured both ways.

Exit status: 0 all well; 1 a wrong checkpoint, or saving costs more than its target; 2 a bad option.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from torch import Tensor

from moe_engine.bench import steps
from moe_engine.bench.checks import WRONG, WrongResult
from moe_engine.bench.plan import Plan, make_plan, settings_of
from moe_engine.bench.runner import append_rows, check_writable, make_row
from moe_engine.bench.targets import SAVING_SHARE
from moe_engine.train import memory, parallel, storage
from moe_engine.train.checkpoint import Checkpoints, Published, state_tensors
from moe_engine.train.cli import guarded, parse
from moe_engine.train.config import TrainConfig
from moe_engine.train.errors import InputError
from moe_engine.train.options import option
from moe_engine.train.parallel import World

STEP, BESIDE, STALL = "step", "step beside a write", "stall"
WRITE, SYNC, LOAD = "begin to durable", "stall with async_save off", "load"
ROUNDS = 5
SHARES = {STALL: "share of training time", SYNC: "share of training time, async_save off"}
PARTS = {
    (storage.Staging, "write_data"): "copy",
    (storage, "save_file"): "write",
    (storage, "sync_file"): "fsync",
    (storage, "sha256_of"): "checksum",
}
"""Functions of a save → the part of it that their time is."""


@dataclass(frozen=True)
class Flags(TrainConfig):
    """`TrainConfig`, and how to measure."""

    config: str | None = option(None, "TOML file with options of moe-train")
    out_dir: str = option(".", "folder on the disk to measure; what is written there is removed")
    rounds: int = option(ROUNDS, "measurements of each")
    output: str | None = option(None, "JSONL file to append the rows to")


class Clock:
    """Seconds of the parts of saves, and a gate that keeps a write from beginning."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.gate = threading.Event()
        self.gate.set()

    def take(self) -> dict[str, float]:
        """Those since the last call."""
        found, self.seconds = self.seconds, {}
        return found

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """With `PARTS` timed."""
        with contextlib.ExitStack() as stack:
            for (owner, name), part in PARTS.items():
                stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name), part)))
            yield

    def _timed(self, function: Any, part: str) -> Any:
        def timed(*args: Any) -> Any:
            if part == "write":
                self.gate.wait()
            begin = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin

        return timed


class Bench:
    """A trainer and its checkpoints.

    Args:
        plan: what is to be trained.
        folder: for the checkpoints.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.config, self.clock = plan.config, Clock()
        self.ours = steps.Ours(steps.OURS, plan.config, plan.world, plan.device)
        self.trainer = self.ours.trainer
        self.model, self.optimizer, self.device = self.trainer.model, self.trainer.engine.optimizer, plan.device
        self.beside, self.alone = (Checkpoints(folder, plan.world, 1, asynchronous) for asynchronous in (True, False))

    def step(self) -> float:
        """Seconds of a step."""
        begin = time.perf_counter()
        self.ours()
        return time.perf_counter() - begin

    def begin(self, checkpoints: Checkpoints) -> float:
        """Begin a save; returns seconds until training may go on."""
        begin = time.perf_counter()
        position = {"loader": self.trainer.position, "arguments": asdict(self.config)}
        state = {"iteration": self.trainer.iteration, **position}
        checkpoints.save(self.model, self.optimizer, state, self.device)
        return time.perf_counter() - begin

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments, as they are."""
        return state_tensors(self.model, self.optimizer)

    # What is checked

    def first_save(self) -> float:
        """Save while training goes on and hold what comes back against what was to be saved.

        Returns:
            The seconds that training waited.
        Raises:
            WrongResult: it is something else.
        """
        saved = {name: tensor.clone() for name, tensor in self.tensors().items()}
        self.clock.gate.clear()  # the step that follows changes what only a copy keeps
        try:
            self.begin(self.beside)
            self.step()
        finally:
            self.clock.gate.set()
        published = self.beside.finish()
        self.check(self.beside, published.path, saved)
        self.begin(self.alone)
        saved = {name: tensor.clone() for name, tensor in self.tensors().items()}
        self.check(self.alone, self.alone.finish().path, saved)
        return published.stall_seconds

    def check(self, checkpoints: Checkpoints, path: Path, saved: dict[str, Tensor]) -> None:
        """Load a checkpoint over spoilt tensors. Raises WrongResult if they are then not `saved`."""
        if (defect := checkpoints.defect(path)) is not None:
            raise WrongResult(f"checkpoint {path.name}: {defect}: no time")
        for tensor in self.tensors().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        checkpoints.load(path, self.model, self.optimizer, self.device)
        found = self.tensors()
        if wrong := [name for name, tensor in saved.items() if not _same_bits(found.get(name), tensor)]:
            raise WrongResult(
                f"checkpoint {path.name}: {wrong[0]} does not come back as it was saved ({len(wrong)} of {len(saved)} "
                "tensors): no time"
            )

    # What is measured

    def round(self) -> tuple[dict[str, float], dict[str, dict[str, float]], int]:
        """Seconds of everything, and of its parts; bytes of a checkpoint."""
        seconds, parts = {STEP: self.step()}, {}
        self.clock.take()
        begun, published = self.begin(self.beside), None
        beside, publishing = [], 0.0
        while published is None:
            beside.append(self.step())
            if not self.beside.writing:
                begin = time.perf_counter()
                published = self.beside.settle()
                publishing = time.perf_counter() - begin
        split = self.clock.take()
        self.beside.finish()  # what was pruned is gone
        parts[STALL] = {"plan": begun - split["copy"], "copy": split.pop("copy"), "publish": publishing}
        parts[WRITE] = split
        slower = sum(beside) - len(beside) * seconds[STEP]
        seconds |= {STALL: begun + publishing, WRITE: published.write_seconds, BESIDE: float(np.mean(beside))}
        seconds |= {"slowdown": slower, "steps": len(beside)}
        seconds[SYNC], parts[SYNC], published = self.save_alone()
        seconds[LOAD], parts[LOAD] = self.load(published.path)
        return seconds, parts, published.bytes

    def save_alone(self) -> tuple[float, dict[str, float], Published]:
        """Save with training waiting for all of it."""
        begin = time.perf_counter()
        self.begin(self.alone)
        writing = time.perf_counter()
        published = self.alone.finish()
        end = time.perf_counter()
        split = self.clock.take()
        plan = writing - begin - sum(split.get(part, 0.0) for part in PARTS.values())
        return end - begin, {"plan": plan, **split, "publish": end - writing}, published

    def load(self, path: Path) -> tuple[float, dict[str, float]]:
        """Checksums, which read from the disk, and then the tensors."""
        for file in path.iterdir():
            _drop(file)
        begin = time.perf_counter()
        defect = self.alone.defect(path)
        read = time.perf_counter()
        if defect is not None:
            raise WrongResult(f"checkpoint {path.name}: {defect}: no time")
        self.alone.load(path, self.model, self.optimizer, self.device)
        self.wait()
        end = time.perf_counter()
        self.clock.take()
        return end - begin, {"checksum": read - begin, "read": end - read}

    def close(self) -> None:
        """Have nothing on its way any more."""
        with contextlib.suppress(OSError):  # which has been told
            self.beside.finish()
        self.ours.close()

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _same_bits(a: Tensor | None, b: Tensor) -> bool:
    if a is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return torch.equal(*bits)


def _drop(file: Path) -> None:
    """Have the system forget its copy of a file that is on the disk, where it can be told to."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_of(folder: Path) -> str:
    """The kind of file system that a folder is on."""
    path = str(folder.resolve())
    mounts = [m for m in psutil.disk_partitions(all=True) if Path(path).is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else "unknown"


def share(stall: float, slowdown: float, step: float, save_every: int) -> dict[str, Any]:
    """What saving costs of training time, derived from what was measured, and whether that is within its target.

    Args:
        stall: seconds that training waits for one checkpoint.
        slowdown: seconds that the steps beside its writing take longer, all of them together; below 0, which only noise
            can be, counts as 0.
        step: seconds of a step.
        save_every: steps to a checkpoint.
    """
    found = (stall + max(slowdown, 0.0)) / (save_every * step)
    verdict = "PASS" if found < SAVING_SHARE else "FAIL"
    return {"derived": True, "share": found, "target": SAVING_SHARE, "verdict": verdict}


def _rows(plan: Plan, disk: str, first: float, rounds: list[Any], size: int) -> list[dict[str, Any]]:
    of = settings_of(plan) | {"save_every": plan.config.save_every, "disk": disk}
    of |= {"cold": hasattr(os, "posix_fadvise")}
    seconds = {name: np.array([found[name] for found, _ in rounds]) for name in rounds[0][0]}
    split = {
        name: {part: float(np.median([parts[name].get(part, 0.0) for _, parts in rounds])) for part in found}
        for name, found in rounds[0][1].items()
    }
    middle = {name: float(np.median(values)) for name, values in seconds.items()}
    values: dict[str, dict[str, Any]] = {name: {} for name in (STEP, BESIDE, STALL, WRITE, SYNC, LOAD)}
    values[STALL] = {"first": first}  # which finds no copy's memory to use again
    # The median of ratios of steps taken side by side, as everywhere.
    values[BESIDE] = {
        "ratio": float(np.median(seconds[BESIDE] / seconds[STEP])),
        "slowdown": middle["slowdown"],
        "steps": middle["steps"],
    }
    for name in (WRITE, SYNC, LOAD):
        values[name] = {"bytes": size, "bandwidth": size / middle[name]}
    rows = [
        make_row("checkpoint", name, of, plan.device, seconds[name], parts=split.get(name), **found)
        for name, found in values.items()
    ]
    for name, slowdown in ((STALL, middle["slowdown"]), (SYNC, 0.0)):
        judged = share(middle[name], slowdown, middle[STEP], plan.config.save_every)
        rows.append(make_row("checkpoint", SHARES[name], of, plan.device, **judged))
    return rows


def measure(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """Check, time; returns the rows.

    Args:
        folder: on the disk that is to be measured.
    Raises:
        WrongResult: a checkpoint is not what was to be saved.
        InputError: it cannot be written there.
    """
    bench = None
    try:
        bench = Bench(plan, folder)
        with bench.clock.running():
            for _ in range(2):
                bench.step()
            first = bench.first_save()
            rounds = [bench.round() for _ in range(plan.rounds)]
        return _rows(plan, disk_of(folder), first, [found[:2] for found in rounds], rounds[-1][2])
    except OSError as error:
        raise InputError(f"--out_dir {folder.parent.parent}: {error.strerror or error}") from None
    except RuntimeError as failure:
        if not memory.ran_out(failure):
            raise
        raise InputError(f"out of memory ({str(failure).splitlines()[0]}); lower --batch_size") from failure
    finally:
        if bench is not None:
            bench.close()
        parallel.stop()


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Tables of times and of the shares."""
    of = rows[0]["settings"]
    print(
        f"{of['preset']}, {of['batch_size']} × {of['block_size']} tokens × {of['grad_accum_steps']} micro-steps, "
        f"{of['dtype']}, {of['optimizer']}, {of['data']}, {rows[0]['device']}, {of['disk']}, save_every "
        f"{of['save_every']}; the checkpoint came back bit for bit"
    )
    print(f"\n{'seconds':28}{'p20':>10}{'p50':>10}{'p80':>10}{'GB':>7}{'GB/s':>7}  of it")
    for row in (row for row in rows if "p50" in row):
        times = "".join(f"{row[p]:10.4f}" for p in ("p20", "p50", "p80"))
        size = f"{row['bytes'] / 1e9:7.2f}{row['bandwidth'] / 1e9:7.2f}" if "bytes" in row else " " * 14
        print(f"{row['name']:28}{times}{size}  {split(row)}")
    for row in (row for row in rows if row.get("derived")):
        print(f"{row['name']} (derived): {row['share']:.3%}, target < {row['target']:.0%}: {row['verdict']}")


def split(row: dict[str, Any]) -> str:
    """What a row's time consists of, in words."""
    if row.get("ratio") is not None:
        return f"{row['ratio']:.2f} × a step; {row['slowdown']:.3g} s over {row['steps']:g} steps"
    first = f"; the first save's {row['first']:.3g}" if "first" in row else ""
    return ", ".join(f"{part} {took:.3g}" for part, took in (row.get("parts") or {}).items()) + first


def _plan(given: dict[str, Any], world: World, folder: Path) -> Plan:
    if "preset" not in given and not given.get("config"):
        given = {**given, "preset": "small"}
    plan = make_plan({**given, "peers": False, "part_steps": 0}, world, folder)
    if plan.micro_steps is not None:  # the share is of steps as they are configured
        plan = replace(plan, config=replace(plan.config, grad_accum_steps=plan.micro_steps), micro_steps=None)
    if plan.config.save_every < 1:
        raise InputError("--save_every: expected at least 1, got 0, which saves once at the end")
    return plan


def checkpoint(given: dict[str, Any]) -> int:
    """Measure as the options given say, print, write; returns the exit status."""
    given, world = dict(given), World.from_environment()
    if world.size > 1:
        raise InputError(f"moe-bench checkpoint: expected one process, got {world.size}")
    output, where = given.pop("output", None), Path(given.pop("out_dir", "."))
    check_writable(output=output)
    given.setdefault("rounds", ROUNDS)
    try:
        where.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix="moe-bench-checkpoint-", dir=where)
    except OSError as error:
        raise InputError(f"--out_dir {where}: expected a folder to write to, got {error.strerror}") from None
    with temporary as folder:
        plan = _plan(given, world, Path(folder))
        rows = measure(plan, Path(folder) / "run")
    print_rows(rows)
    if output:
        append_rows(Path(output), rows)
    return int(any(row.get("verdict") == "FAIL" for row in rows if row["name"] == SHARES[STALL]))


def _body(argv: Sequence[str] | None) -> int:
    try:
        return checkpoint(parse("moe-bench checkpoint", Flags, argv, __doc__ or ""))
    except WrongResult as error:
        print(f"error: {WRONG}{error}", file=sys.stderr)
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return guarded(lambda: _body(argv))


if __name__ == "__main__":
    sys.exit(main())
