"""`moe-bench`: measurements and checks, a subcommand each."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "kernels": ("kernels", "the kernels one by one against PyTorch and what the machine's products and copies reach"),
    "layer": ("layer", "one MoE layer, forward and backward, against every peer that is installed: time, memory"),
    "throughput": ("throughput", "training steps of a preset, split into their parts, against peers and the targets"),
    "memory": ("memory", "peak memory of a training step by kind, counted under fake tensors; the largest batch"),
    "checkpoint": ("checkpoint", "saving and loading: what training waits for, bandwidth, the share of training time"),
    "compile": ("compile_only", "compile the kernels for GPUs that are not at hand; registers, spills, instructions"),
    "traffic": ("traffic", "memory traffic and launches of a layer's kernels, counted in Triton's interpreter"),
    "roofline": ("roofline", "what cards could do at best, projected: launches, steps, scaling, days, dollars"),
    "report": ("report", "one page with pictures from the newest results of bench/results"),
    "compare": ("compare", "two files of results: what became slower or larger, beyond the noise"),
    "all": ("all", "everything that this machine can do, --quick in ten minutes; one folder with rows and pictures"),
    "gpu": ("gpu", "a GPU in eight minutes: correctness, then kernels, layer and throughput"),
}
"""Subcommand → its module in this folder, imported when it is called, and what it is for."""


def usage() -> str:
    """What `--help` prints."""
    lines = [f"  {name:12}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(["Usage: moe-bench SUBCOMMAND [OPTIONS]", "", *lines, "", "Options: moe-bench SUBCOMMAND --help"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in ("--help", "-h"):
        print(usage())
        return 0
    if name in COMMANDS:
        return importlib.import_module(f"moe_engine.bench.{COMMANDS[name][0]}").main(rest)
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
    print(f"error: no such subcommand {name!r}; {hint}" if name else f"error: {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
