"""The long form of the router's recovery: the tiny preset on the standard library's text (`pytest -m slow`)."""

from pathlib import Path

import pytest
import torch

from moe_engine.train.config import resolve
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import RunLog, read_metrics
from moe_engine.train.parallel import World
from moe_engine.train.prepare import PrepareConfig, prepare


@pytest.mark.slow
def test_a_collapsed_tiny_model_recovers(tmp_path):
    """All tokens start on experts 0 and 1 of every layer; the default coefficient, the whole tiny run."""
    prepare(PrepareConfig(source="stdlib", tokenizer="o200k_base:4096", out_dir=str(tmp_path / "data")))
    config = resolve(
        {"preset": "tiny", "data_dir": str(tmp_path / "data"), "out_dir": str(tmp_path / "run")},
        {"eval_interval": 0, "sample_every": 0, "save_every": 0},
    )
    torch.set_num_threads(2)  # the suite's default of one is for models smaller than this
    trainer = Trainer(config, World(0, 1, 0), torch.device("cpu"))
    with torch.no_grad():
        for block in trainer.model.blocks:
            block.moe.router.weight.mul_(0.01)
            block.moe.router.bias[:2] += 1.0
    with RunLog(Path(config.out_dir), console=False) as log:
        assert trainer.train_step().balance.min() > 1.8
        assert trainer.run(log) == 0
    last = [r for r in read_metrics(log.metrics_path) if r["kind"] == "train"][-1]
    assert sum(last["balance_per_layer"]) / len(last["balance_per_layer"]) < 1.2
    assert last["router_aux"] < 0.001
