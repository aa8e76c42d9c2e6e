"""The compiling process of `moe-bench compile`: one target, one run of the layer, a report.

    python -m moe_engine.bench.compile_worker       a `Job` as JSON on standard input, a `Report` on standard output

Each target has a process of its own, see `standin.py`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import runpy
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_engine.bench.machine_code import read, violations
from moe_engine.bench.shapes import DTYPES
from moe_engine.config import MoEConfig
from moe_engine.presets import preset

if TYPE_CHECKING:
    import torch

    from moe_engine.bench.standin import Recorder

PHASES = ("forward", "loss", "backward", "other", "candidate")
"""When a kernel is launched; `other`: by an op that the layer does without, `candidate`: with a tile for tuning."""


@dataclass(frozen=True)
class Job:
    """What to compile, and for what.

    Attributes:
        arch: a key of `machine_code.CARDS`.
        preset, tokens, dtype: the layer and its input; dtype is a key of `shapes.DTYPES`.
        save: the expert MLP's memory mode.
        candidates: every tile that tuning would measure, besides the default ones.
        script: a Python file to run in place of the layer.
    """

    arch: str
    preset: str = "8b"
    tokens: int = 16_384
    dtype: str = "bf16"
    save: str = "h"
    candidates: bool = False
    script: str | None = None


@dataclass
class Report:
    """What came of a job.

    Attributes:
        rows: for each specialisation the fields of `machine_code.Compiled`, its `blocks`, `resident_warps` and
            `violations`, and `launches`, how often it was launched in each phase.
        errors: what went wrong on the way, a line each.
        unused: kernels of the package that nothing launched.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def run_job(job: Job) -> Report:
    """Run a job in a new process, without Triton's interpreter whatever this process has."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", "moe_engine.bench.compile_worker"],
        input=json.dumps(dataclasses.asdict(job)),
        capture_output=True,
        text=True,
        env=environment,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        return Report(errors=[f"the compiling process ended with status {process.returncode}: {last}"])
    return Report(**json.loads(process.stdout))


def _run_layer(job: Job, recorder: Recorder) -> None:
    """One forward and backward of the layer, then of the ops that stand alone; nearly no tensor is ever written to."""
    import torch

    from moe_engine import MoELayer
    from moe_engine.kernels.aux_loss import aux_losses

    dtype = getattr(torch, DTYPES[job.dtype])
    config = dataclasses.replace(preset(job.preset).moe, backend="triton", save=job.save, autotune=job.candidates)
    with torch.device("meta"):
        layer = MoELayer(config).to(dtype)
    layer.to_empty(device="cpu")
    x = torch.empty(job.tokens, config.d_model, dtype=dtype, requires_grad=True)
    recorder.phase = "forward"
    out, stats = layer(x)
    recorder.phase = "loss"
    balance, z = aux_losses(stats.expert_counts, stats.prob_sum, stats.lse_sq, config.top_k)
    statistics = torch.autograd.grad([balance, z], [stats.prob_sum, stats.lse_sq], [balance, z])
    recorder.phase = "backward"
    torch.autograd.backward([out, stats.prob_sum, stats.lse_sq], [torch.empty_like(out), *statistics])
    recorder.phase = "other"
    _run_other_ops(config, job.tokens, dtype)


def _run_other_ops(config: MoEConfig, tokens: int, dtype: torch.dtype) -> None:
    """The public ops that the layer does without, each with its backward."""
    import torch

    from moe_engine.kernels.grouped_gemm import grouped_gemm
    from moe_engine.kernels.permutation import combine, permute
    from moe_engine.kernels.swiglu import gated

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    d, f, e, k = config.d_model, config.d_ff, config.num_experts, config.top_k
    n = tokens * k
    offsets = torch.empty(e + 1, dtype=torch.int32)
    order, inverse = torch.empty(2, n, dtype=torch.int32).unbind()
    rows = permute(empty(tokens, d), order, inverse)
    y = grouped_gemm(rows, empty(e, d, d), offsets, empty(e, d))
    out = combine(y, empty(tokens, k, dtype=torch.float32), inverse)
    a = gated(empty(n, 2 * f), 1.702, 1.0, 7.0)
    torch.autograd.backward([out, a], [torch.empty_like(out), torch.empty_like(a)])


@contextmanager
def _all_candidates(report: Report, recorder: Recorder) -> Iterator[None]:
    """Launch every GEMM with each tile that tuning would measure, in a phase of its own, before the default one.

    The interface to the kernels is `launch.choose`: they call it for a tile, with a function that launches one.
    """
    from moe_engine.kernels import launch

    def choose(kernel: str, dtype: Any, rows_per_expert: int, columns: int, depth: int, run: Any = None) -> Any:
        phase, recorder.phase = recorder.phase, "candidate"
        for tile in launch.candidates(kernel, dtype, rows_per_expert) if run else ():
            try:
                run(tile)
            except Exception as error:  # whatever a compiler may come up with
                report.errors.append(f"candidate of {kernel}, {tile}: {_line(error)}")
        recorder.phase = phase
        return launch.default_tile(kernel, dtype, rows_per_expert)

    original, launch.choose = launch.choose, choose
    try:
        yield
    finally:
        launch.choose = original


def _line(error: BaseException) -> str:
    """An error in one line, with the last place in our own code that it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent.name == "kernels"]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = (str(error).strip().splitlines() or [""])[-1].strip()
    return f"{type(error).__name__}{where}: {text[:300]}"


