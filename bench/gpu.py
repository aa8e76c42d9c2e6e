"""One command for a GPU host: correctness first, then kernels, layer and throughput, within eight minutes.

    moe-bench gpu --out out/gpu

Needs nothing but what such a host has besides PyTorch and Triton: pytest, pytest-benchmark, transformers, matplotlib.
The tests of the kernels run on the device for as long as their share of the time lasts, those of whole layers first.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import torch

from moe_engine.bench.suite import Ended, Step, finish, open_folder, run_process, run_step
from moe_engine.presets import preset
from moe_engine.train.cli import run_command
from moe_engine.train.device import memory_total
from moe_engine.train.errors import InputError
from moe_engine.train.options import option

TESTS = Path(__file__).resolve().parent.parent / "tests"
# What decides first: whole layers, then their parts; then the others of the kernels.
CORRECTNESS = ("kernels/test_expert_mlp.py", "moe_engine/test_moe.py", "kernels/test_grouped_gemm.py",
               "kernels/test_gating.py", "kernels/test_permutation.py")  # fmt: skip


@dataclass(frozen=True)
class GpuConfig:
    """Options of `moe-bench gpu`."""

    out: str = option("out/gpu", "folder for results.json, pictures and report; made, must be empty")
    minutes: float = option(8.0, "time for all of it")


def counts(path: Path) -> dict[str, int]:
    """Numbers of tests that passed, failed and were skipped, from pytest's XML; zeros where there is none."""
    found = dict.fromkeys(("passed", "failed", "skipped"), 0)
    if path.is_file():
        for suite in ElementTree.parse(path).getroot().iter("testsuite"):
            number = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
            failed = number["failures"] + number["errors"]
            found["failed"] += failed
            found["skipped"] += number["skipped"]
            found["passed"] += number["tests"] - failed - number["skipped"]
    return found


def files_to_test() -> list[str]:
    """The tests to run, in this order.

    Files alone: where a folder is among its arguments too, pytest 9 takes files of it in the folder's own order.
    """
    first = [TESTS / name for name in CORRECTNESS]
    return [str(path) for path in (*first, *sorted(set((TESTS / "kernels").glob("test_*.py")) - set(first)))]


def correctness(out: Path, seconds: float) -> Ended:
    """The kernels' tests on the device, as many as there is time for."""
    if not TESTS.is_dir():
        note = "only a source tree has tests/; every benchmark below checks its own results"
        return Ended("correctness", 0, 0.0, note)
    xml = out / "rows" / "correctness.xml"
    print("\n== correctness: the kernels' tests", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=25", f"--junitxml={xml}"]
    command += [f"--rootdir={TESTS.parent}", "-c", str(TESTS.parent / "pyproject.toml"), *files_to_test()]
    begin = time.perf_counter()
    status = run_process(command, seconds)
    number = counts(xml)
    note = ", ".join(f"{value} {name}" for name, value in number.items())
    if status is None and number["passed"] and not number["failed"]:  # what there was time for
        status, note = 0, f"{note}; the rest was not reached in time"
    return Ended("correctness", status, time.perf_counter() - begin, note)


def depth(memory: float) -> int:
    """Layers of `8b` whose fp32 weights, gradients and AdamW moments take no more than 0.6 of the memory in bytes."""
    config = preset("8b")
    while config.num_layers > 1:
        total = config.matrix_parameters()[0] + config.vocab_size * config.d_model
        if 16 * total <= 0.6 * memory:
            break
        config = replace(config, num_layers=config.num_layers - 1)
    return config.num_layers


def training(memory: float) -> tuple[str, ...]:
    """Options of `moe-bench throughput` on one GPU: the guide's row for it, or a cut of `8b` where torchao is missing.

    Without 8-bit moments no single card of 80 GB holds all of it. A block's speed does not depend on how many there
    are; the output layer weighs more in a cut, which its share of the step shows. One micro-step a step: at the guide's
    own speed nine steps of them end in time, of four they do not.
    """
    if importlib.util.find_spec("torchao"):
        return ("--grad_accum_steps", "1")
    layers = depth(memory)
    print(f"torchao is not installed: 8b is cut to {layers} of its layers, and the guide's targets are not checked")
    options = {"preset": "8b", "model.num_layers": layers, "batch_size": 4, "block_size": 4096, "grad_accum_steps": 1}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return (*flags, "--checkpointing", "block", "--allow_unchecked")


def steps(seconds: float, memory: float) -> list[Step]:
    """What `moe-bench gpu` runs after the tests: shares of its time."""
    some = ("gate", "sort", "permute", "combine", "gemm_up", "gemm_dw", "mlp", "mlp_backward", "losses")
    return [
        Step("kernels", ("--rounds", "10", "--routing", "balanced", "skewed", "--ops", *some), 0.25 * seconds),
        Step("layer", ("--rounds", "10"), 0.2 * seconds),
        Step("throughput", ("--rounds", "5", "--part_steps", "2", *training(memory)), 0.22 * seconds),
    ]


def run_gpu(config: GpuConfig) -> int:
    """`moe-bench gpu`."""
    if not config.minutes > 0:
        raise InputError(f"--minutes: expected more than 0, got {config.minutes:g}")
    if not torch.cuda.is_available():
        raise InputError("moe-bench gpu: expected a CUDA or ROCm device, found none; moe-bench all runs without")
    out, seconds = open_folder(config.out), 60 * config.minutes
    end = time.perf_counter() + seconds - 60  # the report's
    ended = [correctness(out, 0.2 * seconds)]
    for step in steps(seconds, memory_total(torch.device("cuda"))):
        ended.append(run_step(step, out, end - time.perf_counter()))
    return finish(out, ended, torch.device("cuda"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("moe-bench gpu", GpuConfig, run_gpu, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
