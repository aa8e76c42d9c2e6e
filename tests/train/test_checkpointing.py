"""Activation checkpointing in the driver: no mode changes a run, in one process or two, in 16 bits or 32."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_engine.checkpointing import MODES
from moe_engine.train import __main__ as command
from moe_engine.train.errors import InputError
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import deterministic, read_metrics
from moe_engine.train.parallel import World, stop


def records(config):
    found = read_metrics(Path(config.out_dir) / "metrics.jsonl")
    return [deterministic(record) for record in found if record["kind"] != "save"]  # logged when a disk is done


def state(config, iteration):
    """Weights and AdamW's moments in a run's checkpoint, read in one process."""
    trainer = Trainer(config, World(0, 1, 0), torch.device("cpu"))
    trainer.resume(Path(config.out_dir) / f"ckpt/step_{iteration:08d}")
    trainer.loader.close()
    moments = [value for slot in trainer.engine.optimizer.state.values() for value in slot.values()]
    values = [getattr(value, "_local_tensor", value).clone() for value in [*trainer.model.parameters(), *moments]]
    stop()
    return values


def assert_same_run(one, other, iteration):
    a, b = records(one), records(other)
    assert a == b and sum(r["kind"] == "train" for r in a) == iteration
    a, b = state(one, iteration), state(other, iteration)
    assert len(a) > 60 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_resume_may_change_the_mode_and_no_mode_changes_the_run(small_run, tmp_path):
    whole = small_run(out_dir=str(tmp_path / "whole"), eval_interval=0, save_every=4)
    assert command.train(whole) == 0
    parts = dataclasses.replace(whole, out_dir=str(tmp_path / "parts"))
    for iterations, values in ((4, {}), (8, {"checkpointing": "block"}), (12, {"checkpointing": "selective"})):
        parts = dataclasses.replace(parts, max_iters=iterations, **values)
        assert command.train(parts) == 0
    assert_same_run(whole, parts, 12)


def test_every_mode_is_the_same_run_in_bf16(small_run, tmp_path):
    """Under FSDP2's mixed precision, in a group of one."""
    runs = [small_run(out_dir=str(tmp_path / mode), checkpointing=mode, dtype="bfloat16", grad_accum_steps=2,
                      max_iters=4, eval_interval=0, save_every=0) for mode in MODES]  # fmt: skip
    for config in runs:
        assert command.train(config) == 0
    for other in runs[1:]:
        assert_same_run(runs[0], other, 4)


RANKS = """
import json, sys
import torch
from moe_engine.checkpointing import MODES
from moe_engine.config import ModelConfig
from moe_engine.model import Transformer
from moe_engine.router import balance_loss
from moe_engine.train import parallel

world, cpu = parallel.World.from_environment(), torch.device("cpu")
parallel.start(world, cpu, torch.bfloat16)
results = []
for mode in MODES:
    with torch.device("meta"):
        model = Transformer(ModelConfig(**json.loads(sys.argv[1])))
    parallel.shard(model, world, cpu, torch.bfloat16)
    model.to_empty(device=cpu)
    model.init_weights()
    model.set_checkpointing(mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = []
    for step in range(2):
        tokens = torch.randint(0, 264, (2, 16), generator=torch.Generator().manual_seed(10 * step + world.rank))
        out = model(tokens, tokens.roll(-1, 1))
        loss = out.loss / 32 + balance_loss(out.stats, 2).sum()
        loss.backward()
        optimizer.step()
        values += [loss.detach(), *out.stats, *(p.grad.full_tensor() for p in model.parameters())]
        optimizer.zero_grad()
    results.append([*values, *(p.detach().full_tensor() for p in model.parameters())])
for other in results[1:]:
    assert len(other) > 60 and all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
parallel.stop()
"""


def test_every_mode_is_the_same_on_two_ranks(small_run, tmp_path):
    """Chosen after sharding. Parameters are gathered again for the second run of a block, and routers for theirs."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    model = json.dumps({n: v for n, v in dataclasses.asdict(small_run().model).items() if v is not None})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), model],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_model_gets_the_options(small_run):
    config = small_run(checkpointing="block", checkpoint_every=2, model={"num_layers": 3})
    trainer = Trainer(config, World(0, 1, 0), torch.device("cpu"))
    trainer.loader.close()
    assert [block.checkpointing for block in trainer.model.blocks] == ["block", "none", "block"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"checkpointing": "full"}, "checkpointing: expected one of none, block, selective, got 'full'"),
        ({"checkpoint_every": 0}, "--checkpoint_every: expected at least 1, got 0"),
    ],
)
def test_bad_options(small_run, values, message):
    with pytest.raises(InputError) as error:
        small_run(**values)
    assert str(error.value) == message