def _unused(recorder: Recorder) -> list[str]:
    """Names of the package's kernels that were never compiled."""
    from triton.runtime import JITFunction

    from moe_engine import kernels

    used, found = {id(s.source.fn) for s in recorder.specialisations}, []
    for module in pkgutil.iter_modules(kernels.__path__, "moe_engine.kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            own = isinstance(value, JITFunction) and value.fn.__module__ == module.name
            if own and name.endswith("_kernel") and name != "_probe_kernel" and id(value) not in used:
                found.append(name)
    return sorted(found)


def _rows(arch: str, recorder: Recorder) -> Iterator[dict[str, Any]]:
    for s in recorder.specialisations:
        code = {}
        for path in map(Path, s.files.values()):
            level = path.suffix[1:]
            if level in ("ttir", "ttgir", "llir", "ptx", "amdgcn"):
                code[level] = path.read_text(encoding="utf-8")
            elif level == "cubin":
                code[level] = path.read_bytes()
        if not code:  # refused by Triton before it was loaded: in the errors
            continue
        function = s.source.fn
        constants = {function.arg_names[place[0]]: value for place, value in s.source.constants.items()}
        compiled = read(arch, function.__name__, constants, s.metadata, code)
        yield dataclasses.asdict(compiled) | {
            "blocks": compiled.blocks,
            "resident_warps": compiled.resident_warps,
            "violations": violations(compiled),
            "launches": s.launches,
        }


def work(job: Job) -> Report:
    """The job itself, in this process."""
    from moe_engine.bench.standin import install, no_host_reads

    recorder, report = install(job.arch), Report()
    try:
        if job.script:
            runpy.run_path(job.script, run_name="__main__")
        else:
            with no_host_reads(), _all_candidates(report, recorder) if job.candidates else nullcontext():
                _run_layer(job, recorder)
            report.unused = _unused(recorder)
    except Exception as error:
        report.errors.append(_line(error))
        traceback.print_exc()
    report.rows = list(_rows(job.arch, recorder))
    return report


def main() -> int:
    """The compiling process."""
    result = os.dup(1)
    os.dup2(2, 1)  # what kernels or Triton print must not get between the lines of the result
    report = work(Job(**json.load(sys.stdin)))
    with os.fdopen(result, "w") as f:
        json.dump(dataclasses.asdict(report), f)
    return 0


if __name__ == "__main__":
    sys.exit(main())
