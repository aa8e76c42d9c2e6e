"""`moe-train --verify_resume`: whether a resumed run is, bit for bit, the run that went on.

The user's own configuration trains for some iterations, saves a checkpoint, and trains on. A second trainer, which
knows nothing of the first, resumes from that checkpoint and trains as far. Losses and gradient norms must be the same
numbers, and so must every weight and every moment of every rank.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from moe_engine.train.checkpoint import state_tensors
from moe_engine.train.config import TrainConfig
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import RunLog
from moe_engine.train.parallel import World, from_first, gathered

STEPS = 3  # iterations before the checkpoint, and as many after it


@dataclass
class _Trace:
    """What a stretch of training came to: this rank's losses and gradient norms, and a checksum of every tensor."""

    losses: list[float]
    grad_norms: list[float]
    tensors: dict[str, str]

    def difference(self, other: _Trace) -> str | None:
        """The first thing in which two of them differ."""
        for kind in ("losses", "grad_norms"):
            for number, (a, b) in enumerate(zip(getattr(self, kind), getattr(other, kind), strict=True), 1):
                if a != b:
                    return f"{kind} of iteration {STEPS + number}: {a!r} and {b!r}"
        names = [name for name in self.tensors if self.tensors[name] != other.tensors.get(name)]
        return f"{len(names)} of {len(self.tensors)} tensors, {names[0]} first" if names else None


def _train_on(trainer: Trainer) -> _Trace:
    steps = [trainer.train_step() for _ in range(STEPS)]
    checksums = {}
    for name, tensor in state_tensors(trainer.model, trainer.engine.optimizer).items():
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        data = local.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        checksums[name] = hashlib.sha256(data).hexdigest()
    return _Trace([float(step.loss) for step in steps], [step.grad_norm for step in steps], checksums)


def _free(trainer: Trainer) -> None:
    """Give a trainer's memory back, for the next one; the caller holds nothing of it any more."""
    trainer.loader.close()
    trainer.__dict__.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def verify_resume(config: TrainConfig, world: World, device: torch.device) -> int:
    """Do it, in a folder beside out_dir that is removed again; says what was found and returns the exit status.

    Every rank calls this. out_dir itself is neither read nor written.
    """
    folder = Path(f"{config.out_dir.rstrip('/')}.verify_resume")
    config = dataclasses.replace(config, out_dir=str(folder), max_iters=2 * STEPS, fresh=False)
    from_first(lambda: shutil.rmtree(folder, ignore_errors=True), world)
    try:
        with RunLog(folder, is_main=world.is_main, console=False) as log:
            trainer = Trainer(config, world, device)
            trainer.log = log
            for _ in range(STEPS):
                trainer.train_step()
            trainer.save()
            whole = _train_on(trainer)
            trainer.finish_save()
            _free(trainer)
            resumed = _resumed(config, world, device)
            difference = next((d for d in gathered(whole.difference(resumed), world) if d), None)
            again = difference and _resumed(config, world, device)
            repeats = not again or not any(gathered(resumed.difference(again), world))
    finally:
        if world.is_main:  # alone: where one rank fails, the others are in a collective of their own
            shutil.rmtree(folder, ignore_errors=True)
    if not world.is_main:
        return int(difference is not None)
    if difference is None:
        losses = ", ".join(f"{loss:.6g}" for loss in whole.losses)
        print(
            f"resume verified: iterations {STEPS + 1} to {2 * STEPS}, after a checkpoint at {STEPS}, are bit for bit "
            f"those of the run that went on (loss {losses}; all {len(whole.tensors)} tensors of weights and moments; "
            f"{world.size} {'process' if world.size == 1 else 'processes'})"
        )
        return 0
    cause = "the checkpoint does not hold all of the run's state" if repeats else (
        "two resumes from one checkpoint differ too: training itself is not repeatable here; try --deterministic"
    )  # fmt: skip
    print(f"error: resume is not exact: {difference}; {cause}", file=sys.stderr)
    return 1


def _resumed(config: TrainConfig, world: World, device: torch.device) -> _Trace:
    trainer = Trainer(config, world, device)
    path, _ = trainer.checkpoints.newest_sound()
    trainer.resume(path)
    trace = _train_on(trainer)
    _free(trainer)
    return trace
