"""Everything that this machine can measure or check, in one folder.

moe-bench all --quick --out out/bench     within ten minutes on two cores
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from moe_engine.bench import gpu
from moe_engine.bench.suite import Step, finish, open_folder, run_step
from moe_engine.train.cli import run_command
from moe_engine.train.device import memory_total, pick_device
from moe_engine.train.options import option


@dataclass(frozen=True)
class AllConfig:
    """Options of `moe-bench all`."""

    out: str = option("out/bench", "folder for results.json, pictures and report; made, must be empty")
    quick: bool = option(False, "ten minutes on two cores: fewer rounds, fewer targets")


def steps(quick: bool, training: tuple[str, ...]) -> list[Step]:
    """What `moe-bench all` runs.

    Args:
        quick: see `AllConfig`.
        training: options of `moe-bench throughput`.
    """
    rounds = ("--rounds", "7" if quick else "30")
    archs = ("sm_80", "sm_90") if quick else ("sm_80", "sm_90", "sm_100", "gfx942")
    limit = 1.0 if quick else 6.0
    return [
        Step("roofline", (), 30 * limit),
        Step("traffic", (), 40 * limit, picture=False),
        Step("compile", ("--arch", *archs), 60 * limit, picture=False),
        Step("memory", (), 90 * limit),
        Step("checkpoint", ("--preset", "tiny", "--batch_size", "2", "--rounds", "2"), 30 * limit, picture=False),
        Step("kernels", (*rounds, "--routing", "balanced"), 90 * limit),
        Step("layer", rounds, 90 * limit),
        Step("throughput", (*rounds, *training), 110 * limit),
    ]


def run_all(config: AllConfig) -> int:
    """`moe-bench all`."""
    out, device = open_folder(config.out), pick_device("auto")
    training = gpu.training(memory_total(device)) if device.type == "cuda" else ("--allow_unchecked",)
    ended = [run_step(step, out, step.seconds) for step in steps(config.quick, training)]
    return finish(out, ended, device)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("moe-bench all", AllConfig, run_all, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
