"""The kernels one by one, beside what PyTorch has for the same, and beside what the machine can do.

    moe-bench kernels                                            the layers of five models on a GPU, `cpu` on a CPU
    moe-bench kernels --shapes 8b --ops mlp mlp_backward --routing balanced
    pytest bench/kernels.py                                      the same in a source tree, as pytest-benchmark shows it

Before an operation is timed its results are held against fp64, all of them, on the inputs that it is timed with; what
is wrong has no time, and the command ends with status 1. A round is one call: by the clock on a CPU; on a GPU by its
events, with the L2 cache emptied. On a CPU, which is now fast and now slow, each operation is come back to --visits
times, with a part of its rounds. Bytes are the least that the operation can move: each of its tensors once, the
expert MLP's once in each launch. What a product and a copy reach is measured in the same run; the time at which an
operation would do its FLOPs and move its bytes at these rates, whichever takes longer, is its bound, and "of bound"
is the bound over the time: above 1 where a cache serves what the copy has to fetch from memory.

Without a GPU, kernels run in Triton's interpreter alone (TRITON_INTERPRET=1): they are checked there, and not timed.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_engine.bench.kernel_picture import draw
from moe_engine.bench.kernel_run import BAD, PEER, PLUGIN, TIMED, Case, KernelRun, KernelsConfig
from moe_engine.bench.runner import append_rows, check_writable
from moe_engine.train.cli import run_command
from moe_engine.train.device import device_name
from moe_engine.train.errors import InputError

# -- what pytest collects --


def pytest_generate_tests(metafunc: Any) -> None:
    """pytest's hook: one test for each case of the run, which is one with all defaults where no other is registered."""
    import pytest

    manager = metafunc.config.pluginmanager
    run = manager.get_plugin(PLUGIN)
    if run is None:
        run = KernelRun(KernelsConfig())
        manager.register(run, PLUGIN)
    parameters = []
    for case in run.cases():
        group = f"{case.problem.shape}, {case.problem.routing}, {case.op}"
        mark = pytest.mark.benchmark(timer=run.clock, group=group, disable_gc=True)
        parameters.append(pytest.param(case, run, marks=mark, id=str(case)))
    metafunc.parametrize(("case", "run"), parameters)


def test_kernel(case: Case, run: KernelRun, benchmark: Any) -> None:
    """One operation by one implementation."""
    import pytest

    status = run.measure(case, benchmark)
    if status.startswith(BAD) and case.implementation != PEER:
        pytest.fail(status, pytrace=False)
    if status != TIMED:
        pytest.skip(status)


# -- the command --


def table(run: KernelRun) -> Iterator[str]:
    """The rows as lines of text."""
    yield f"{'':34}{'ms p20':>9}{'p50':>9}{'p80':>9}{'GFLOP/s':>10}{'GB/s':>9}{'of bound':>10}"
    heading = None
    for row in run.rows:
        settings = row["settings"]
        if "shape" in settings and heading != (heading := (settings["shape"], settings["routing"])):
            yield f"{', '.join(heading)}"
        name = f"  {row['name']:32}" if "shape" in settings else f"{row['name']:34}"
        if row["status"] != TIMED:
            yield f"{name}  {row['status']}"
            continue
        times = "".join(f"{1e3 * row[p]:9.3f}" for p in ("p20", "p50", "p80"))
        rate, bandwidth = (row.get(unit) and row[unit] / row["p50"] / 1e9 for unit in ("flops", "bytes"))
        rate, bandwidth = (f"{value:.1f}" if value else "" for value in (rate, bandwidth))
        fraction = f"{row['fraction']:.2f}" if "fraction" in row else ""
        yield f"{name}{times}{rate:>10}{bandwidth:>9}{fraction:>10}"


def kernels(config: KernelsConfig) -> int:
    """Check, measure, print a table; returns the exit status."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise InputError(
            "moe-bench kernels needs pytest-benchmark, which is not installed: pip install 'moe-engine[bench]'"
        )
    import pytest

    check_writable(output=config.output, picture=config.picture)
    run = KernelRun(config)
    # Only this file, with pytest-benchmark alone: no settings of a project around, no output of their own.
    others = [f"-pno:{name}" for name in ("terminal", "cacheprovider", "timeout", "xdist", "faulthandler")]
    options = ["--import-mode=importlib", "-o", "addopts=", "--capture=no", "--benchmark-enable", "--benchmark-quiet"]
    with tempfile.TemporaryDirectory() as folder:  # for earlier results, which it would keep where we are
        status = pytest.main([*others, *options, f"--benchmark-storage={folder}", __file__], plugins=[run])
    dtype = str(run.dtype).removeprefix("torch.")
    print(f"T {run.tokens}, {dtype}, {device_name(run.device)}, {config.rounds} rounds")
    print("\n".join(table(run)))
    if config.output:
        append_rows(Path(config.output), run.rows)
    if config.picture and any("p50" in row for row in run.rows):
        draw(Path(config.picture), run.rows)
    if status == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    for failure in run.failures:
        print(f"failed: {failure}", file=sys.stderr)
    return int(status != pytest.ExitCode.OK)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("moe-bench kernels", KernelsConfig, kernels, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
