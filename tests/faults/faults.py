"""Every other fault, injected once into a real run: what happened, what was kept, what the message said.

A fault is a function that takes a `Lab`, makes a `Case`, spoils something and says with `case.expect` what has to be
so. Runs are `ranks.Start`s of 18 iterations with a checkpoint every 6; what they are held against is a run of the same
options that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ranks
from ranks import Start

OPTIONS = {"max_iters": 18, "lr_decay_iters": 18, "save_every": 6, "eval_interval": 6, "keep_last_n": 3}
SOON = 60.0  # seconds in which a run that is told to end, or whose other rank has died, has to have ended
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"

FAULTS: dict[str, Callable[[Lab], Case]] = {}


class Skipped(Exception):
    """This machine cannot show it; says why."""


def fault(name: str) -> Callable[[Callable[[Lab], Case]], Callable[[Lab], Case]]:
    def add(function: Callable[[Lab], Case]) -> Callable[[Lab], Case]:
        FAULTS[name] = function
        return function

    return add


class Lab:
    """The folder in which faults are tried, the data, and the runs that nobody disturbed."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.data = ranks.write_data(out / "data")
        self._calm: dict[str, Path] = {}
        self._cases = 0

    def case(self, world: int = 1, **options: Any) -> Case:
        self._cases += 1
        folder = self.out / f"case{self._cases:02d}"
        folder.mkdir()
        return Case(self, folder, world, OPTIONS | options)

    def calm(self, world: int, options: dict[str, Any]) -> Path:
        """The run folder of a finished run with these options."""
        key = json.dumps([world, options], sort_keys=True)
        if key not in self._calm:
            folder = self.out / f"calm{len(self._calm)}"
            folder.mkdir()
            case = Case(self, folder, world, options)
            start = case.start()
            start.wait()
            start.close()
            if start.statuses != [0] * world:
                raise RuntimeError("a run that nobody disturbed failed:\n" + ranks.last_lines(start))
            self._calm[key] = case.out_dir
        return self._calm[key]


