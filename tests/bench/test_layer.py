"""The layer benchmark: it runs, its rows say where they are from, and a layer that differs gets no time."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_engine import torch_backend
from moe_engine.bench import __main__ as command
from moe_engine.bench import layer as bench
from moe_engine.bench import layer_steps as steps
from moe_engine.bench.layer_check import make_truth, what_is_wrong
from moe_engine.bench.layer_peers import PEERS
from moe_engine.bench.runner import read_rows
from moe_engine.bench.shapes import ROUTING, SHAPES, routing

pytest.importorskip("transformers", minversion="5.0")

CPU = torch.device("cpu")
SIZES = {"tokens": 40, "d_model": 32, "d_ff": 24, "experts": 5, "top_k": 3}
PROBLEM = steps.Problem(CPU, "fp32", routing="balanced", **SIZES)
SMALL = ["--device=cpu", "--rounds=2", *(f"--{name}={value}" for name, value in SIZES.items())]
ONLY_OURS = [*SMALL, "--peers", "none"]
HERE = [peer for peer in PEERS if not peer.gpu_only]
LOOP = next(peer for peer in PEERS if peer.name == "expert loop, mixtral")


def rows_of(tmp_path, *options, status=0):
    """The rows of a run, by name."""
    output = tmp_path / "rows" / "layer.jsonl"
    assert command.main(["layer", *options, "--output", str(output)]) == status
    return {row["name"]: row for row in read_rows(output)}


def test_it_prints_a_table_appends_rows_and_draws(tmp_path, capsys):
    picture = tmp_path / "pictures" / "layer.png"
    rows = rows_of(tmp_path, *SMALL, "--save", "both", "--picture", str(picture))
    table = capsys.readouterr().out
    assert "T 40, D 32, F 24, E 5, K 3, fp32, balanced routing" in table and "× BLAS" in table
    ours = {f"moe_engine, {style}{save}" for style in ("mixtral", "gpt-oss") for save in ("", ", save x")}
    # Tests have one thread: there is no other way for BLAS.
    assert rows.keys() == {"BLAS, one after the other"} | ours | {peer.name for peer in PEERS}
    timed = {name for name, row in rows.items() if "p50" in row}
    assert timed == {"BLAS, one after the other"} | ours | {peer.name for peer in HERE}
    for name, row in rows.items():
        assert row["settings"] == SIZES | {"dtype": "fp32", "routing": "balanced"} and name in table
        assert row["versions"]["torch"] and row["device"] and row["ours"] == (name in ours)
        if name in timed:
            assert row["p20"] <= row["p50"] <= row["p80"] and row["rounds"] == 2 and row["status"] == "ok"
            assert row["baseline"] == "BLAS, one after the other" and row["ratio"] > 0
        else:
            assert "not installed" in row["status"] and "needs a GPU" in row["status"] and row["status"] in table
    assert rows["BLAS, one after the other"]["ratio"] == 1.0
    assert rows["moe_engine, mixtral, save x"]["saved_bytes"] < rows["moe_engine, mixtral"]["saved_bytes"]
    assert rows["moe_engine, mixtral"]["saved_bytes"] < rows["transformers Mixtral, eager"]["saved_bytes"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    bench.draw(tmp_path / "again.png", read_rows(tmp_path / "rows" / "layer.jsonl"))
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()


def test_blas_in_two_ways_on_two_threads(tmp_path, monkeypatch):
    ours = bench.Entry("moe_engine, gpt-oss", True, "ok", lambda: None, {"saved_bytes": 1, "peak_bytes": 1})
    monkeypatch.setattr(bench, "examine_all", lambda *_arguments: [ours])  # two threads of a busy machine take seconds
    torch.set_num_threads(2)
    rows = rows_of(tmp_path, *SMALL)
    assert list(rows) == ["BLAS, one after the other", "BLAS, experts side by side", "moe_engine, gpt-oss"]
    fastest = min(list(rows.values())[:2], key=lambda row: row["p50"])
    assert all(row["baseline"] == fastest["name"] for row in rows.values()) and fastest["ratio"] == 1.0


@pytest.mark.parametrize(("counts", "side_by_side"), [([24] * 5, False), ([60, 0, 50, 9, 1], True)])
def test_blas_is_the_gemms_of_the_layer(counts, side_by_side):
    torch.set_num_threads(2)
    blas = steps.Blas(PROBLEM, counts, side_by_side)
    results = (blas.h, blas.y, blas.grad_a, blas.grad_x, blas.grad_w_up, blas.grad_w_down)
    for result in results:
        result.fill_(torch.nan)
    with FlopCounterMode(display=False) as counter:
        blas()
    assert all(result.isfinite().all() for result in results)
    begin, end = counts[0] + counts[1], sum(counts[:3])
    torch.testing.assert_close(blas.h[begin:end], blas.x[begin:end] @ blas.w_up[2])
    torch.testing.assert_close(blas.grad_w_down[2], blas.a[begin:end].t() @ blas.grad_y[begin:end])
    assert PROBLEM.flops() == 2 * 3 * 40 * 3 * 32 * 3 * 24
    if not side_by_side:  # the counter sees the calling thread only
        assert counter.get_total_flops() == PROBLEM.flops()


# -- inputs --


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ROUTING)
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (128, 8), (1, 1)])
def test_every_router_chooses_the_same_experts(experts, top_k, kind, dtype):
    problem = steps.Problem(CPU, dtype, 300, 128, 16, experts, top_k, kind)
    wanted = routing(kind, 300, experts, top_k).argsort(dim=1, descending=True, stable=True)[:, :top_k]
    for bias in (False, True):
        inputs, routed = steps.make_inputs(problem, bias)
        logits = nn.functional.linear(inputs.x[0], routed.weight, routed.bias)  # in this very dtype
        values, chosen = logits.topk(min(top_k + 1, experts))
        assert torch.equal(chosen[:, :top_k], wanted) and values.diff().max(dim=0).values.lt(-0.1).all()
        assert torch.bincount(chosen[:, :top_k].flatten(), minlength=experts).tolist() == routed.counts
        assert 0.3 < inputs.x.float().square().mean().sqrt() < 3 and logits.dtype == problem.torch_dtype


def test_defaults_by_device_and_the_shapes(monkeypatch):
    problem = bench.LayerConfig(device="cpu").problem()
    shape = SHAPES["cpu"]
    assert problem == steps.Problem(CPU, "fp32", 2048, shape.d_model, shape.d_ff, 8, 2, "balanced")
    problem = bench.LayerConfig(device="cpu", shape="qwen3-30b-a3b", top_k=4).problem()
    assert (problem.d_model, problem.d_ff, problem.experts, problem.top_k) == (2048, 768, 128, 4)
    monkeypatch.setattr(bench, "pick_device", lambda _name: torch.device("cuda", 0))
    problem = bench.LayerConfig().problem()
    assert (problem.dtype, problem.tokens, problem.d_model, problem.d_ff) == ("bf16", 8192, 2880, 3840)


# -- what is wrong has no time --


def made(problem, style="mixtral"):
    """Our layer, inputs, and the right results."""
    inputs, routed = steps.make_inputs(problem, style == "gpt-oss")
    layer = steps.make_layer(problem, routed, style, "auto")
    return layer, inputs, make_truth(layer, inputs)


@pytest.fixture(scope="module")
def checked():
    return made(replace(PROBLEM, tokens=300))  # more than are sampled


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize(
    ("parameter", "change", "message"),
    [
        (None, None, None),
        ("experts.down_proj", lambda w: w.mul_(1.0001), "out: largest error 9.99e-05 exceeds"),
        ("experts.gate_up_proj", lambda w: w.copy_(w.flip(1)), "out: "),  # up where gate should be
        ("gate.weight", lambda w: w.copy_(w.roll(1, 0)), "out: "),  # the wrong expert
    ],
)
def test_a_peer_that_differs_is_found_out(checked, experts, parameter, change, message):
    layer, inputs, truth = checked
    peer = next(peer for peer in PEERS if peer.name == f"transformers Mixtral, {experts}")
    step = steps.Step(peer.make(layer), inputs, peer.ours)
    if parameter is None:
        assert what_is_wrong(step.results(), truth) == ""
        return
    with torch.no_grad():
        change(step.layer.get_parameter(parameter))
    assert message in what_is_wrong(step.results(), truth)


def test_every_gradient_is_checked(checked):
    layer, inputs, truth = checked
    results = steps.Step(layer, inputs).results()
    assert what_is_wrong(results, truth) == ""
    assert set(truth.exact) == {"out", "x", "router.weight", "w_up", "w_down"}
    for name, value in results.items():
        for wrong in (0 * value, 1.001 * value, torch.full_like(value, torch.nan)):
            assert what_is_wrong(results | {name: wrong}, truth).split(": ")[0].split("[")[0].endswith(name)
    del results["w_up"]
    assert what_is_wrong(results, truth).startswith("has out, router")


def test_tokens_outside_the_sample_are_checked_too(checked):
    layer, inputs, truth = checked
    results = steps.Step(layer, inputs).results()
    assert inputs.sample[0] == 0 and inputs.sample[-1] == 299 and len(set(inputs.sample.tolist())) == 256
    other = next(t for t in range(300) if t not in inputs.sample)
    for name in ("out", "x"):
        wrong = results[name].clone()
        wrong[other] += 0.01
        assert name in what_is_wrong(results | {name: wrong}, truth)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_16_bits_a_factor_of_a_hundredth_is_found(dtype):
    layer, inputs, truth = made(replace(PROBLEM, dtype=dtype, tokens=300), "gpt-oss")
    results = steps.Step(layer, inputs).results()
    assert what_is_wrong(results, truth) == ""
    for name, value in results.items():
        assert name in what_is_wrong(results | {name: (1.03 * value.float()).to(value)}, truth)


@pytest.mark.parametrize("experts", [5, 1], ids=["one of five", "one expert"])
def test_a_gradient_that_is_zero_is_checked_as_well(experts):
    """With one expert a token its weight is 1, and the router has no gradient; a peer's is what rounding left of it."""
    config = bench.LayerConfig(**SIZES | {"top_k": 1, "experts": experts})
    assert {entry.status for entry in bench.examine_all(config, config.problem()) if entry.step} == {"ok"}
    layer, inputs, truth = made(replace(PROBLEM, top_k=1, experts=experts))
    results = steps.Step(layer, inputs).results()
    assert not truth.exact["router.weight"].any() and what_is_wrong(results, truth) == ""
    for wrong in (1e-3, torch.nan):
        message = what_is_wrong(results | {"router.weight": results["router.weight"] + wrong}, truth)
        assert message.startswith("gradient of router.weight: expected zeros")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_our_layer_when_wrong_has_no_time_and_the_command_fails(dtype, tmp_path, monkeypatch, capsys):
    honest = torch_backend._sum_over_slots
    monkeypatch.setattr(torch_backend, "_sum_over_slots", lambda *arguments: 1.1 * honest(*arguments))
    rows = rows_of(tmp_path, *SMALL, "--dtype", dtype, "--style", "mixtral", "--peers", "Expert", "sonic", status=1)
    assert list(rows) == ["BLAS, one after the other", "moe_engine, mixtral", "expert loop, mixtral", "SonicMoE"]
    assert rows["moe_engine, mixtral"]["status"].startswith("wrong: out: ") and "p50" not in rows["moe_engine, mixtral"]
    assert rows["expert loop, mixtral"]["status"] == "ok" and rows["expert loop, mixtral"]["p50"] > 0
    assert "error: no time for moe_engine, mixtral: see the table\n" in capsys.readouterr().err


