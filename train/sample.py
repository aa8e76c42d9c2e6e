"""`moe-sample`: text from a trained run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_engine.generate import generate
from moe_engine.model import Transformer
from moe_engine.train import config as settings
from moe_engine.train.checkpoint import Checkpoints
from moe_engine.train.cli import run_command
from moe_engine.train.device import pick_device
from moe_engine.train.errors import InputError
from moe_engine.train.options import option
from moe_engine.train.parallel import World
from moe_engine.train.published import folder_of
from moe_engine.train.tokenizer import load_tokenizer


@dataclass(frozen=True)
class SampleConfig:
    """Options of `moe-sample`."""

    out_dir: str = option(help="run folder of moe-train")
    prompt: str = option("", "text to continue; empty: a new document")
    tokens: int = option(200, "tokens to generate at most")
    samples: int = option(1, "number of texts")
    temperature: float = option(0.8, "0 takes the likeliest token")
    top_k: int = option(200, "draw among the k likeliest tokens; 0 among all")
    seed: int = option(1337, "seed of the draws")
    iteration: int | None = option(None, "checkpoint to use (default: the newest)")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("samples", 1), ("temperature", 0), ("top_k", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name}: expected at least {least}, got {getattr(self, name)}")


def sample(config: SampleConfig) -> int:
    """Print texts; returns the exit status."""
    out_dir, world = Path(config.out_dir), World(0, 1, 0)
    checkpoints = Checkpoints(out_dir, world)
    path = checkpoints.latest()
    if config.iteration is not None:
        path = checkpoints.folder / folder_of(config.iteration)
    if path is None or path not in checkpoints.complete():
        known = ", ".join(str(int(p.name[-8:])) for p in checkpoints.complete())
        raise InputError(f"--out_dir {out_dir}: no such checkpoint; iterations there: {known or 'none'}")
    if defect := checkpoints.defect(path):
        raise InputError(f"checkpoint {path}: {defect}; --iteration takes another one")
    run = settings.resolve(settings.read_toml(out_dir / "config.toml"))
    state = checkpoints.read_run(path)
    tokenizer = load_tokenizer(state["tokenizer"])
    device = pick_device(config.device)
    model_config = run.model_config(state["vocab_size"])
    try:
        with torch.device("meta"):
            model = Transformer(model_config)
        model.to_empty(device=device)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes that no memory has, or no number of PyTorch
        reason = str(error).partition("\n")[0]
        raise InputError(f"--out_dir {out_dir}: no room for the model that config.toml describes: {reason}") from error
    checkpoints.load(path, model, None, device)
    start = [] if tokenizer.eot is None else [tokenizer.eot]
    for number in range(config.samples):
        ids = generate(
            model,
            start + tokenizer.encode(config.prompt),
            config.tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            vocab_size=tokenizer.vocab_size,
            stop=tokenizer.eot,
            seed=config.seed + number,
            device=device,
        )
        print(config.prompt + tokenizer.decode(ids))
        if number + 1 < config.samples:
            print("---")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("moe-sample", SampleConfig, sample, argv, "Text from a run of moe-train.")


if __name__ == "__main__":
    sys.exit(main())
