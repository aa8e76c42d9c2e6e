"""The layer benchmark: it runs, its rows say where they are from, and a layer that differs gets no time."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_engine import MoEConfig, MoELayer
from moe_engine.bench import __main__ as command
from moe_engine.bench import layer as bench
from moe_engine.bench.layer_peers import from_mixtral_block, mixtral_block
from moe_engine.testing import normal, parameters
from moe_engine.train.errors import InputError

pytest.importorskip("transformers", minversion="5.0")

SIZES = {"tokens": 40, "d_model": 32, "d_ff": 24, "experts": 5, "top_k": 3, "rounds": 2}
SMALL = [text for name, value in SIZES.items() for text in (f"--{name}", str(value))]


def test_it_prints_a_table_and_appends_rows(tmp_path, capsys):
    output = tmp_path / "rows" / "layer.jsonl"
    assert command.main(["layer", *SMALL, "--output", str(output)]) == 0
    table = capsys.readouterr().out
    assert "T 40, D 32, F 24, E 5, K 3" in table and "× BLAS" in table
    rows = {row["name"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert list(rows) == [
        "BLAS, one after the other",  # tests have one thread: there is no other way
        "moe_engine, mixtral",
        "transformers Mixtral, grouped_mm",
        "transformers Mixtral, eager",
        "moe_engine, gpt-oss",
    ]
    for row in rows.values():
        assert row["p20"] <= row["p50"] <= row["p80"] and row["rounds"] == 2 and row["settings"]["tokens"] == 40
        assert row["versions"]["torch"] and row["device"] and row["baseline"] == "BLAS, one after the other"
    assert rows["BLAS, one after the other"]["ratio"] == 1.0 and rows["moe_engine, mixtral"]["ratio"] > 0


def test_a_style_alone_and_two_threads(tmp_path):
    torch.set_num_threads(2)
    for style, names in (("gpt-oss", 3), ("mixtral", 5)):
        output = tmp_path / f"{style}.jsonl"
        assert bench.main([*SMALL, "--style", style, "--output", str(output)]) == 0
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert len(rows) == names and rows[1]["name"] == "BLAS, experts side by side"
        fastest = min(rows[:2], key=lambda row: row["p50"])
        assert all(row["baseline"] == fastest["name"] for row in rows) and fastest["ratio"] == 1.0


@pytest.mark.parametrize("side_by_side", [False, True])
def test_blas_is_the_gemms_of_the_layer(side_by_side):
    torch.set_num_threads(2)
    config = bench.LayerConfig(**SIZES)
    blas = bench.Blas(config, side_by_side)
    results = (blas.h, blas.y, blas.grad_a, blas.grad_x, blas.grad_w_up, blas.grad_w_down)
    for result in results:
        result.fill_(torch.nan)
    with FlopCounterMode(display=False) as counter:
        blas()
    assert all(result.isfinite().all() for result in results)
    assert bench.flops(config) == 2 * 3 * 40 * 3 * 32 * 3 * 24
    if not side_by_side:  # the counter sees the calling thread only
        assert counter.get_total_flops() == bench.flops(config)


@pytest.fixture(scope="module")
def checked():
    layer = MoELayer(MoEConfig(32, 24, 5, 3, **bench.STYLES["mixtral"]))
    layer.load_state_dict({name: value.float() for name, value in parameters(layer).items()})
    x, grad_out = (normal(1, 40, 32, seed=seed, dtype=torch.float32) for seed in (1, 2))
    return layer, x, grad_out, bench.exact_results(layer, x, grad_out)


@pytest.mark.parametrize("experts", bench.PEERS)
@pytest.mark.parametrize(
    ("parameter", "change", "message"),
    [
        (None, None, None),
        ("experts.down_proj", lambda w: w.mul_(1.0001), "out is off by 1.0e-04"),
        ("experts.gate_up_proj", lambda w: w.copy_(w.flip(1)), "not the same layer"),  # up where gate should be
        ("gate.weight", lambda w: w.copy_(w.roll(1, 0)), "not the same layer"),  # the wrong expert
    ],
)
def test_a_peer_that_differs_has_no_time(checked, experts, parameter, change, message):
    layer, x, grad_out, exact = checked
    block = mixtral_block(layer, experts)
    step = bench.Step(block, x, grad_out, from_mixtral_block)
    if parameter is None:
        bench.check("peer", step.results(), exact)
        return
    with torch.no_grad():
        change(block.get_parameter(parameter))
    with pytest.raises(InputError, match=message):
        bench.check("peer", step.results(), exact)


def test_every_gradient_is_checked(checked):
    layer, x, grad_out, exact = checked
    results = bench.Step(layer, x, grad_out).results()
    bench.check("ours", results, exact)
    assert set(exact) == {"out", "x", "router.weight", "w_up", "w_down"}
    for name, value in results.items():
        for wrong in (0 * value, 1.001 * value, torch.full_like(value, torch.nan)):
            with pytest.raises(InputError, match=f"ours: .*{name} is off by"):
                bench.check("ours", results | {name: wrong}, exact)
    del results["w_up"]
    with pytest.raises(InputError, match="ours: has out, router"):
        bench.check("ours", results, exact)


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"top_k": 1, "experts": 1}], ids=["one of five", "one expert"])
def test_a_gradient_that_is_zero_is_checked_as_well(changes):
    """With one expert a token its weight is 1, and the router has no gradient; a peer's is what rounding left of it."""
    assert "moe_engine, gpt-oss" in bench.steps(bench.LayerConfig(**SIZES | changes))
    layer = MoELayer(MoEConfig(32, 24, changes.get("experts", 5), 1, **bench.STYLES["mixtral"]))
    layer.load_state_dict({name: value.float() for name, value in parameters(layer).items()})
    x, grad_out = (normal(1, 40, 32, seed=seed, dtype=torch.float32) for seed in (1, 2))
    exact, results = bench.exact_results(layer, x, grad_out), bench.Step(layer, x, grad_out).results()
    assert not exact["router.weight"].any()
    bench.check("ours", results, exact)
    for wrong in (1e-3, torch.nan):
        with pytest.raises(InputError, match=r"ours: the gradient of router\.weight is off by"):
            bench.check("ours", results | {"router.weight": results["router.weight"] + wrong}, exact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "error: --tokens: expected at least 1, got 0"),
        (["--rounds", "0"], "error: --rounds: expected at least 1, got 0"),
        (["--experts", "257"], "error: --experts: expected 1 … 256, got 257"),
        (["--experts", "4", "--top_k", "5"], "error: --top_k: expected 1 … 4, got 5"),
    ],
)
def test_errors_name_the_option(options, message, capsys):
    assert bench.main(options) != 0
    assert message in capsys.readouterr().err
