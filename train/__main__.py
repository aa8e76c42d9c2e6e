"""`moe-train`: train a model. `torchrun --nproc_per_node=N -m moe_engine.train …` is the form with several devices."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import platform
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_engine.train import config as settings
from moe_engine.train import determinism, memory, parallel
from moe_engine.train.cli import guarded, parse
from moe_engine.train.config import TrainConfig
from moe_engine.train.device import DTYPES, device_name, keep_freed_memory, pick_device, pick_dtype
from moe_engine.train.environment import git_commit, launch_id, restarted, versions
from moe_engine.train.errors import InputError
from moe_engine.train.liveness import Liveness, collective_limit
from moe_engine.train.lock import LOCK_FILE, RunLock, locked
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import RunLog, read_metrics
from moe_engine.train.options import option
from moe_engine.train.parallel import World, from_first
from moe_engine.train.published import write_atomically
from moe_engine.train.shards import read_meta
from moe_engine.train.signals import StopSignals
from moe_engine.train.signs import format_seconds
from moe_engine.train.verify import verify_resume

CONFIG_FILE, ENV_FILE = "config.toml", "env.json"
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EISDIR)


@dataclass(frozen=True)
class Flags(TrainConfig):
    """`TrainConfig`, and what only the command line can say."""

    config: str | None = option(None, "TOML file with these options by name, and a [model] table")
    print_config: bool = option(False, "print the resolved configuration as TOML and exit")
    verify_resume: bool = option(False, "train a few iterations, resume them, compare bit for bit, and exit")


def environment(device: torch.device, world: World) -> dict[str, Any]:
    """What a run ran on: versions, device, code."""
    return {
        "versions": versions("moe-engine", "torch", "triton", "numpy", "tiktoken"),
        "platform": platform.platform(),
        "device": device_name(device),
        "devices": world.size,
        "git": git_commit(),
        "launch": launch_id(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def open_run(config: TrainConfig, toml: str) -> bool:
    """Recognise the run folder that is there, if there is one; returns whether it holds a run to go on with.

    The first rank does this for all.

    Raises:
        InputError: the folder holds a run of another configuration, or files of something else.
    """
    out_dir = Path(config.out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"--out_dir {out_dir}: expected a folder, found a file")
    written = out_dir / CONFIG_FILE
    if config.fresh and written.exists():
        _remove_run(out_dir)
    if written.exists() and not config.fresh:
        known = settings.toml_table(written, f"--out_dir {out_dir}: cannot read")
        changed = settings.differences(known, tomllib.loads(toml))
        if changed:
            raise InputError(
                f"--out_dir {out_dir}: holds a run of another configuration ({'; '.join(changed)}); "
                "choose another folder, or --fresh to start over"
            )
    elif out_dir.exists() and not config.fresh and not all(map(_of_a_begun_run, out_dir.iterdir())):
        raise InputError(f"--out_dir {out_dir}: not empty and no run folder (no {CONFIG_FILE}); choose another folder")
    goes_on = written.exists() and not config.fresh
    if not goes_on and any((out_dir / "ckpt").glob("step_*")):
        raise InputError(
            f"--out_dir {out_dir}: its ckpt holds checkpoints of another run, which would be taken for this one's; "
            "remove them, or choose another folder"
        )
    return goes_on


def _of_a_begun_run(path: Path) -> bool:
    """Whether it is what a run has made, or not removed yet, when it ends with no CONFIG_FILE there."""
    empty = ("logs.txt", "metrics.jsonl")
    names = (LOCK_FILE, "stacks", f"{CONFIG_FILE}.tmp", ENV_FILE, f"{ENV_FILE}.tmp")
    return path.name in names or (path.name in empty and path.stat().st_size == 0)


def repetition_of(out_dir: Path) -> str | None:
    """What tells that this start is not the first one of its command: --fresh was meant for that one.

    A launcher counts its repetitions, and torchrun does not count those in which a node joins or leaves; but it names
    its launches, and the run says which one began it.
    """
    if counted := restarted():
        return counted
    try:
        begun_by = json.loads((out_dir / ENV_FILE).read_text(encoding="utf-8"))["launch"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return f"TORCHELASTIC_RUN_ID {begun_by}" if begun_by and begun_by == launch_id() else None


def check_never_saved(out_dir: Path) -> None:
    """For a run without checkpoints: whether it really never had one.

    Raises:
        InputError: it had. Somebody has moved them away, or the disk that they are on is not there.
    """
    saved = [record["iter"] for record in read_metrics(out_dir / "metrics.jsonl") if record["kind"] == "save"]
    if saved:
        raise InputError(
            f"--out_dir {out_dir}: metrics.jsonl tells of checkpoints up to iteration {saved[-1]}, ckpt holds none: "
            "they were moved away, or their disk is not there; nothing was changed; --fresh starts over"
        )


def _remove_run(out_dir: Path) -> None:
    """Delete what a run writes, and nothing else.

    Raises:
        InputError: a folder of it is a link, and where that leads is not ours to empty; nothing was deleted.
        OSError: something cannot be deleted: a checkpoint that stays would be resumed.
    """
    folders = [out_dir / name for name in ("ckpt", "samples", "plots", "tensorboard", "stacks")]
    for folder in folders:
        if folder.is_symlink():
            raise InputError(f"--fresh: {folder} is a link to {os.readlink(folder)}: empty that, or remove the link")
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)
    for name in ("logs.txt", "metrics.jsonl", CONFIG_FILE, ENV_FILE):
        (out_dir / name).unlink(missing_ok=True)


def train(config: TrainConfig) -> int:
    """One process of a run, from an empty or existing run folder to the end; returns the exit status."""
    # Signals before all else: one that comes while the run starts up must not end it half-way.
    with StopSignals() as signals, determinism.mode(config.deterministic):
        return _train(config, signals)


def _train(config: TrainConfig, signals: StopSignals) -> int:
    keep_freed_memory()
    world = World.from_environment()
    device = pick_device(config.device, world.local_rank)
    model = config.model_config(read_meta(config.data_dir).vocab_size)
    toml = settings.to_toml(config, model)
    out_dir = Path(config.out_dir)
    store, keeper = parallel.open_store(world, config.timeout)
    liveness = Liveness(world, out_dir, config.timeout, store, keeper=keeper)
    try:
        with liveness:
            _meet(config, world, device)  # before the folder is looked at: all hear from the first whether it is free
            with locked(out_dir, world) as lock:
                repeated = config.fresh and from_first(lambda: repetition_of(out_dir), world)
                config = dataclasses.replace(config, fresh=config.fresh and not repeated)
                goes_on = from_first(functools.partial(open_run, config, toml), world)
                trainer = Trainer(config, world, device)
                trainer.signals, trainer.liveness = signals, liveness
                if repeated:
                    trainer.notes.append(
                        f"--fresh is ignored: this start is a repetition ({repeated}), and goes on with what was begun"
                    )
                return _start(trainer, toml, goes_on, lock)
    except RuntimeError as error:
        if not memory.ran_out(error):
            raise
        run = memory.Run(config, model, world.size, pick_dtype(config.dtype, device)[0], device.type == "cuda")
        raise InputError(
            f"out of memory ({str(error).splitlines()[0]}); next to try: {memory.next_setting(run)}; "
            "the last whole checkpoint stays"
        ) from error
    finally:
        if liveness.lost is None:  # else the process group is broken, and leaving it may hang
            parallel.stop()
        liveness.close()


def _meet(config: TrainConfig, world: World, device: torch.device) -> None:
    """Join the process group, if this process is one of several."""
    if world.size > 1:
        dtype, param_dtype = pick_dtype(config.dtype, device)[0], DTYPES[config.param_dtype]
        limit = collective_limit(config.timeout)
        parallel.start(world, device, dtype, config.cpu_offload, param_dtype, limit)


def _start(trainer: Trainer, toml: str, goes_on: bool, lock: RunLock | None) -> int:
    """Resume, if there is something to go on with, open the logs, and train. `lock` is the first rank's."""
    world, signals, out_dir = trainer.world, trainer.signals, Path(trainer.config.out_dir)
    checkpoint, notes = trainer.checkpoints.newest_sound() if goes_on else (None, [])
    trainer.notes += notes
    if goes_on and not checkpoint:
        from_first(lambda: check_never_saved(out_dir), world)
    if checkpoint:
        trainer.resume(checkpoint)
    env = json.dumps(environment(trainer.device, world), indent=2) + "\n" if world.is_main else ""

    def describe() -> None:
        """What makes a folder one to resume in; again, should it be deleted while the run goes on."""
        lock.renew()
        write_atomically(out_dir / CONFIG_FILE, toml)
        write_atomically(out_dir / ENV_FILE, env)

    def missing() -> list[str]:
        return [] if lock.is_in_place() else [LOCK_FILE]

    def reader_gone() -> None:
        signals.number = signals.number or signal.SIGPIPE

    callbacks = {"restore": describe, "missing": missing, "reader_gone": reader_gone}
    with RunLog(out_dir, is_main=world.is_main, **callbacks) as log:
        if goes_on:  # a run that was killed before its first checkpoint begins again, its evaluation at 0 too
            log.truncate_after(trainer.iteration if checkpoint else -1)
        if world.is_main:
            describe()
            if lock.warning:
                log.warn(lock.warning)
        return _run(trainer, log, checkpoint)


