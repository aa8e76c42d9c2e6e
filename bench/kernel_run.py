"""What one run of `moe-bench kernels` measures: its options, its clock, its rows.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k
"""

from __future__ import annotations

import importlib.util
import itertools
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from moe_engine.bench.kernel_checks import check, needed_bytes
from moe_engine.bench.kernel_inputs import Inputs, Problem
from moe_engine.bench.kernel_ops import MAKERS, PRODUCTS, floor_bytes, flops
from moe_engine.bench.runner import Timer, make_row
from moe_engine.bench.shapes import DTYPES, ROUTING, SHAPES
from moe_engine.config import MoEConfig
from moe_engine.train.device import keep_freed_memory, memory_total, pick_device
from moe_engine.train.errors import InputError
from moe_engine.train.options import option

PLUGIN = "moe-bench-kernels"
WARM_UP = 0.1  # seconds of calls before the first round: clocks rise, caches fill
TIMED, INTERPRETED = "ok", "checked, not timed: Triton's interpreter"
BAD = ("wrong", "failed")
"""What the status of a row begins with where the operation is at fault."""
CPU_BAND = 0.25
"""Least band of an operation on a CPU. Its time depends on where its memory lies, which is the same for all of a run:
two runs in a row differed by up to a fifth where their rounds differed by 3 %."""
PEER = "grouped_mm"
"""Not ours: where it is wrong, or is not for a device or a dtype, its row says so, and that is all."""
SIZES = ("d_model", "d_ff", "experts", "top_k")
CEILINGS = {"cuda": (8192, 1 << 30), "cpu": (1024, 1 << 28)}
"""Side of the square product and bytes of the copy that are measured as ceilings."""


@dataclass(frozen=True)
class KernelsConfig:
    """Options of the benchmark."""

    shapes: list[str] | None = option(
        None, "layers; all but `cpu` on a GPU, `cpu` on a CPU unless given", choices=tuple(SHAPES)
    )
    routing: list[str] = option(
        default_factory=lambda: list(ROUTING), help="how tokens spread over experts", choices=ROUTING
    )
    ops: list[str] = option(default_factory=lambda: list(MAKERS), help="operations", choices=tuple(MAKERS))
    tokens: int | None = option(None, "tokens T; 8192 on a GPU, 1024 on a CPU unless given")
    dtype: str | None = option(None, "of weights and rows; bf16 on a GPU, fp32 on a CPU unless given", choices=DTYPES)
    device: str = option("auto", "what computes", choices=("auto", "cuda", "cpu"))
    rounds: int = option(20, "timed rounds, over all visits")
    visits: int | None = option(None, "times that an operation is come back to; 5 on a CPU, 1 on a GPU unless given")
    d_model: int | None = option(None, "model width D in place of the shapes'")
    d_ff: int | None = option(None, "hidden width F of one expert in place of the shapes'")
    experts: int | None = option(None, "number of experts E in place of the shapes'")
    top_k: int | None = option(None, "experts per token K in place of the shapes'")
    output: str | None = option(None, "JSONL file to append the rows to")
    picture: str | None = option(None, "PNG to draw the fractions of the bound into")

    def __post_init__(self) -> None:
        for name in ("tokens", "rounds", "visits"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name}: expected at least 1, got {value}")

    def layer(self, shape: str) -> tuple[str, MoEConfig]:
        """Name and sizes of a layer, those given in place of its own.

        Raises:
            InputError: there is no such layer.
        """
        moe = SHAPES[shape]
        own = dict(zip(SIZES, (moe.d_model, moe.d_ff, moe.num_experts, moe.top_k), strict=True))
        given = {name: getattr(self, name) for name in SIZES if getattr(self, name) not in (None, own[name])}
        label = ", ".join([shape, *(f"{name} {value}" for name, value in given.items())])
        if "experts" in given:
            given["num_experts"] = given.pop("experts")
        try:
            return label, replace(moe, **given)
        except ValueError as error:
            raise InputError(f"--{str(error).replace('num_experts', 'experts')}") from None


