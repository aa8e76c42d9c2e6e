"""The throughput benchmark: it runs, its rows say where they are from, and a model that differs gets no time."""

import json

import pytest
import torch

from moe_engine import Transformer, preset
from moe_engine.bench import throughput as bench
from moe_engine.bench.peers import MIXTRAL_STYLE, mixtral
from moe_engine.train.errors import InputError

pytest.importorskip("transformers", minversion="5.0")

SMALL = ["--batch_size", "1", "--block_size", "32", "--rounds", "2"]


def test_it_prints_a_table_and_appends_rows(tmp_path, capsys):
    output = tmp_path / "rows" / "throughput.jsonl"
    for memory in ("own", "same"):
        assert bench.main([*SMALL, "--memory", memory, "--output", str(output)]) == 0
    table = capsys.readouterr().out
    assert "moe_engine, gpt-oss style" in table and "transformers Mixtral, grouped_mm" in table
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["settings"]["memory"] for row in rows] == ["own"] * 4 + ["same"] * 4
    for row in rows:
        assert row["p20"] <= row["p50"] <= row["p80"] and row["rounds"] == 2 and row["settings"]["tokens"] == 32
        assert row["versions"]["torch"] and row["device"] and row["settings"]["preset"] == "tiny"
    assert rows[2]["name"] == "transformers Mixtral, grouped_mm" and rows[2]["ratio"] == 1.0


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "d_model": 32, "num_heads": 4, "head_dim": 8, "d_ff": 24, "vocab_size": 64}
    ours = Transformer(preset("tiny", **MIXTRAL_STYLE, **sizes))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return ours, torch.randint(0, 64, (2, 9)), torch.randint(0, 64, (2, 9))


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_the_same_weights_are_the_same_model(pair, experts):
    ours, inputs, targets = pair
    bench.check_same(experts, ours, mixtral(ours, experts), inputs, targets)


@pytest.mark.parametrize(
    ("parameter", "change"),
    [
        ("model.layers.1.mlp.experts.down_proj", lambda w: w.mul_(1.01)),
        ("model.layers.0.mlp.experts.gate_up_proj", lambda w: w.copy_(w.flip(1))),  # up where gate should be
        ("model.layers.0.mlp.gate.weight", lambda w: w.copy_(w.roll(1, 0))),  # the wrong expert
        ("lm_head.weight", lambda w: w.zero_()),
    ],
)
def test_a_model_that_differs_has_no_time(pair, parameter, change):
    ours, inputs, targets = pair
    peer = mixtral(ours)
    with torch.no_grad():
        change(peer.get_parameter(parameter))
    with pytest.raises(InputError, match="not the same model"):
        bench.check_same("peer", ours, peer, inputs, targets)
