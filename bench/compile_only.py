"""Every kernel of a layer, compiled for GPUs that are not at hand, and held to the rules of what a default may be.

    moe-bench compile --arch sm_80 sm_90 sm_100 gfx942

The forward and backward of the preset's MoE layer run as they would on each GPU, with a stand-in for Triton's driver
(`standin.py`), and what was compiled is read from the machine code (`machine_code.py`). A line for each
specialisation; then, a line each, the rules that one breaks: spills or stack, a 16-bit product without the target's
tensor-core instruction, a product without asynchronous copies or TMA (NVIDIA), more shared memory than a block has,
fewer than 8 resident warps, atomic additions of floating-point numbers. Then the exit status is 1.

Nothing is timed, and no claim of speed follows from this table alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_engine.bench.compile_worker import PHASES, Job, Report, run_job
from moe_engine.bench.machine_code import CARDS
from moe_engine.bench.runner import append_rows, check_writable, make_row
from moe_engine.bench.shapes import DTYPES
from moe_engine.config import SAVE
from moe_engine.presets import PRESETS
from moe_engine.train.cli import run_command
from moe_engine.train.errors import InputError
from moe_engine.train.options import option

DEFAULT_ARCH = ("sm_80", "sm_90", "sm_100", "gfx942")
PROCESSES = 2  # each holds a compiler and takes a core


@dataclass(frozen=True)
class CompileConfig:
    """Options of the command."""

    arch: list[str] = option(
        default_factory=lambda: list(DEFAULT_ARCH), help="targets to compile for", choices=tuple(CARDS)
    )
    preset: str = option("8b", "model whose layer it is", choices=tuple(PRESETS))
    tokens: int = option(16_384, "tokens that go through the layer; tiles depend on it")
    dtype: str = option("bf16", "of weights and activations", choices=tuple(DTYPES))
    save: str = option("h", "what the experts keep for backward", choices=SAVE)
    candidates: bool = option(False, "compile every tile that tuning would measure; of those a violation is a remark")
    script: str | None = option(None, "Python file to run in place of the layer: whatever kernels it launches")
    output: str | None = option(None, "JSONL file to append the rows to")


def _tile(row: dict[str, Any]) -> str:
    """`128·256·64` where there are those three, else every BLOCK_… by value."""
    constants = row["constants"]
    names = [n for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if n in constants]
    names += sorted(n for n in constants if n.startswith("BLOCK_") and n not in names)
    tile = "·".join(str(constants[n]) for n in names)
    return tile + (f"/{constants['SUBTILES']}" if "SUBTILES" in constants else "")


def _name(row: dict[str, Any]) -> str:
    """The kernel with the variants that its true constants choose: `_grouped_gemm_kernel bias`."""
    chosen = [name.lower() for name, value in row["constants"].items() if value is True]
    return " ".join([row["kernel"].strip("_").removesuffix("_kernel"), *chosen])


_COLUMNS = "{:3} {:40} {:>13} {:>5} {:>6} {:>4} {:>5} {:>7} {:>6} {:>12} {:>5} {:>3} {:>5} {:>6} {:>6}"
_HEADINGS = _COLUMNS.format(
    *("in", "kernel", "tile", "warps", "stages", "regs", "stack", "spill", "shared", "tensor cores", "async", "TMA"),
    *("instr", "blocks", "per SM"),
)
_LEGEND = """\
in: forward, loss, backward, or an op that the layer does without; tile: BLOCK_M·N·K / parts of the epilogue;
regs, stack: registers and bytes of a thread; spill: loads/stores; shared: bytes of a block; tensor cores, async, TMA,
instr: instructions; blocks: that an SM can hold; per SM: their warps; ✗: breaks a rule"""


def _table_line(row: dict[str, Any]) -> str:
    ops = row["tensor_ops"]
    name = _name(row)
    line = _COLUMNS.format(
        "".join(phase[0] for phase in PHASES if phase in row["launches"]),
        name if len(name) <= 40 else name[:39] + "…",
        _tile(row),
        row["warps"],
        row["stages"],
        row["registers"],
        row["stack"],
        f"{row['spill_loads']}/{row['spill_stores']}",
        row["shared"],
        f"{sum(ops.values())} {min(ops, key=len).split('_f32')[0]}" if ops else "-",
        row["async_copies"],
        row["tma"],
        row["instructions"],
        row["blocks"],
        row["resident_warps"],
    )
    return line + ("  ✗" if row["violations"] else "")


def is_default(row: dict[str, Any]) -> bool:
    """Whether the kernel is launched without tuning."""
    return set(row["launches"]) != {"candidate"}


def failures(arch: str, report: Report) -> list[str]:
    """Why the status is 1, a line each: what did not compile, and the rules that a default kernel breaks."""
    lines = [f"{arch}: {error}" for error in report.errors]
    for row in report.rows:
        if is_default(row):
            lines += [f"{arch}: {_name(row)}, tile {_tile(row)}: {v}" for v in row["violations"]]
    lines += [f"{arch}: {name}: never launched, so nothing is known of it" for name in report.unused]
    if not report.rows and not report.errors:
        lines.append(f"{arch}: no kernel was launched")
    return lines


def _print(arch: str, report: Report) -> None:
    default = [row for row in report.rows if is_default(row)]
    counts = {phase: sum(row["launches"].get(phase, 0) for row in default) for phase in PHASES[:-1]}
    launches = ", ".join(f"{number} {phase}" for phase, number in counts.items() if number)
    print(f"\n{arch} ({CARDS[arch].name}): {len(default)} kernels" + (f"; launches: {launches}" if launches else ""))
    print(_HEADINGS)
    for row in default:
        print(_table_line(row))
    others = [row for row in report.rows if not is_default(row)]
    if others:
        print(f"candidates for tuning: {len(others)} more kernels")
    for row in others:
        print(_table_line(row), *row["violations"], sep="\n    ")


def _rows(arch: str, report: Report, config: CompileConfig) -> list[dict[str, Any]]:
    """Results as rows: what tells two kernels of a layer apart is a setting; what the compiler made of it is not."""
    chosen = {"preset": config.script or config.preset}
    chosen |= {name: getattr(config, name) for name in ("tokens", "dtype", "save")}
    device, rows = f"none, compiled for {CARDS[arch].name}", []
    for found in report.rows:
        settings = chosen | {name: found[name] for name in ("arch", "constants", "warps", "stages")}
        values = {name: value for name, value in found.items() if name not in settings and name != "kernel"}
        rows.append(make_row("compile", found["kernel"], settings, device, **values, default=is_default(found)))
    return rows


def compile_only(config: CompileConfig) -> int:
    """Compile, print the tables, say what breaks a rule; returns the exit status."""
    if config.tokens < 1:
        raise InputError(f"--tokens: expected a positive number, got {config.tokens}")
    if config.script and not Path(config.script).is_file():
        raise InputError(f"--script {config.script}: no such file")
    archs = list(dict.fromkeys(config.arch))
    if not archs:
        raise InputError(f"--arch: expected at least one of {', '.join(CARDS)}")
    check_writable(output=config.output)
    jobs = [
        Job(arch, config.preset, config.tokens, config.dtype, config.save, config.candidates, config.script)
        for arch in archs
    ]
    what = config.script or f"MoE layer of {config.preset}, {config.tokens} tokens, {config.dtype}"
    print(f"{what}: forward and backward, compiled and not run\n{_LEGEND}")
    broken: list[str] = []
    with ThreadPoolExecutor(PROCESSES) as pool:
        for arch, report in zip(archs, pool.map(run_job, jobs), strict=True):
            _print(arch, report)
            broken += failures(arch, report)
            if config.output:
                append_rows(Path(config.output), _rows(arch, report, config))
    print("\nno rule is broken" if not broken else "\nbroken rules:\n  " + "\n  ".join(broken))
    return 1 if broken else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("moe-bench compile", CompileConfig, compile_only, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