class DeviceClock:
    """A clock that only moves while `measure` measures, by what a timer finds.

    pytest-benchmark takes its difference around a call of `measure` for the time of a round.
    """

    def __init__(self, timer: Callable[[Callable[[], Any]], float]) -> None:
        self.timer, self.now = timer, 0.0

    def measure(self, function: Callable[[], Any]) -> None:
        """Call a function and move on by its seconds."""
        self.now += self.timer(function)

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    problem: Problem
    op: str
    implementation: str
    visit: int = 0

    def __str__(self) -> str:
        name = f"{self.problem.shape}-{self.problem.routing}-{self.op}-{self.implementation}"
        return f"{name}-{self.visit}" if self.visit else name


class KernelRun:
    """What one run measures, and its rows; also the pytest plugin by which the tests of `kernels.py` find it."""

    def __init__(self, config: KernelsConfig) -> None:
        self.__name__ = PLUGIN  # what pytest registers a plugin under
        self.config, self.device = config, pick_device(config.device)
        on_gpu = self.device.type == "cuda"
        self.dtype = getattr(torch, DTYPES[config.dtype or ("bf16" if on_gpu else "fp32")])
        self.tokens = config.tokens or (8192 if on_gpu else 1024)
        self.layers = [
            config.layer(s) for s in config.shapes or ([s for s in SHAPES if s != "cpu"] if on_gpu else ["cpu"])
        ]
        self.interpreted = not on_gpu and _kernels_interpreted()
        # A CPU is fast for some seconds and then slow: rounds spread over the run show it, and the band has it.
        self.visits = config.visits or (1 if on_gpu else 5)
        self.visits = min(self.visits, config.rounds)
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._seconds: dict[str, list[np.ndarray]] = {}  # by what was timed, an array a visit
        self._statuses: dict[Case, str] = {}  # by the first visit
        self._visit = -1  # whose ceilings are measured
        self.ceilings: dict[str, float] = {}
        """FLOP/s of a large product and bytes/s of a large copy, in the medians of the rounds so far."""
        if self.interpreted:
            from moe_engine import simulator

            simulator.repair()
        if not on_gpu:
            keep_freed_memory()  # as moe-train does

    @cached_property
    def clock(self) -> DeviceClock:
        """Of the device."""
        return DeviceClock(Timer(self.device))

    def cases(self) -> Iterator[Case]:
        """Everything to measure, in order, once for every visit."""
        problems = [
            Problem(shape, moe, routing, self.tokens, self.dtype, self.device)
            for shape, moe in self.layers
            for routing in self.config.routing
        ]
        for visit, problem, op in itertools.product(range(self.visits), problems, self.config.ops):
            for implementation in PRODUCTS:
                if self._runs(op, implementation):
                    yield Case(problem, op, implementation, visit)

    def _runs(self, op: str, implementation: str) -> bool:
        if implementation == "triton" and self.device.type == "cpu":
            return self.interpreted
        return implementation in MAKERS[op][1]

    def measure_ceilings(self, visit: int) -> None:
        """Time a large product and a large copy; the last visit makes a row of each."""
        side, size = CEILINGS[self.device.type]
        a, b = (torch.randn(side, side, device=self.device).to(self.dtype) for _ in range(2))
        source = torch.zeros(size, dtype=torch.int8, device=self.device)
        target = torch.zeros_like(source)
        dtype = str(self.dtype).removeprefix("torch.")
        work = {
            "flops": (f"ceiling, product of {side}²", 2 * side**3, lambda: torch.mm(a, b), {"dtype": dtype}),
            "bytes": (f"ceiling, copy of {size >> 20} MiB", 2 * size, lambda: target.copy_(source), {}),
        }
        rows = []
        for unit, (name, amount, function, settings) in work.items():
            self.warm_up(function)
            seconds = self.keep(unit, np.array([self.clock.timer(function) for _ in range(self.rounds)]))
            self.ceilings[unit] = amount / float(np.median(seconds))
            rows.append(self._row(name, settings, self.device, seconds, **{unit: amount}, status=TIMED))
        if visit == self.visits - 1:
            self.rows[:0] = rows
        self._visit = visit

    @property
    def rounds(self) -> int:
        """Of a visit."""
        return -(-self.config.rounds // self.visits)

    def keep(self, what: str, seconds: np.ndarray) -> np.ndarray:
        """Keep the seconds of a visit; returns those of all visits so far."""
        self._seconds.setdefault(what, []).append(seconds)
        return np.concatenate(self._seconds[what])

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Call a function for some time, once at least."""
        end = time.perf_counter() + WARM_UP
        while True:
            function()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            if time.perf_counter() >= end:
                return

    def _row(self, *arguments: Any, **values: Any) -> dict[str, Any]:
        row = make_row("kernels", *arguments, **values)
        if "band" in row and self.device.type == "cpu":
            row["band"] = max(row["band"], CPU_BAND)
        return row

    def add(self, case: Case, status: str, seconds: np.ndarray | None = None, active: int = 0) -> dict[str, Any]:
        """Append the row of a case; returns it.

        Args:
            case: what was measured.
            status: what became of it.
            seconds: of each round; None where nothing was timed.
            active: experts that have rows.
        """
        values: dict[str, Any] = {}
        if seconds is not None:
            sizes = case.problem.sizes
            values = {"flops": flops(case.op, sizes), "bytes": floor_bytes(case.op, sizes, active)}
            values["bound"] = max(values[unit] / self.ceilings[unit] for unit in ("flops", "bytes"))
            values["fraction"] = values["bound"] / float(np.median(seconds))
        name = f"{case.op}, {case.implementation}"
        device = "none, Triton's interpreter" if status == INTERPRETED else self.device
        self.rows.append(self._row(name, case.problem.settings, device, seconds, **values, status=status))
        return self.rows[-1]

    def free_bytes(self) -> int:
        """What the device can still give."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what earlier cases had is ours to take again, and then counted as free
            return torch.cuda.mem_get_info(self.device)[0]
        return memory_total(self.device)

    def measure(self, case: Case, benchmark: Any) -> str:
        """Check a case, then time it, and append its row.

        Args:
            case: what to measure.
            benchmark: pytest-benchmark's fixture, whose timer is `self.clock`.
        Returns:
            What became of it: `TIMED`, or words that begin with one of `BAD` where that is a fault.
        """
        first = replace(case, visit=0)
        if case.visit and self._statuses[first] != TIMED:
            return self._statuses[first]
        self._statuses.setdefault(first, TIMED)
        status = self._visit_case(case, benchmark)
        if status != TIMED:
            self._statuses[first] = status
        return status

    def _visit_case(self, case: Case, benchmark: Any) -> str:
        needed, free = needed_bytes(case.op, case.problem), self.free_bytes()
        if needed > free:
            status = f"not run: needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            return self.add(case, status)["status"]
        try:
            inputs = Inputs(case.problem)
            run = MAKERS[case.op][0](inputs, case.implementation)
            if not case.visit:
                check(case.op, inputs, run())
            if case.implementation == "triton" and self.interpreted:
                return self.add(case, INTERPRETED)["status"]
            if not benchmark.enabled:
                return "checked, not timed: pytest-benchmark is disabled"
            if self._visit != case.visit:
                self.measure_ceilings(case.visit)
            self.warm_up(run)
            rounds = {"rounds": self.rounds, "warmup_rounds": 2, "iterations": 1}
            benchmark.pedantic(self.clock.measure, args=(run,), **rounds)
        except AssertionError as error:
            return self.add(case, f"{BAD[0]}: {error}")["status"]
        except Exception as error:  # it ends this case and no other: the row has the message, the trace goes to stderr
            message = (str(error).splitlines() or [""])[0]
            if case.implementation == PEER and isinstance(error, RuntimeError):  # not for every device
                return self.add(case, f"not run: {message}")["status"]
            traceback.print_exc()
            return self.add(case, f"{BAD[1]}: {type(error).__name__}: {message}")["status"]
        seconds = self.keep(str(replace(case, visit=0)), np.array(benchmark.stats.stats.data))
        if case.visit == self.visits - 1:
            active = sum(rows.stop > rows.start for rows in inputs.groups)
            row = self.add(case, TIMED, seconds, active)
            benchmark.extra_info.update({name: row[name] for name in ("flops", "bytes", "bound", "fraction")})
        return TIMED

    def pytest_runtest_logreport(self, report: Any) -> None:
        """pytest's hook: keep what went wrong for the end."""
        if report.failed:
            self.failures.append(
                f"{report.nodeid.partition('[')[2].rstrip(']') or report.nodeid}: {report.longreprtext}"
            )

    pytest_collectreport = pytest_runtest_logreport


def _kernels_interpreted() -> bool:
    """Whether kernels can run on CPU tensors in this process."""
    if importlib.util.find_spec("triton") is None:
        return False
    from moe_engine.kernels import launch

    return launch.INTERPRETED
