"""Starts of `moe-train` in processes of their own, watched from outside: what they print, write, and how they end.

Two ways to start: `python -m moe_engine.train …` in new processes, which takes seconds of importing each, or `fork`s of
this process, which has imported already. Nothing is patched in the first; in the second figures are not rendered and
the CPU's speed is not measured, which are not what is tested here and take longer than all the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MODEL = {
    "num_layers": 2,
    "d_model": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 32,
    "num_experts": 4,
    "top_k": 2,
    "sliding_window": 8,
    "vocab_size": 264,
}
OPTIONS = {
    "preset": "tiny",
    "device": "cpu",
    "batch_size": 4,
    "block_size": 16,
    "warmup_iters": 3,
    "log_interval": 1,
    "eval_iters": 2,
    "sample_every": 0,
}
LONG = 180.0  # seconds after which something that should have happened has not; these machines are busy


def write_data(folder: Path) -> Path:
    """Two training shards and one for validation, of tokens that have something to learn in them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    successors, choices = rng.integers(0, 61, (61, 3)), rng.integers(0, 3, 24_000)
    tokens, token = np.empty(24_000, dtype=np.uint16), 0
    for i, choice in enumerate(choices):
        tokens[i] = token = successors[token, choice]
    for name, part in (("train_000000", tokens[:12_000]), ("train_000001", tokens[12_000:20_000])):
        np.save(folder / f"toy_{name}.npy", part)
    np.save(folder / "toy_val_000000.npy", tokens[20_000:])
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "o200k_base:256", "vocab_size": 257, "dataset": "toy"}))
    return folder


def arguments(data_dir: Path, out_dir: Path, **options: Any) -> list[str]:
    """The command line of a run of seconds; `model` replaces fields of the model."""
    model = MODEL | options.pop("model", {})
    table = {"data_dir": data_dir, "out_dir": out_dir, **OPTIONS, **options}
    table |= {f"model.{name}": value for name, value in model.items()}
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in table.items()]


class Watch:
    """Changes in folders, told by the kernel (inotify(7))."""

    MODIFY, MOVED_TO, CREATE, CLOSE_WRITE, DELETE, MOVED_FROM = 0x2, 0x80, 0x100, 0x8, 0x200, 0x40
    ALL = MODIFY | MOVED_TO | MOVED_FROM | CREATE | CLOSE_WRITE | DELETE

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._paths: dict[int, Path] = {}

    def fileno(self) -> int:
        return self._fd

    def add(self, path: Path, mask: int = ALL) -> None:
        """Watch a folder, or a file; one that has gone meanwhile is left out."""
        number = self._libc.inotify_add_watch(self._fd, os.fsencode(path), mask)
        if number >= 0:
            self._paths[number] = path

    def read(self) -> list[tuple[Path, int]]:
        """What has changed since the last call: path and what happened to it."""
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return []
        changes, at = [], 0
        while at < len(data):
            number, mask, _, length = struct.unpack_from("iIII", data, at)
            name = data[at + 16 : at + 16 + length].rstrip(b"\0")
            at += 16 + length
            if folder := self._paths.get(number):
                changes.append((folder / os.fsdecode(name) if name else folder, mask))
        return changes

    def close(self) -> None:
        os.close(self._fd)