@dataclass
class Case:
    """One run folder and what happens to it."""

    lab: Lab
    folder: Path
    world: int
    options: dict[str, Any]
    happened: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    message: str = ""
    unmet: list[str] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    may_leave: bool = False  # names in ckpt/ that no checkpoint has, put aside on purpose

    def __post_init__(self) -> None:
        self.data, self.out_dir = self.lab.data, self.folder / "run"
        self._told: float | None = None

    def own_data(self) -> Path:
        self.data = self.folder / "data"
        shutil.copytree(self.lab.data, self.data)
        return self.data

    def start(self, prepare: Callable[[int], None] | None = None, extra: Any = (), **kwargs: Any) -> Start:
        """Give the run's command."""
        self.out_dir.mkdir(exist_ok=True)
        argv = [*ranks.arguments(self.data, self.out_dir, **self.options), *extra]
        output = self.folder / f"output{len(self.starts)}"
        start = Start(argv, self.out_dir, output, self.world, kwargs.pop("way", "fork"), prepare, **kwargs)
        self.starts.append(start)
        return start

    def expect(self, condition: bool, text: str) -> None:
        if not condition:
            self.unmet.append(text)

    def injected(self) -> None:
        """Time runs from here."""
        self._told = time.monotonic()

    def ended(self, start: Start, *statuses: int, seconds: float = SOON) -> None:
        """Wait for all ranks to end, and hold their statuses against these (one for all of them is enough)."""
        start.wait(seconds)
        took = time.monotonic() - (self._told or start.begun)
        left = start.close()
        expected = list(statuses) * (len(start.processes) if len(statuses) == 1 else 1)
        if left:
            self.happened.append(f"{_ranks(left)} had not ended after {took:.0f} s")
            self.unmet.append("ends by itself")
        else:
            self.happened.append(f"{_statuses(start.statuses)} after {took:.1f} s")
        self.expect(start.statuses == expected, f"{_statuses(expected)}, got {_statuses(start.statuses)}")

    def says(self, *texts: str, start: Start | None = None) -> None:
        """The line in which one of these texts stands, in what any rank of a start (the last one) has printed."""
        start = start or self.starts[-1]
        lines = [line for rank in range(len(start.processes)) for line in start.text(rank).splitlines()]
        for text in texts:
            if found := [line for line in lines if text in line]:
                self.message = self.shorten(found[0])
                return
        errors = [line for line in lines if line.startswith("error: ")]
        errors = errors or [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        self.message = self.shorten(errors[-1] if errors else (lines or ["nothing"])[-1])
        self.unmet.append(f"a line with “{texts[0]}”")

    def shorten(self, line: str) -> str:
        line = re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| ", "", line)
        for path, name in ((self.out_dir, "out_dir"), (self.data, "data_dir"), (self.folder, "…")):
            line = line.replace(str(path), name)
        line = re.sub(r"process \d+ on (host )?[\w.-]+", "process N on HOST", line)
        return re.sub(r"since [\d:T+-]+", "since TIME", line)

    def newest(self, expected: int | None = None) -> int | None:
        """The newest checkpoint, which is what was kept."""
        there = ranks.published(self.out_dir)
        newest = there[-1] if there else None
        self.kept.append(f"checkpoint {newest}" if newest is not None else "no checkpoint")
        if expected is not None:
            self.expect(newest == expected, f"checkpoint {expected} is the newest, got {newest}")
        return newest

    def goes_on(self, bitwise: bool = True, extra: Any = (), logs: bool = True) -> None:
        """The same command again, to the end: as undisturbed?"""
        start = self.start(extra=extra)
        start.wait()
        start.close()
        if start.statuses != [0] * self.world:
            self.kept.append("the same command does not go on")
            errors = [line for line in start.text().splitlines() if line.startswith("error: ")]
            self.unmet.append("the same command goes on: " + self.shorten((errors or ["with a traceback"])[-1]))
            return
        self.same(bitwise, logs, "the same command goes on")

    def same(self, bitwise: bool = True, logs: bool = True, what: str = "the run") -> None:
        """Hold the finished run against one that nobody disturbed."""
        end = self.options["max_iters"]
        if not bitwise:
            self.kept.append(f"{what} to the end")
            self.expect(ranks.published(self.out_dir)[-1:] == [end], f"checkpoint {end} at the end")
            return
        differences = ranks.apart(self.lab.calm(self.world, self.options), self.out_dir, end)
        if not logs:
            differences = [d for d in differences if "records" not in d]
        self.kept.append(f"{what}, bit for bit" if not differences else f"{what}, not as undisturbed")
        self.unmet += [f"as undisturbed: {each}" for each in differences]
        left = [] if self.may_leave else ranks.leftovers(self.out_dir)
        self.unmet += [f"nothing left behind: {name}" for name in left]


def _statuses(statuses: list[int | None]) -> str:
    def text(status: int | None) -> str:
        return f"killed by {signal.Signals(-status).name}" if status is not None and status < 0 else f"status {status}"

    if len(set(statuses)) == 1:
        return text(statuses[0])
    return ", ".join(f"rank {rank} {text(status)}" for rank, status in enumerate(statuses))


def _ranks(numbers: list[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))


def has_option(name: str) -> bool:
    from moe_engine.train.config import TrainConfig

    return any(f.name == name for f in dataclasses.fields(TrainConfig))


# Checkpoints that are not what they were


def _checkpoint(case: Case, iteration: int) -> Path:
    return case.out_dir / "ckpt" / f"step_{iteration:08d}"


def _up_to(case: Case, iteration: int) -> None:
    """Train so far, and no further."""
    start = case.start(extra=[f"--max_iters={iteration}"])
    start.wait()
    start.close()
    if start.statuses != [0] * case.world:
        raise RuntimeError(ranks.last_lines(start))


def _flip(path: Path) -> None:
    """One bit, in the middle."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _damaged(lab: Lab, spoil: Callable[[Path], None]) -> Case:
    """Train to 12, spoil checkpoint 12, go on."""
    case = lab.case()
    case.may_leave = True
    _up_to(case, 12)
    spoil(_checkpoint(case, 12))
    case.happened.append("the next start goes on from checkpoint 6")
    case.goes_on()
    case.says("put aside")
    aside = _checkpoint(case, 12).with_name("step_00000012.damaged").exists()
    case.kept.insert(0, "checkpoint 6, and 12 under another name")
    case.expect(aside, "the damaged one is put aside")
    said = [line for line in case.starts[-1].lines if "resuming from" in line]
    case.expect(bool(said) and "step_00000006" in said[0], "resumes from checkpoint 6")
    return case


@fault("killed while a checkpoint is half-written")
def half_written(lab: Lab) -> Case:
    case = lab.case()
    start = case.start()
    start.until(lambda: any(path.name.startswith("step_00000012.tmp") for path, _ in start.changes))
    start.signal(0, signal.SIGKILL)
    case.injected()
    case.ended(start, -signal.SIGKILL)
    case.expect(any(".tmp" in name for name in ranks.leftovers(case.out_dir)), "it is half-written indeed")
    case.newest(6)
    case.goes_on()
    case.says("never finished")
    return case


@fault("checkpoint: a data file truncated")
def truncated(lab: Lab) -> Case:
    def spoil(folder: Path) -> None:
        file = folder / "ckpt_rank00000.safetensors"
        os.truncate(file, file.stat().st_size // 2)

    return _damaged(lab, spoil)


@fault("checkpoint: one bit of a data file flipped")
def flipped(lab: Lab) -> Case:
    return _damaged(lab, lambda folder: _flip(folder / "ckpt_rank00000.safetensors"))


@fault("checkpoint: one bit of state.json flipped")
def flipped_state(lab: Lab) -> Case:
    return _damaged(lab, lambda folder: _flip(folder / "state.json"))


@fault("checkpoint: one bit of SHA256SUMS flipped")
def flipped_sums(lab: Lab) -> Case:
    return _damaged(lab, lambda folder: _flip(folder / "SHA256SUMS"))


@fault("checkpoint: metadata.json deleted")
def no_metadata(lab: Lab) -> Case:
    return _damaged(lab, lambda folder: (folder / "metadata.json").unlink())


@fault("every checkpoint damaged, then --fresh")
def none_good(lab: Lab) -> Case:
    case = lab.case()
    _up_to(case, 12)
    for iteration in (6, 12):
        _flip(_checkpoint(case, iteration) / "ckpt_rank00000.safetensors")
    before = _listing(case.out_dir / "ckpt")
    start = case.start()
    case.ended(start, 2)
    case.says("no checkpoint that can be used")
    message = case.message
    case.expect(_listing(case.out_dir / "ckpt") == before, "nothing is changed")
    case.kept.append("both, as they are")
    start = case.start(extra=["--fresh"])
    start.wait()
    start.close()
    case.expect(start.statuses == [0], "--fresh starts over")
    case.same(what="with --fresh from the start")
    case.message = message
    return case


def _listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*"))


# Signals


def _signalled(
    lab: Lab, number: int, world: int = 1, rank: int = 0, line: str | None = None, kind: str | None = None, **options
) -> Case:
    """Send a signal after the third iteration, or at a line, and in the midst of what writes records of a kind."""
    case = lab.case(world, **options)
    start = case.start()
    if line is None:
        start.until(lambda: len(start.trained) >= 3)
    else:
        start.until_line(line)
    start.signal(rank, number)
    case.injected()
    case.ended(start, 128 + number)
    case.says(f"stopped by {signal.Signals(number).name}")
    newest = case.newest()
    if kind is None:
        case.expect(newest is not None and newest % 6 != 0, "a checkpoint of the iteration at which it stopped")
    else:
        done = [r["iter"] for r in ranks.records(case.out_dir, kind)]
        case.expect(
            newest == 6 and 6 not in done, f"stopped in the midst of it; records of {done}, checkpoint {newest}"
        )
    case.goes_on()
    message = f"stopped by {signal.Signals(number).name}"
    case.says(message, start=start)
    return case


@fault("SIGTERM to one of two ranks, in a step")
def sigterm(lab: Lab) -> Case:
    return _signalled(lab, signal.SIGTERM, world=2, rank=1)


@fault("SIGINT in a step")
def sigint(lab: Lab) -> Case:
    return _signalled(lab, signal.SIGINT)


@fault("SIGUSR1 in a step")
def sigusr1(lab: Lab) -> Case:
    return _signalled(lab, signal.SIGUSR1)


@fault("SIGHUP in a step")
def sighup(lab: Lab) -> Case:
    return _signalled(lab, signal.SIGHUP)


@fault("SIGTERM to one of two ranks, in an evaluation")
def sigterm_in_evaluation(lab: Lab) -> Case:
    return _signalled(
        lab, signal.SIGTERM, world=2, rank=1, line="iter 6/18 | loss", kind="eval", eval_iters=40, batch_size=1
    )


@fault("SIGUSR1 in an evaluation")
def sigusr1_in_evaluation(lab: Lab) -> Case:
    return _signalled(lab, signal.SIGUSR1, line="iter 6/18 | loss", kind="eval", eval_iters=80, batch_size=1)


@fault("SIGINT in a sample")
def sigint_in_sample(lab: Lab) -> Case:
    from moe_engine.train.errors import InputError
    from moe_engine.train.tokenizer import load_tokenizer

    try:
        load_tokenizer("o200k_base:256")
    except InputError as error:
        raise Skipped(f"no tokenizer: {error}") from None
    return _signalled(lab, signal.SIGINT, line="iter 6/18 | val loss", kind="sample", sample_every=6, sample_tokens=200)


@fault("SIGINT, and again while the iteration lasts")
def second_sigint(lab: Lab) -> Case:
    case = lab.case(grad_accum_steps=60, max_iters=3, lr_decay_iters=3, save_every=1, eval_interval=0)
    start = case.start()
    start.until_line("checkpoint")
    start.signal(0, signal.SIGINT)
    start.pause(0.3)
    start.signal(0, signal.SIGINT)
    case.injected()
    case.ended(start, 130)
    case.says("SIGINT again", "interrupted")
    message = case.message
    case.newest(1)
    case.goes_on()
    case.message = message
    return case


# Numbers


def _not_finite(from_iteration: int, count: int, on_rank: int) -> Callable[[int], None]:
    """For `Start.prepare`: the loss of these iterations is NaN on one rank."""

    def prepare(rank: int) -> None:
        if rank != on_rank:
            return
        from moe_engine.train.step import Engine

        step = Engine.step

        def spoiled(self: Any, batches: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
            if not from_iteration <= iteration < from_iteration + count:
                return step(self, batches, iteration, *args, **kwargs)
            hook = self.model.register_forward_hook(
                lambda _module, _inputs, out: out._replace(loss=out.loss * float("nan"))
            )
            try:
                return step(self, batches, iteration, *args, **kwargs)
            finally:
                hook.remove()

        Engine.step = spoiled

    return prepare


@fault("NaN loss of one batch on one of two ranks")
def not_a_number(lab: Lab) -> Case:
    case = lab.case(2)
    start = case.start(_not_finite(7, 1, on_rank=1))
    case.ended(start, 0, seconds=ranks.LONG)
    case.says("skipped")
    case.same(bitwise=False, what="the update is skipped on both, the run goes on")
    weights = ranks.tensors(_checkpoint(case, 18)).values()
    case.expect(all(_finite(w) for w in weights), "weights and moments are finite")
    return case


def _finite(array: Any) -> bool:
    import numpy as np

    return bool(np.isfinite(array).all()) if array.dtype.kind == "f" else True


@fault("NaN loss, ten iterations in a row")
def not_a_number_for_good(lab: Lab) -> Case:
    case = lab.case(2)
    start = case.start(_not_finite(7, 1000, on_rank=1))
    case.ended(start, 2, seconds=ranks.LONG)
    case.says("iterations in a row")
    message = case.message
    newest = case.newest(17)
    if newest:
        weights = ranks.tensors(_checkpoint(case, newest)).values()
        case.expect(all(_finite(w) for w in weights), "weights and moments are finite")
    case.goes_on(bitwise=False)
    case.message = message
    return case


# Disks


def _small_disk(case: Case, megabytes: int) -> Path:
    """A file system of its own for the run folder; `_unmount` it."""
    disk = case.folder / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "faults", str(disk)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise Skipped(f"no small disk: {done.stderr.strip()}")
    case.out_dir = disk / "run"
    return disk


def _unmount(disk: Path) -> None:
    subprocess.run(["umount", "--lazy", str(disk)], capture_output=True)


def _fill(disk: Path, leave: int) -> Path:
    """A file beside the run that leaves so many bytes free."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    file = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (max(free.f_bavail * free.f_frsize - leave, 0), *([] if leave else [4096] * 64)):
            with contextlib.suppress(OSError):  # it is full
                os.write(file, bytes(size))
    finally:
        os.close(file)
    return ballast


@fault("disk full while a checkpoint is written, then not")
def full_disk(lab: Lab) -> Case:
    case = lab.case()
    disk = _small_disk(case, 16)
    try:
        start = case.start()
        start.until_line("step_00000006")
        ballast = _fill(disk, leave=150_000)
        case.injected()
        start.until_line("not written")
        ballast.unlink()
        case.ended(start, 0, seconds=ranks.LONG)
        case.says("not written")
        case.same(what="the run goes on and writes it later")
        return case
    finally:
        _unmount(disk)


@fault("disk full to the end of the run")
def full_disk_to_the_end(lab: Lab) -> Case:
    case = lab.case()
    disk = _small_disk(case, 16)
    try:
        start = case.start()
        start.until_line("step_00000006")
        ballast = _fill(disk, leave=150_000)
        case.ended(start, 2, seconds=ranks.LONG)
        case.says("error: ")
        message = case.message
        case.newest(6)
        ballast.unlink()
        case.goes_on()
        case.message = message
        return case
    finally:
        _unmount(disk)


@fault("disk full for the logs, then not")
def full_disk_for_logs(lab: Lab) -> Case:
    case = lab.case(max_iters=48, save_every=36, eval_interval=36)
    disk = _small_disk(case, 16)
    try:
        start = case.start()
        start.until(lambda: len(start.trained) >= 4)
        ballast = _fill(disk, leave=0)
        case.injected()
        start.until(lambda: len(start.trained) >= 30)
        ballast.unlink()
        case.ended(start, 0, seconds=ranks.LONG)
        case.says("No space left on device")
        if start.statuses == [0]:
            case.same(what="the run goes on; every line is in the logs")
        else:
            case.newest()
        return case
    finally:
        _unmount(disk)


def _without_privileges(_rank: int) -> None:
    """For `Start.prepare`: nothing is read-only to root, unless it gives up its capabilities (capset(2))."""
    ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))


