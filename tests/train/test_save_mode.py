"""`--model.save x` computes the up-projection again in backward: the same run, also from one start to the next."""

import dataclasses
from pathlib import Path

from moe_engine.train import __main__ as command
from moe_engine.train.config import ModelOverrides
from moe_engine.train.metrics import deterministic, read_metrics


def test_a_run_may_change_what_the_experts_keep(small_run, tmp_path):
    records = []
    for name, modes in (("h", ("h", "h")), ("x", ("h", "x"))):
        for iterations, save in zip((3, 6), modes, strict=True):
            config = small_run(out_dir=str(tmp_path / name), max_iters=iterations, eval_interval=0, save_every=0)
            given = dataclasses.asdict(config.model) | {"save": save}
            assert command.train(dataclasses.replace(config, model=ModelOverrides(**given))) == 0
        metrics = read_metrics(Path(config.out_dir) / "metrics.jsonl")
        records.append([deterministic(record) for record in metrics])
    assert records[0] == records[1] and sum(r["kind"] == "train" for r in records[0]) == 6
