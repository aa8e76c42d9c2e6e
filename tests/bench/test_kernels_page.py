"""docs/kernels.md says what the committed rows say, and what the code does."""

import json
import re
import shlex
from pathlib import Path

from moe_engine.bench import checkpoint, memory, plan, projection
from moe_engine.bench.all import AllConfig
from moe_engine.bench.compare import CompareConfig
from moe_engine.bench.compile_only import CompileConfig
from moe_engine.bench.gpu import GpuConfig
from moe_engine.bench.kernel_run import KernelsConfig
from moe_engine.bench.layer import LayerConfig
from moe_engine.bench.report import ReportConfig
from moe_engine.bench.shapes import LayerShape
from moe_engine.bench.traffic import TrafficConfig
from moe_engine.train.cli import build, parse

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PRODUCTS = {  # the table's rows: kernel, phase, which of them in it
    "up_fwd": ("_up_fwd_kernel", "forward", 0),
    "down-projection": ("_grouped_gemm_kernel", "forward", 0),
    "down_bwd": ("_down_bwd_kernel", "backward", 0),
    "grad_w_down": ("_weight_grad_kernel", "backward", 0),
    "grad_h @ w_upᵀ": ("_grouped_gemm_kernel", "backward", 0),
    "grad_w_up": ("_weight_grad_kernel", "backward", 1),
}


def test_the_commands_of_the_pages_are_accepted():
    configs = {"kernels": KernelsConfig, "layer": LayerConfig, "compile": CompileConfig, "traffic": TrafficConfig}
    configs |= {"report": ReportConfig, "compare": CompareConfig, "all": AllConfig, "gpu": GpuConfig}
    of_training = {"memory": memory.Flags, "throughput": plan.Flags, "roofline": projection.Flags}
    of_training["checkpoint"] = checkpoint.Flags
    calls = re.findall(r"^moe-bench [a-z].*$", PAGE + README + BENCHMARKS, re.M)
    assert len(calls) >= 8
    for call in calls:
        _, name, *arguments = shlex.split(call, comments=True)
        if name in of_training:  # their flags are those of moe-train, put together with a file's
            parse(name, of_training[name], arguments)
        else:
            build(configs[name], parse(name, configs[name], arguments))


def _rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "bench/results" / name).read_text(encoding="utf-8").splitlines()]


def test_the_table_of_machine_code_is_that_of_the_rows():
    rows = _rows("compile.jsonl")
    assert {row["versions"]["triton"][:3] for row in rows} == {"3.6", "3.8"}
    assert not any(row["violations"] for row in rows)
    for name, (kernel, phase, which) in PRODUCTS.items():
        cells = []
        for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
            found = [
                row
                for row in rows
                if (row["settings"]["arch"], row["name"], row["versions"]["triton"]) == (arch, kernel, "3.8.0")
                and phase in row["launches"]
            ]
            tile = found[which]["settings"]["constants"]
            sizes = f"{tile['BLOCK_M']}·{tile['BLOCK_N']}·{tile['BLOCK_K']}"
            cells.append(f"{sizes}, {found[which]['registers']}, {found[which]['shared'] // 1024}")
        assert f"| {name} | {' | '.join(cells)} |" in PAGE


def test_the_table_of_traffic_is_that_of_the_rows():
    for row in _rows("traffic.jsonl"):
        launches = [launch["phase"] for launch in row["launches"]]
        counts = f"{launches.count('forward')} + {launches.count('backward')}"
        ratios = [f"{row['bytes'][phase] / row['floor'][phase]:.3f} ×" for phase in ("forward", "backward")]
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| `--save {row['settings']['save']}`"))
        assert re.findall(r"[\d.]+ ×", line) == ratios and line.endswith(f"| {counts} |")


def test_the_launches_add_up_to_the_floors():
    shape = {"T": 7, "D": 11, "F": 13, "E": 3, "K": 2}
    sums = {"forward": 0, "backward": 0}
    for number, cells in re.findall(r"^\| (\d+) \|(.*)\|$", PAGE, re.M):
        if number == "8" or not (terms := re.findall(r"(\d+)([TDKEF]+)", cells.split("|")[-1])):
            continue
        for factor, letters in terms:
            product = int(factor)
            for letter in letters:
                product *= shape[letter]
            sums["forward" if int(number) <= 6 else "backward"] += product
    assert sums == LayerShape(7, 11, 13, 3, 2).floors()