@fault("out_dir made read-only, to the end of the run")
def read_only(lab: Lab) -> Case:
    case = lab.case()
    start = case.start(_without_privileges)
    start.until_line("step_00000006")
    folders = [case.out_dir, case.out_dir / "ckpt"]
    for folder in folders:
        folder.chmod(0o555)
    case.ended(start, 2, seconds=ranks.LONG)
    case.says("error: ")
    message = case.message
    case.newest(6)
    for folder in folders:
        folder.chmod(0o755)
    case.goes_on()
    case.message = message
    return case


@fault("out_dir deleted")
def deleted(lab: Lab) -> Case:
    case = lab.case(2)
    start = case.start()
    start.until_line("step_00000006")
    away = case.folder / "away"
    case.out_dir.rename(away)
    shutil.rmtree(away, ignore_errors=True)
    case.injected()
    case.ended(start, 0, seconds=ranks.LONG)
    case.says("warning: out_dir", "warning: ", f"{case.out_dir}:")
    message = case.message
    case.same(logs=False, what="the run goes on in a new folder")
    case.goes_on(logs=False)
    case.message = message
    return case


# Data


def _spoiled_data(lab: Lab, world: int, name: str, spoil: Callable[[Path], object]) -> Case:
    case = lab.case(world)
    shard = case.own_data() / name
    start = case.start()
    start.until(lambda: len(start.trained) >= 3)
    spoil(shard)
    case.injected()
    case.ended(start, 2)
    case.says("once it is repaired")
    message = case.message
    case.expect(shard.name in message, f"names {shard.name}")
    newest = case.newest()
    case.expect(newest is not None, "a checkpoint")
    shutil.copyfile(lab.data / name, shard)
    case.goes_on()
    case.message = message
    return case


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@fault("a training shard deleted, one rank")
def shard_deleted(lab: Lab) -> Case:
    return _spoiled_data(lab, 1, "toy_train_000000.npy", Path.unlink)