class Forked:
    """A forked child, with what of `subprocess.Popen` is used here."""

    def __init__(self, body: Callable[[], int], output: Path, environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive the runner
            try:
                file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                for stream in (1, 2):
                    os.dup2(file, stream)
                os.environ.update(environment)
                status = body()
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def import_everything() -> None:
    """Import, before a fork, what a run imports sooner or later; no threads are started by that."""
    for name in ("matplotlib.pyplot", "torch.distributed.fsdp", "torch.utils.tensorboard", "moe_engine.train.__main__"):
        importlib.import_module(name)
    import torch

    from moe_engine.train import loop, plots

    torch.set_num_threads(1)
    loop.peak_flops = functools.partial(loop.peak_flops, seconds=0.0)
    plots.save = _touch


def _touch(_figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass
class Start:
    """One start of a run's command: its processes, and what became of them.

    Args:
        argv: of `moe-train`.
        out_dir: the run folder.
        output: folder for what the ranks print.
        ranks: how many.
        way: "fork", "process" or "torchrun".
        prepare: with fork, called in each rank before the command, with its number; spoils something, say.
        torchrun: options of torchrun.
    """

    argv: Sequence[str]
    out_dir: Path
    output: Path
    ranks: int = 2
    way: str = "fork"
    prepare: Callable[[int], None] | None = None
    torchrun: Sequence[str] = ()
    lines: list[str] = field(default_factory=list)  # that the first rank has printed
    changes: list[tuple[Path, int]] = field(default_factory=list)  # in ckpt/

    def __post_init__(self) -> None:
        self.output.mkdir(parents=True)
        self.begun = time.monotonic()
        self._half = b""
        self.watch = Watch()
        folder = self.out_dir / "ckpt"
        for path in (self.out_dir, folder):
            self.watch.add(path)
        self.processes = list(self._start())
        # Rank 0's, or under torchrun everybody's.
        self._file = open(self.output_of(0), "rb")  # noqa: SIM115
        self.watch.add(self.output_of(0), Watch.MODIFY)

    def output_of(self, rank: int) -> Path:
        return self.output / f"rank{rank}.txt"

    def _start(self) -> Any:
        common = {"OMP_NUM_THREADS": "1"}
        if self.way == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
            command += [*self.torchrun, "-m", "moe_engine.train", *self.argv]
            with open(self.output_of(0), "wb") as file:
                yield subprocess.Popen(command, env=os.environ | common, stdout=file, stderr=subprocess.STDOUT)
            return
        port = str(free_port())
        for rank in range(self.ranks):
            self.output_of(rank).touch()
            names = {"RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.ranks}
            environment = {name: str(value) for name, value in names.items()} if self.ranks > 1 else {}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **common}
            if self.way == "fork":
                yield Forked(functools.partial(self._body, rank), self.output_of(rank), environment)
            else:
                command = [sys.executable, "-m", "moe_engine.train", *self.argv]
                with open(self.output_of(rank), "wb") as file:
                    yield subprocess.Popen(command, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT)

    def _body(self, rank: int) -> int:
        from moe_engine.train.__main__ import main

        sys.argv = ["moe-train", *self.argv]
        if self.prepare is not None:
            self.prepare(rank)
        return main(self.argv)

    # What happens

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    @property
    def statuses(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    @property
    def ended(self) -> bool:
        return all(status is not None for status in self.statuses)

    @property
    def trained(self) -> list[int]:
        """The iterations that this start has logged."""
        return [int(line.split("iter ")[1].split("/")[0]) for line in self.lines if "| loss " in line]

    def text(self, rank: int = 0) -> str:
        return self.output_of(rank).read_text(errors="replace")

    def _take_in(self) -> None:
        for path, mask in self.watch.read():
            if path.parent == self.out_dir and path.name == "ckpt":
                self.watch.add(path)
                for made in path.glob("step_*"):  # in the meantime
                    self.changes.append((made, Watch.CREATE))
                    self.watch.add(made)
            elif path.parent.name == "ckpt" or path.parent.parent.name == "ckpt":
                if mask & Watch.CREATE and ".tmp" in path.name and path.name.startswith("step_"):
                    self.watch.add(path)
                if not mask & Watch.MODIFY:
                    self.changes.append((path, mask))
        *whole, self._half = (self._half + self._file.read()).split(b"\n")
        self.lines += [line.decode("utf-8", "replace") for line in whole]

    def until(self, condition: Callable[[], bool], seconds: float = LONG) -> bool:
        """Wait for something to be so; False if all ranks have ended, or the time has, before it was."""
        deadline = time.monotonic() + seconds
        handles = {process: os.pidfd_open(process.pid) for process in self.processes if process.poll() is None}
        try:
            while True:
                self._take_in()
                if condition():
                    return True
                left = deadline - time.monotonic()
                if self.ended or left <= 0:
                    return False
                poll = select.poll()
                poll.register(self.watch.fileno(), select.POLLIN)
                for process, handle in handles.items():
                    if process.poll() is None:
                        poll.register(handle, select.POLLIN)
                poll.poll(min(left, 1.0) * 1000)
        finally:
            for handle in handles.values():
                os.close(handle)

    def until_line(self, text: str, seconds: float = LONG) -> bool:
        return self.until(lambda: any(text in line for line in self.lines), seconds)

    def pause(self, seconds: float) -> bool:
        """Let time pass; True if there are ranks left."""
        self.until(lambda: False, seconds)
        return not self.ended

    def wait(self, seconds: float = LONG) -> bool:
        """Wait for all ranks to end; True if they did."""
        self.until(lambda: self.ended, seconds)
        return self.ended

    def signal(self, rank: int, number: int = signal.SIGKILL) -> None:
        self.processes[rank].send_signal(number)

    def close(self) -> list[int]:
        """End what is left; returns the ranks that had to be ended."""
        left = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
        for rank in left:
            self.processes[rank].send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not self.ended and time.monotonic() < deadline:
            time.sleep(0.01)  # for the kernel to be done with what it was told to kill
        self._take_in()
        self.watch.close()
        self._file.close()
        return left


def last_lines(start: Start, count: int = 12) -> str:
    """The end of what every rank has printed, for a person who has to find out."""
    parts = []
    for rank in range(len(start.processes)):
        lines = start.text(rank).splitlines()[-count:]
        parts.append(f"-- rank {rank}, status {start.statuses[rank]} --\n" + "\n".join(lines))
    return "\n".join(parts)


# What a run folder holds. Written without the code that is tested, as far as that goes.


def published(out_dir: Path) -> list[int]:
    """Iterations of the checkpoints that have their final name, in order."""
    return sorted(int(p.name[5:]) for p in (out_dir / "ckpt").glob("step_????????") if p.is_dir())


def unsound(out_dir: Path) -> list[str]:
    """What is wrong with published checkpoints, by their own list of checksums."""
    import hashlib

    problems = []
    for iteration in published(out_dir):
        folder = out_dir / "ckpt" / f"step_{iteration:08d}"
        sums = folder / "SHA256SUMS"
        if not sums.exists():
            problems.append(f"{folder.name}: no SHA256SUMS")
            continue
        listed = dict(reversed(line.split("  ", 1)) for line in sums.read_text().splitlines())
        files = {p.name for p in folder.iterdir()} - {"SHA256SUMS"}
        if files != set(listed):
            problems.append(f"{folder.name}: holds {sorted(files)}, lists {sorted(listed)}")
            continue
        for name, digest in listed.items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                problems.append(f"{folder.name}/{name}: another checksum")
    return problems


def leftovers(out_dir: Path) -> list[str]:
    """Names in ckpt/ that are no whole checkpoint's and no pointer's."""
    if not (out_dir / "ckpt").exists():
        return []
    names = (p.name for p in (out_dir / "ckpt").iterdir())
    return sorted(n for n in names if n not in ("latest", "best") and not (n.startswith("step_") and len(n) == 13))


def records(out_dir: Path, *kinds: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of some kinds, without what depends on the clock."""
    from moe_engine.train.metrics import deterministic, read_metrics

    return [deterministic(r) for r in read_metrics(out_dir / "metrics.jsonl") if r["kind"] in kinds]


def tensors(folder: Path) -> dict[tuple[str, str], Any]:
    """Every tensor of a checkpoint by file and name; random states apart, which nothing in training draws from."""
    from safetensors.numpy import load_file

    return {
        (path.name, name): value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
        if not name.startswith("rng.")
    }


def apart(one: Path, other: Path, iteration: int) -> list[str]:
    """In what two finished runs differ: weights, moments, state, losses; [] if they are the same to the last bit."""
    differences = []
    folders = [out_dir / "ckpt" / f"step_{iteration:08d}" for out_dir in (one, other)]
    if missing := [str(f) for f in folders if not f.exists()]:
        return [f"no {m}" for m in missing]
    a, b = (tensors(folder) for folder in folders)
    if a.keys() != b.keys():
        differences.append(f"tensors in one only: {sorted(a.keys() ^ b.keys())[:3]}")
    changed = [key for key in a.keys() & b.keys() if a[key].tobytes() != b[key].tobytes()]
    if changed:
        differences.append(f"{len(changed)} of {len(a)} tensors, {min(changed)} for one")
    states = [json.loads((folder / "state.json").read_text()) for folder in folders]
    keys = ("iteration", "loader", "undone", "val_loss", "best_val_loss", "scaler", "ranks")
    differences += [f"state.json: {k}: {states[0][k]} and {states[1][k]}" for k in keys if states[0][k] != states[1][k]]
    for name in ("latest", "best"):
        paths = [out_dir / "ckpt" / name for out_dir in (one, other)]
        x, y = (path.read_text().strip() if path.exists() else None for path in paths)
        differences += [f"ckpt/{name}: {x} and {y}"] if x != y else []
    for kind in ("train", "eval", "sample"):
        x, y = (records(out_dir, kind) for out_dir in (one, other))
        iterations = [r["iter"] for r in y]
        if len(set(iterations)) != len(iterations):
            differences.append(f"{kind} records with an iteration twice")
        if x != y:
            first = next((p for p, q in zip(x, y, strict=False) if p != q), {"iter": "the end"})
            differences.append(f"{kind} records from iteration {first['iter']} on ({len(x)} and {len(y)} of them)")
    return differences


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