def verify(config: TrainConfig) -> int:
    """One process of `--verify_resume`; returns the exit status."""
    keep_freed_memory()
    world = World.from_environment()
    try:
        with determinism.mode(config.deterministic):
            device = pick_device(config.device, world.local_rank)
            _meet(config, world, device)
            return verify_resume(config, world, device)
    finally:
        parallel.stop()


def _run(trainer: Trainer, log: RunLog, checkpoint: Path | None) -> int:
    config, model = trainer.config, trainer.model_config
    total, active = model.matrix_parameters()
    log.note(
        f"{config.preset}: {total / 1e6:.1f} M parameters in matrices, {active / 1e6:.1f} M active per token, on "
        f"{trainer.world.size} × {device_name(trainer.device)}; {trainer.tokens_per_iteration} tokens per iteration, "
        f"router_aux_coef {trainer.engine.aux_coef:g}"
    )
    if config.deterministic:
        log.note(determinism.note())
    if checkpoint:
        log.note(f"resuming from {checkpoint} at iteration {trainer.iteration}")
    usual = settings.preset(config.preset).vocab_size
    if model.vocab_size > usual:
        log.note(
            f"the data's vocabulary ({trainer.train_data.meta.vocab_size}) enlarges the model's from {usual} to "
            f"{model.vocab_size} rows"
        )
    begin = time.perf_counter()
    status = trainer.run(log)
    log.note(f"run folder: {config.out_dir} ({format_seconds(time.perf_counter() - begin)})")
    return status


def _body(argv: Sequence[str] | None) -> int:
    given = parse("moe-train", Flags, argv, "Train a mixture-of-experts language model.")
    file = given.pop("config", None)
    print_only, verify_only = given.pop("print_config", False), given.pop("verify_resume", False)
    table = settings.read_toml(file) if file else {}
    config = settings.resolve(given, {"data_dir": "", **table} if print_only else table)
    if print_only:
        known = bool(config.data_dir) and Path(config.data_dir).exists()
        vocab_size = read_meta(config.data_dir).vocab_size if known else 1
        print(settings.to_toml(config, config.model_config(vocab_size)), end="")
        return 0
    try:
        return verify(config) if verify_only else train(config)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        raise InputError(
            f"{error.filename or config.out_dir}: {error.strerror}; the last whole checkpoint stays"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return guarded(lambda: _body(argv))


if __name__ == "__main__":
    sys.exit(main())