@fault("a training shard deleted, two ranks")
def shard_deleted_of_two(lab: Lab) -> Case:
    return _spoiled_data(lab, 2, "toy_train_000000.npy", Path.unlink)


@fault("a training shard truncated, one rank")
def shard_truncated(lab: Lab) -> Case:
    return _spoiled_data(lab, 1, "toy_train_000000.npy", _halve)


@fault("a training shard truncated, two ranks")
def shard_truncated_of_two(lab: Lab) -> Case:
    return _spoiled_data(lab, 2, "toy_train_000000.npy", _halve)


@fault("the validation shard deleted, two ranks")
def validation_deleted(lab: Lab) -> Case:
    return _spoiled_data(lab, 2, "toy_val_000000.npy", Path.unlink)


# Processes


@fault("a second job in the same out_dir")
def two_jobs(lab: Lab) -> Case:
    case = lab.case()
    first = case.start()
    first.until(lambda: len(first.trained) >= 3)
    first.signal(0, signal.SIGSTOP)  # so that it is not at its end before the second has begun
    second = case.start()
    case.injected()
    case.ended(second, 2)
    first.signal(0, signal.SIGCONT)
    case.says("in use by")
    first.wait()
    first.close()
    case.expect(first.statuses == [0], f"the first job goes on, got {_statuses(first.statuses)}")
    case.same(what="the first job goes on")
    return case