def test_our_layer_when_it_raises_fails_the_command(tmp_path, monkeypatch):
    def broken(*_arguments):
        raise RuntimeError("no such thing\nand more of it")

    monkeypatch.setattr(torch_backend, "_sum_over_slots", broken)
    rows = rows_of(tmp_path, *ONLY_OURS, "--style", "mixtral", status=1)
    assert rows["moe_engine, mixtral"]["status"] == "failed: RuntimeError: no such thing"


def test_the_kernels_in_the_interpreter_are_checked_and_not_timed(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from moe_engine.kernels import expert_mlp
    from moe_engine.kernels.launch import INTERPRETED

    if not INTERPRETED:
        pytest.skip("on a GPU the kernels run there")
    options = [*ONLY_OURS, "--backend", "triton", "--style", "gpt-oss"]
    name = "moe_engine triton, gpt-oss"
    row = rows_of(tmp_path, *options)[name]
    assert row["status"] == bench.UNTIMED and not {"p50", "ratio", "flops"} & row.keys()

    honest = expert_mlp.combine_rows

    def off_by_a_factor(*arguments):
        out, sums = honest(*arguments)
        return 1.1 * out, sums

    monkeypatch.setattr(expert_mlp, "combine_rows", off_by_a_factor)
    row = rows_of(tmp_path, *options, status=1)[name]
    assert row["status"].startswith("wrong: out: ") and "p50" not in row


class Doubled(nn.Module):
    """Half of what it should be wrong with."""

    def __init__(self, layer):
        super().__init__()
        self.inner = LOOP.make(layer)

    def forward(self, x):
        return 2 * self.inner(x)


def never(_layer):
    raise AssertionError("made, though there was a reason not to")


def raising(_layer):
    raise NotImplementedError("only on Tuesdays\nTraceback")


def test_peers_that_cannot_are_rows_with_a_reason(tmp_path, monkeypatch):
    def ours(gradients):
        return LOOP.ours({name.removeprefix("inner."): value for name, value in gradients.items()})

    changes = {
        "doubles": {"make": Doubled, "ours": ours},
        "raises": {"make": raising},
        "is large": {"make": never, "extra_bytes": lambda tokens, config, itemsize: 10**15},
        "wants a GPU": {"make": never, "gpu_only": True},
        "is limited": {"make": never, "limits": lambda config, dtype: f"not with {config.d_ff} in {dtype}"},
        "is not there": {"make": never, "package": "no_such_package", "install": "pip install it"},
        "cannot be imported": {"make": never, "limits": lambda config, dtype: 1 / 0},
        "is fine": {},
    }
    monkeypatch.setattr(bench, "PEERS", tuple(replace(LOOP, name=name, **change) for name, change in changes.items()))
    rows = rows_of(tmp_path, *SMALL)
    assert "p50" in rows["is fine"] and rows["is fine"]["status"] == "ok"
    expected = {
        "doubles": "wrong: out: largest error 1 exceeds its budget of",
        "raises": "failed: NotImplementedError: only on Tuesdays",
        "is large": "needs about 1000000.0 GB of memory, ",
        "wants a GPU": "needs a GPU",
        "is limited": "not with 24 in torch.float32",
        "is not there": "not installed (No module named 'no_such_package'): pip install it",
        "cannot be imported": "failed: ZeroDivisionError: division by zero",
    }
    for name, status in expected.items():
        assert rows[name]["status"].startswith(status) and "p50" not in rows[name] and "ratio" not in rows[name]


def test_a_peer_leaves_room_for_the_steps_of_those_before_it(checked, monkeypatch):
    layer, inputs, truth = checked
    case = bench.Case(replace(PROBLEM, tokens=300), inputs, layer, truth)
    monkeypatch.setattr(bench, "free_memory", lambda _device: 10**7)
    assert bench.why_not(LOOP, case, reserve=0) == ""
    assert bench.why_not(LOOP, case, reserve=10**7) == "needs about 0.0 GB of memory, 0.0 are free"


# -- memory --


class Keeps(nn.Module):
    """A product of x with a weight, or something less or more."""

    def __init__(self, what):
        super().__init__()
        self.what, self.w = what, nn.Parameter(torch.eye(32))

    def forward(self, x):
        if self.what == "nothing":
            return x + self.w.sum()
        h = x @ self.w
        return h if self.what == "input" else h.sigmoid() + 1


@pytest.mark.parametrize(("what", "copies"), [("nothing", 0), ("input", 1), ("input and sigmoid", 2)])
def test_saved_bytes_and_peak(what, copies):
    torch.set_num_threads(2)
    rows = 4 * 256 * 32
    inputs = steps.Inputs(torch.randn(1, 256, 32), torch.randn(1, 256, 32), torch.arange(256))
    found = steps.memory(steps.Step(Keeps(what), inputs))
    assert found["saved_bytes"] == copies * rows
    weight = 4 * 32 * 32
    expected = {
        "nothing": 2 * rows + 4,  # x, the output, a sum; the gradient of x is that of the output
        "input": 3 * rows + weight,  # x, the output, two gradients
        "input and sigmoid": 4 * rows + weight,  # those, and the gradient of the product; the sigmoid is gone by then
    }
    assert found["peak_bytes"] == expected[what]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("save", ["h", "x"])
@pytest.mark.parametrize("style", ["mixtral", "gpt-oss"])
def test_our_layer_keeps_what_the_design_says(style, save):
    problem = replace(PROBLEM, dtype="bf16", tokens=512, d_model=64)
    layer, inputs, _ = made(problem, style)
    found = steps.memory(steps.Step(steps.with_save(layer, save), inputs))["saved_bytes"]
    t, d, f, e, k = 512, 64, 24, 5, 3
    design = 2 * t * d + (4 * t * k * f if save == "h" else 0)
    assert design < found <= design + 4 * t * e + 4 * 4 * t * k + 4 * (e + 1)  # logits; gate weights, indices; offsets


# -- errors --


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "error: --tokens: expected at least 1, got 0"),
        (["--rounds", "0"], "error: --rounds: expected at least 1, got 0"),
        (["--experts", "257"], "error: --experts: expected 1 … 256, got 257"),
        (["--experts", "4", "--top_k", "5"], "error: --top_k: expected 1 … 4, got 5"),
        (["--experts", "8", "--d_model", "4"], "error: --d_model: expected at least --experts, 8, got 4"),
        (["--shape", "9b"], "error: --shape: expected one of 8b, gpt-oss-20b, "),
        (["--routing", "even"], "error: --routing: expected one of balanced, skewed, one_hot, got 'even'"),
        (["--dtype", "fp8"], "error: --dtype: expected"),
        (["--style", "olmoe"], "error: --style: expected one of both, mixtral, gpt-oss, got 'olmoe'"),
        (["--peers", "loop", "torch2"], "error: --peers: expected parts of these names: transformers Mixtral, eager; "),
        # Of the other style: it would be left out without a word.
        (["--peers", "sonic", "--style", "gpt-oss"], "error: --peers: expected parts of these names: transformers gpt"),
        (["--output", "/dev/null/rows.jsonl"], "error: --output: expected a file that can be written, got /dev/null/"),
        (["--picture", "/"], "error: --picture: expected a file that can be written, got / (Is a directory)"),
        (["--tokens", "1000000000"], "error: --shape, --tokens: expected a layer that can be checked in fp64 with "),
    ],
)
def test_errors_name_the_option(options, message, capsys):
    assert bench.main([*options, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_layer_that_cannot_be_checked_here_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(bench, "free_memory", lambda _device: 30 * 10**9)
    assert bench.main(["--shape", "mixtral-8x7b", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "--shape, --tokens: expected a layer that can be checked in fp64 with 30.0 GB of memory, got one " in error
    assert "that needs 52.7 GB" in error


def test_a_backend_or_device_that_is_not_there(monkeypatch, capsys):
    pytest.importorskip("triton")
    from moe_engine.kernels import launch

    def no_driver():
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(launch, "target", no_driver)
    assert bench.main([*ONLY_OURS, "--backend", "triton"]) == 2
    assert "error: --backend triton: 'triton' needs a GPU that Triton can use" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert bench.main(["--device", "cuda"]) == 2
        assert "error: --device: expected a CUDA or ROCm device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    rows = rows_of(tmp_path, "--device=cuda", "--shape=cpu", "--rounds=3")
    for style in ("mixtral", "gpt-oss"):
        kept, again = rows[f"moe_engine, {style}"], rows[f"moe_engine, {style}, save x"]
        assert kept["status"] == again["status"] == "ok" and kept["p50"] > 0
        assert 2 * 512 + 4 * 2 * 1024 < kept["saved_bytes"] / 8192 < 1.03 * (2 * 512 + 4 * 2 * 1024)
        assert again["saved_bytes"] < kept["saved_bytes"] < rows[f"expert loop, {style}"]["saved_bytes"]
