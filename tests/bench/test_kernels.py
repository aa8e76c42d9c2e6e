"""`moe-bench kernels`: what is timed was right before, times are the device's, and figures are those of the shape."""

import importlib.util

import pytest
import torch

from moe_engine.bench import kernel_ops, kernel_run, kernels
from moe_engine.bench.__main__ import main
from moe_engine.bench.kernel_checks import check, needed_bytes
from moe_engine.bench.kernel_inputs import Inputs, Problem
from moe_engine.bench.kernel_ops import MAKERS, floor_bytes, flops
from moe_engine.bench.runner import read_rows
from moe_engine.bench.shapes import SHAPES, LayerShape
from moe_engine.config import MoEConfig

SMALL = ["--tokens", "20", "--d_model", "16", "--d_ff", "24", "--experts", "4", "--rounds", "3", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(kernel_run, "WARM_UP", 0.0)
    monkeypatch.setitem(kernel_run.CEILINGS, "cpu", (64, 1 << 16))


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    """pytest-benchmark times nothing in a process of pytest-xdist, nor where it takes this one for such a process."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def rows_of(tmp_path, *options):
    """Status and rows of the command."""
    output = tmp_path / "rows.jsonl"
    return main(["kernels", *SMALL, *options, "--output", str(output)]), read_rows(output)


def kernels_here():
    """Whether kernels can be checked in this process: in the interpreter, without a GPU."""
    return kernel_run._kernels_interpreted()


def test_the_command_times_what_torch_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernel_run, "_kernels_interpreted", lambda: False)  # neither a GPU nor the interpreter
    options = ["--ops", "combine", "gemm_dw", "--routing", "balanced", "one_hot", "--picture", str(tmp_path / "p.png")]
    status, rows = rows_of(tmp_path, *options)
    assert status == 0
    done = ["combine, torch", "gemm_dw, torch", "gemm_dw, grouped_mm"]
    assert [r["name"] for r in rows] == ["ceiling, product of 64²", "ceiling, copy of 0 MiB", *done, *done]
    assert all(r["rounds"] == 3 and 0 < r["p20"] <= r["p50"] <= r["p80"] for r in rows)
    product, copy, *cases = rows
    for r in cases:
        moved = r["bytes"] * copy["p50"] / copy["bytes"]
        computed = r["flops"] * product["p50"] / product["flops"]
        assert r["bound"] == pytest.approx(max(moved, computed)) and r["fraction"] == r["bound"] / r["p50"]
    assert {r["settings"]["routing"] for r in cases} == {"balanced", "one_hot"}
    label = "cpu, d_model 16, d_ff 24, experts 4"
    assert cases[0]["settings"] == {"shape": label, "tokens": 20, "routing": "balanced", "dtype": "float32"}
    text = capsys.readouterr().out
    assert "cpu, d_model 16, d_ff 24, experts 4, one_hot" in text and "gemm_dw, grouped_mm" in text
    assert "test session" not in text and "Legend" not in text, "pytest is not to be seen"
    from matplotlib.image import imread

    assert imread(tmp_path / "p.png").std() > 0.05


@pytest.mark.parametrize(
    "options",
    [
        ["--routing", "one_hot", "--dtype", "bf16", "--shapes", "8b"],  # idle experts, biases, bounded activation
        # The other gate.
        ["--routing", "skewed", "--shapes", "olmoe", "--top_k", "3", "--ops", "gate", "gate_backward", "combine"],
    ],
)
def test_every_kernel_is_right_in_the_interpreter_and_has_no_time(options, tmp_path, monkeypatch):
    if not kernels_here():
        pytest.skip("kernels run on CPU tensors in the interpreter alone")
    monkeypatch.setattr(kernel_run, "PRODUCTS", ("triton",))
    status, rows = rows_of(tmp_path, *options)
    ops = options[options.index("--ops") + 1 :] if "--ops" in options else list(MAKERS)
    assert [r["name"] for r in rows] == [f"{op}, triton" for op in ops]
    assert status == 0, [r["status"] for r in rows]
    assert all(r["status"] == kernel_run.INTERPRETED and "p50" not in r and "fraction" not in r for r in rows)


@pytest.mark.parametrize("op", sorted(MAKERS))
@pytest.mark.parametrize("routing", ["balanced", "one_hot"])
def test_a_wrong_result_is_told_from_a_right_one(op, routing):
    """Every single result of every operation is looked at: 2 % in one element of one of them is seen."""
    moe = MoEConfig(16, 24, 4, 2)
    inputs = Inputs(Problem("small", moe, routing, 24, torch.float32, torch.device("cpu")))
    results = [r.detach() for r in MAKERS[op][0](inputs, "torch")()]
    check(op, inputs, results)
    for number, result in enumerate(results):
        wrong = result.clone()
        flat = wrong.view(-1)
        largest = flat.abs().argmax()
        flat[largest] = 1.02 * flat[largest] if wrong.is_floating_point() else flat[largest] - 1
        with pytest.raises(AssertionError):
            check(op, inputs, [*results[:number], wrong, *results[number + 1 :]])
    with pytest.raises(AssertionError, match=rf"got {len(results) - 1} results"):
        check(op, inputs, results[:-1])


def test_a_wrong_kernel_has_no_time(tmp_path, monkeypatch, capsys):
    if not kernels_here():
        pytest.skip("patches kernels in the interpreter's process")
    from moe_engine.kernels import expert_mlp

    honest = expert_mlp.combine_rows

    def off_by_a_factor(*arguments):
        out, sums = honest(*arguments)
        return 1.1 * out, sums

    monkeypatch.setattr(expert_mlp, "combine_rows", off_by_a_factor)
    status, rows = rows_of(tmp_path, "--ops", "mlp", "mlp_backward", "combine", "--routing", "balanced")
    found = {r["name"]: r for r in rows}
    assert status == 1
    for name, where in {"mlp, triton": "out", "mlp_backward, triton": "gradient of x"}.items():
        assert found[name]["status"].startswith(f"wrong: {where}: ") and "p50" not in found[name]
    assert found["combine, triton"]["status"] == kernel_run.INTERPRETED and found["mlp, torch"]["p50"] > 0
    text = capsys.readouterr()
    assert "wrong: gradient of x: " in text.out and "mlp-triton: wrong: out" in text.err


def test_a_wrong_baseline_has_no_time_and_a_broken_one_ends_no_other(tmp_path, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("no such product\nand more")

    monkeypatch.setattr(kernel_run, "_kernels_interpreted", lambda: False)
    monkeypatch.setattr(kernel_ops, "invert", lambda order: order)
    monkeypatch.setattr(kernel_ops.F, "grouped_mm", broken)
    monkeypatch.setitem(MAKERS, "permute", (broken, ("torch",)))
    status, rows = rows_of(tmp_path, "--ops", "sort", "permute", "gemm_down", "--routing", "balanced")
    assert status == 1
    found = {r["name"]: r["status"] for r in rows if not r["name"].startswith("ceiling")}
    assert found["sort, torch"].startswith("wrong: inverse_permutation: ") and found["gemm_down, torch"] == "ok"
    assert found["permute, torch"] == "failed: RuntimeError: no such product"
    assert found["gemm_down, grouped_mm"] == "not run: no such product", "PyTorch has it for some devices only"
    assert "Traceback" in capsys.readouterr().err


def test_what_does_not_fit_is_a_row_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_run, "memory_total", lambda device: 20_000)
    status, rows = rows_of(tmp_path, "--ops", "losses", "mlp", "--routing", "balanced", "--shapes", "cpu")
    found = {r["name"]: r for r in rows}
    assert status == 0 and found["losses, torch"]["status"] == "ok"
    assert found["mlp, torch"]["status"] == "not run: needs about 0.0 GB, 0.0 GB are free"
    assert "p50" not in found["mlp, torch"] and "fraction" not in found["mlp, torch"]


def test_a_large_layer_needs_what_its_tensors_take():
    problem = Problem("8b", SHAPES["8b"], "balanced", 8192, torch.bfloat16, torch.device("cpu"))
    t, d, f, e, k = 8192, 2880, 3840, 8, 2
    weights, rows = 3 * e * d * f, t * (2 * d + k * 2 * f)  # and x, the output's gradient, h
    assert needed_bytes("mlp_backward", problem) > 2 * (2 * weights + rows) + 8 * 2 * 3 * d * f
    assert needed_bytes("permute", problem) > (2 + 8) * t * (1 + k) * d


# -- time --


def test_the_clock_moves_by_what_the_timer_finds(tmp_path, monkeypatch):
    # Three visits, a round each: the two ceilings, two rounds to warm up, the round.
    seconds = iter([8.0, 9.0, 70.0, 80.0, 0.25, 8.0, 9.0, 70.0, 80.0, 4.0, 8.0, 9.0, 70.0, 80.0, 0.5])

    class Timer:
        def __init__(self, device):
            pass

        def __call__(self, function):
            function()
            return next(seconds)

    monkeypatch.setattr(kernel_run, "_kernels_interpreted", lambda: False)
    monkeypatch.setattr(kernel_run, "Timer", Timer)
    status, rows = rows_of(tmp_path, "--ops", "permute", "--routing", "balanced")
    assert status == 0 and next(seconds, None) is None
    assert [r["p50"] for r in rows] == [8.0, 9.0, 0.5]
    assert rows[2]["p20"] == pytest.approx(0.35) and rows[2]["p80"] == pytest.approx(2.6)


class Seen:
    """A plugin that keeps what pytest-benchmark has of each test."""

    def __init__(self):
        self.found = {}

    def pytest_runtest_teardown(self, item):
        self.found[item.callspec.id] = (item.funcargs["benchmark"], item.funcargs["run"])


def test_as_a_file_of_pytest_alone_its_times_are_the_same_ones(capfd):
    """`pytest bench/kernels.py`: nothing but the file, everything at its default."""
    seen = Seen()
    options = ["--import-mode=importlib", "-o", "addopts=", "-s", "--benchmark-enable", kernels.__file__]
    others = [f"-pno:{name}" for name in ("cacheprovider", "timeout", "faulthandler", "xdist")]
    status = pytest.main([*others, *options, "-k", "balanced and losses-torch"], plugins=[seen])
    assert status == pytest.ExitCode.OK
    assert "Legend" in capfd.readouterr().out, "pytest-benchmark shows its table"
    (run,) = {run for _, run in seen.found.values()}
    rows = [r for r in run.rows if r["name"] == "losses, torch"]
    assert len(seen.found) == len(rows) * run.visits and rows
    for row in rows:
        visits = [b for name, (b, _) in seen.found.items() if name.startswith(f"{row['settings']['shape']}-bal")]
        data = sorted(seconds for benchmark in visits for seconds in benchmark.stats.stats.data)
        assert len(data) == row["rounds"] == 20 and data[9] <= row["p50"] <= data[10]
        assert visits[-1].extra_info["fraction"] == row["fraction"] == row["bound"] / row["p50"]


# -- figures --

SIZES = LayerShape(tokens=16, d_model=32, d_ff=48, experts=4, top_k=2)


def test_the_experts_floors_are_those_of_the_layer():
    for save, suffix in {"h": "", "x": "_save_x"}.items():
        floors = SIZES.floors(save)
        assert floor_bytes(f"mlp{suffix}", SIZES, 4) == floors["forward"]
        assert floor_bytes(f"mlp_backward{suffix}", SIZES, 4) == floors["backward"]
        # Two of four experts have rows: weights of two are read, gradients of four are written.
        idle = 2 * 2 * 32 * 48
        assert floor_bytes(f"mlp{suffix}", SIZES, 2) == floors["forward"] - 3 * idle
        assert floor_bytes(f"mlp_backward{suffix}", SIZES, 2) == floors["backward"] - (3 if save == "h" else 5) * idle


@pytest.mark.parametrize(
    ("op", "operations", "moved"),
    [
        ("gate", 0, 4 * (16 * 4 + 32 + 32 + 4 + 4 + 2)),
        ("gate_backward", 0, 4 * (2 * 16 * 4 + 3 * 32 + 4 + 1)),
        ("sort", 0, 4 * (3 * 32 + 5)),
        ("permute", 0, 2 * (16 + 32) * 32),
        ("combine", 0, 2 * (32 + 16) * 32),
        ("combine_backward", 0, 2 * (16 + 32 + 32) * 32),
        ("gemm_up", 2 * 32 * 32 * 96, 2 * (16 * 32 + 32 * 96 + 2 * 32 * 96)),
        ("gemm_down", 2 * 32 * 48 * 32, 2 * (32 * 48 + 32 * 32 + 2 * 48 * 32)),
        ("gemm_dx", 2 * 32 * 32 * 96, 2 * (32 * 96 + 32 * 32 + 2 * 32 * 96)),
        ("gemm_dw", 2 * 32 * 32 * 96, 2 * (16 * 32 + 32 * 96 + 4 * 32 * 96)),
        ("losses", 0, 4 * 24 * (4 + 4 + 1 + 2)),
        ("losses_backward", 0, 4 * 24 * (4 + 2 + 4 + 1)),
    ],
)
def test_figures_by_hand_with_two_of_four_experts_in_use(op, operations, moved):
    assert (flops(op, SIZES), floor_bytes(op, SIZES, 2)) == (operations, moved)


def test_the_experts_flops_by_hand():
    product = 2 * 32 * 32 * 48
    assert [flops(op, SIZES) for op in ("mlp", "mlp_save_x")] == [3 * product] * 2
    assert flops("mlp_backward", SIZES) == 6 * product and flops("mlp_backward_save_x", SIZES) == 8 * product


# -- what cannot be run --


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "9b"], "--shapes: expected one of 8b, "),
        (["--ops", "gemm"], "--ops: expected one of gate, "),
        (["--routing", "even"], "--routing: expected one of balanced, skewed, one_hot"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--tokens", "0"], "--tokens: expected at least 1, got 0"),
        (["--experts", "0"], "--experts: expected"),
        (["--top_k", "9"], "--top_k: expected"),
        (["--dtype", "bf17"], "--dtype: expected"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_status_2(options, message, capsys):
    assert main(["kernels", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_without_pytest_benchmark_it_says_what_to_install(monkeypatch, capsys):
    honest = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest_benchmark" else honest(name))
    assert main(["kernels", *SMALL]) == 2
    error = capsys.readouterr().err
    assert "pip install 'moe-engine[bench]'" in error and error.count("\n") == 1