def _killed(lab: Lab, rank: int) -> Case:
    case = lab.case(2)
    start = case.start()
    start.until(lambda: len(start.trained) >= 8)
    start.signal(rank, signal.SIGKILL)
    case.injected()
    statuses = [1, 1]
    statuses[rank] = -signal.SIGKILL
    case.ended(start, *statuses)
    case.says(f"error: rank {rank}")
    case.expect("died" in case.message, "the line says that it died")
    message = case.message
    case.newest(6)
    case.goes_on()
    case.message = message
    return case


@fault("rank 1 of two killed")
def killed(lab: Lab) -> Case:
    return _killed(lab, 1)


@fault("rank 0 of two killed")
def killed_first(lab: Lab) -> Case:
    return _killed(lab, 0)


@fault("rank 1 of two stopped for good (SIGSTOP), --timeout 6")
def stopped(lab: Lab) -> Case:
    case = lab.case(2)
    known = has_option("timeout")
    start = case.start(extra=["--timeout=6"] if known else [])
    case.expect(known, "an option --timeout")
    start.until(lambda: len(start.trained) >= 8)
    start.signal(1, signal.SIGSTOP)
    case.injected()
    start.until(lambda: start.statuses[0] is not None, SOON if known else 15.0)
    case.happened.append(f"rank 0 {_statuses([start.statuses[0]])} after {time.monotonic() - case._told:.1f} s")
    case.expect(start.statuses[0] == 1, "rank 0 leaves with status 1")
    start.signal(1, signal.SIGCONT)
    case.ended(start, 1)
    case.says("no progress for")
    message = case.message
    stacks = sorted(path.name for path in (case.out_dir / "stacks").glob("*.txt"))
    case.expect("rank00000.txt" in stacks, f"stacks of rank 0 in out_dir/stacks, got {stacks}")
    case.newest(6)
    case.goes_on()
    case.message = message
    return case


@fault("rank 1 of two stopped for 4 s and continued")
def stopped_and_continued(lab: Lab) -> Case:
    case = lab.case(2)
    start = case.start()
    start.until(lambda: len(start.trained) >= 8)
    start.signal(1, signal.SIGSTOP)
    case.injected()
    start.pause(4.0)
    start.signal(1, signal.SIGCONT)
    case.ended(start, 0)
    case.says("run folder")
    case.same(what="the run goes on")
    case.message = "nothing: the run waits"
    return case


@fault("torchrun --max_restarts=1, a worker killed")
def restarted(lab: Lab) -> Case:
    import psutil

    case = lab.case(2)
    start = case.start(way="torchrun", torchrun=["--max_restarts=1"])
    start.until(lambda: len(start.trained) >= 8)
    workers = psutil.Process(start.processes[0].pid).children()
    case.expect(len(workers) == 2, f"two workers, got {len(workers)}")
    workers[-1].kill()
    case.injected()
    case.ended(start, 0, seconds=ranks.LONG)
    case.says("resuming from")
    case.same(what="torchrun starts both again, which go on")
    return case


@fault("SIGTERM to torchrun")
def torchrun_terminated(lab: Lab) -> Case:
    case = lab.case(2)
    start = case.start(way="torchrun")
    start.until(lambda: len(start.trained) >= 3)
    start.signal(0, signal.SIGTERM)
    case.injected()
    start.wait(SOON)
    case.happened.append(f"torchrun {_statuses(start.statuses)} after {time.monotonic() - case._told:.1f} s")
    start.close()
    case.says("stopped by SIGTERM")
    case.expect(case.newest() is not None, "a checkpoint")
    case.goes_on()
    case.says("stopped by SIGTERM", start=start)
    return case


# Clocks


@fault("the wall clock jumps by a day and by a month, back and forth")
def clock(lab: Lab) -> Case:
    def prepare(_rank: int) -> None:
        real, calls = time.time, iter(range(1 << 62))
        time.time = lambda: real() + (0, -86_400, 30 * 86_400)[next(calls) // 5 % 3]

    case = lab.case(2)
    start = case.start(prepare)
    case.ended(start, 0, seconds=ranks.LONG)
    case.same(what="the run")
    case.message = "nothing"
    return case


# The table


@dataclass
class Row:
    name: str
    happened: str
    kept: str
    message: str
    unmet: list[str]


def _row(name: str, lab: Lab) -> Row:
    made: list[Case] = []
    original = lab.case

    def remembered(*args: Any, **kwargs: Any) -> Case:
        made.append(original(*args, **kwargs))
        return made[-1]

    lab.case = remembered  # type: ignore[method-assign]
    try:
        case = FAULTS[name](lab)
        return Row(name, "; ".join(case.happened), "; ".join(case.kept), case.message, case.unmet)
    except Skipped as reason:
        return Row(name, f"not tried here ({reason})", "", "", [])
    except Exception as error:  # one broken injection leaves the others worth knowing
        return Row(name, "the injection failed", "", "", [f"{type(error).__name__}: {error}"])
    finally:
        lab.case = original  # type: ignore[method-assign]
        for case in made:
            for start in case.starts:
                if not start.ended:
                    for rank in range(len(start.processes)):
                        start.signal(rank, signal.SIGCONT)
                    start.close()


def run(out: Path, only: str, markdown: Path | None, say: Callable[[str], None]) -> int:
    """Inject every fault in whose name `only` is found, print and write the table; returns the exit status."""
    ranks.import_everything()
    out.mkdir(parents=True)
    lab, rows = Lab(out), []
    for name in FAULTS:
        if not re.search(only, name):
            continue
        begin = time.monotonic()
        row = _row(name, lab)
        rows.append(row)
        if markdown is not None:
            write_table([row], markdown)
        say(f"{'ok    ' if not row.unmet else 'FAILED'} {name} ({time.monotonic() - begin:.0f} s)")
        for text in (row.happened, row.kept, row.message, *(f"unmet: {each}" for each in row.unmet)):
            if text:
                print(f"           {text}", flush=True)
    (out / "faults.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
    failed = sum(bool(row.unmet) for row in rows)
    say(f"{len(rows)} faults, {failed} with something unmet")
    return int(failed > 0)


def write_table(rows: list[Row], page: Path) -> None:
    """Put the table between its marks; rows of faults that were not tried this time stay as they are."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines()}
    for row in rows:
        happened = cell(row.happened)
        if row.unmet:
            happened += f" **Not as it should be**: {cell('; '.join(row.unmet))}"
        said = f"`{cell(row.message)}`" if row.message and not row.message.startswith("nothing") else row.message
        lines[cell(row.name)] = f"| {cell(row.name)} | {happened} | {cell(row.kept)} | {said} |"
    head = ["| fault | what happened | what was kept | what it said |", "| --- | --- | --- | --- |"]
    table = [lines[cell(name)] for name in FAULTS if cell(name) in lines]
    page.write_text(before + "\n".join([BEGIN, *head, *table, END]) + after, encoding="utf-8")
