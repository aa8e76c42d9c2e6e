"""Balancing biases, jitter and the z-loss of the logits in a run: exact, the same on any number of ranks, saved."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_engine.checkpointing import MODES
from moe_engine.model import Transformer
from moe_engine.train import __main__ as command
from moe_engine.train.checkpoint import Checkpoints
from moe_engine.train.config import differences
from moe_engine.train.errors import InputError
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import RunLog, deterministic, read_metrics
from moe_engine.train.parallel import World, check_initialisation, stop
from moe_engine.train.step import Engine

ONE, CPU = World(0, 1, 0), torch.device("cpu")
BIAS = {"router_balance": "bias"}
BOTH = {"router_balance": "bias", "router_jitter": 0.1}
RATE = 2.0**-7  # its multiples are exact


def records(config, kind="train"):
    return [deterministic(r) for r in read_metrics(Path(config.out_dir) / "metrics.jsonl") if r["kind"] == kind]


def biases(model):
    return torch.stack([block.moe.router.select_bias for block in model.blocks]).clone()


def run_state(config, iteration):
    """Parameters and buffers in a run's checkpoint, the model's own names."""
    trainer = Trainer(config, ONE, CPU)
    trainer.resume(Path(config.out_dir) / f"ckpt/step_{iteration:08d}")
    trainer.loader.close()
    stop()
    return {n: getattr(v, "_local_tensor", v).clone() for n, v in trainer.model.state_dict().items()}


# The bias


def test_a_step_moves_the_biases_by_the_rows_of_the_global_batch(small_run):
    for batch, micro_steps in ((4, 1), (1, 4)):
        config = small_run(model=BIAS, router_bias_rate=RATE, batch_size=batch, grad_accum_steps=micro_steps)
        trainer = Trainer(config, ONE, CPU)
        counts = []
        hook = trainer.model.register_forward_hook(lambda m, a, out, seen=counts: seen.append(out.stats.expert_counts))
        trainer.train_step()
        hook.remove()
        assert len(counts) == micro_steps
        total = sum(counts).double()
        expected = RATE * torch.sign(total.mean(1, keepdim=True) - total)
        assert torch.equal(biases(trainer.model), expected.float()) and expected.any(1).all()
        before = biases(trainer.model)
        trainer.train_step()
        assert (biases(trainer.model) - before).abs().max() == RATE
        trainer.loader.close()


def test_evaluation_sampling_and_a_skipped_iteration_leave_the_biases_alone(small_run, monkeypatch):
    trainer = Trainer(small_run(model=BIAS), ONE, CPU)
    trainer.train_step()
    before = biases(trainer.model)
    with RunLog(Path(trainer.config.out_dir), console=False) as trainer.log:
        trainer.peak = 1.0
        trainer.evaluate()
    assert torch.equal(biases(trainer.model), before)
    losses = Engine._losses
    monkeypatch.setattr(Engine, "_losses", lambda self, out: tuple(v * math.nan for v in losses(self, out)))
    assert not trainer.train_step().applied
    assert torch.equal(biases(trainer.model), before)
    monkeypatch.undo()
    assert trainer.train_step().applied and not torch.equal(biases(trainer.model), before)
    trainer.loader.close()


def test_resume_is_bitwise_with_biases_and_jitter(small_run, tmp_path):
    whole = small_run(out_dir=str(tmp_path / "whole"), model=BOTH, router_bias_rate=RATE, grad_accum_steps=2)
    assert command.train(whole) == 0
    parts = dataclasses.replace(whole, out_dir=str(tmp_path / "parts"))
    assert command.train(dataclasses.replace(parts, max_iters=6)) == 0
    assert command.train(parts) == 0
    assert records(whole) == records(parts) and len(records(whole)) == 12
    a, b, half = run_state(whole, 12), run_state(parts, 12), run_state(whole, 6)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    name = "blocks.1.moe.router.select_bias"
    assert half[name].any() and not torch.equal(a[name], half[name])
    # As moe-sample reads a checkpoint: the model alone.
    with torch.device("meta"):
        model = Transformer(whole.model_config(257))
    model.to_empty(device=CPU)
    Checkpoints(Path(whole.out_dir), ONE).load(Path(whole.out_dir) / "ckpt/step_00000012", model, None, CPU)
    assert torch.equal(biases(model)[1], a[name])


def test_a_checkpoint_of_a_balanced_run_has_no_bias(small_run):
    """Nor does a run of the loss read one: such checkpoints are what they were before there were biases."""
    config = small_run(max_iters=6)
    assert command.train(config) == 0
    assert not [name for name in run_state(config, 6) if "select_bias" in name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_checkpointing_mode_is_the_same_run(small_run, tmp_path, dtype):
    """In bfloat16 under FSDP2's mixed precision, where the biases have to stay in fp32, and move once a step."""
    runs = [small_run(out_dir=str(tmp_path / mode), checkpointing=mode, dtype=dtype, max_iters=3, eval_interval=0,
                      save_every=0, model=BOTH, router_bias_rate=RATE) for mode in MODES]  # fmt: skip
    for config in runs:
        assert command.train(config) == 0
    states = [run_state(config, 3) for config in runs]
    for config, other in zip(runs[1:], states[1:], strict=True):
        assert records(config) == records(runs[0])
        assert all(torch.equal(states[0][name], other[name]) for name in other)
    bias = torch.stack([states[0][f"blocks.{i}.moe.router.select_bias"] for i in (0, 1)])
    assert bias.dtype == torch.float32 and bias.abs().max() == 3 * RATE
    assert torch.equal((bias / RATE).round() * RATE, bias)


RANKS = """
import json, sys
import torch
import torch.distributed as dist
from moe_engine.train.config import ModelOverrides, TrainConfig
from moe_engine.train.loop import Trainer
from moe_engine.train.parallel import World, stop
from moe_engine.train.step import Engine

values = json.loads(sys.argv[1])
config = TrainConfig(**values | {"model": ModelOverrides(**values["model"])})
world = World.from_environment()
trainer = Trainer(config, world, torch.device("cpu"))
steps = []
for _ in range(4):
    step = trainer.train_step()
    bias = torch.stack([block.moe.router.select_bias for block in trainer.model.blocks])
    everywhere = [torch.empty_like(bias) for _ in range(world.size)]
    dist.all_gather(everywhere, bias)
    assert all(torch.equal(other, bias) for other in everywhere)
    dist.all_reduce(step.loss)
    steps.append([step.loss.item() / world.size, bias.tolist()])
trainer.loader.close()
if world.is_main:
    with open(sys.argv[2], "w") as f:
        json.dump(steps, f)
dist.barrier()  # a rank that leaves first may take the other's connections down
stop()
"""


def test_two_ranks_have_the_biases_and_the_noise_of_one(small_run, tmp_path):
    script, result = tmp_path / "ranks.py", tmp_path / "steps.json"
    script.write_text(RANKS)
    one = small_run(batch_size=8, grad_accum_steps=2, model=BOTH, router_bias_rate=RATE)
    values = json.dumps(dataclasses.asdict(dataclasses.replace(one, batch_size=4)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), values, str(result)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trainer = Trainer(one, ONE, CPU)
    for loss, bias in json.loads(result.read_text()):
        step = trainer.train_step()
        assert step.loss.item() == pytest.approx(loss, abs=1e-5)
        assert biases(trainer.model).tolist() == bias
    trainer.loader.close()


def collapsed(config):
    """A trainer in which all tokens start on the same two experts of every layer."""
    trainer = Trainer(config, ONE, CPU)
    with torch.no_grad():
        for block in trainer.model.blocks:
            block.moe.router.weight.mul_(0.01)
            block.moe.router.bias[:2] += 1.0
    return trainer


def test_a_collapsed_router_recovers_with_biases_alone(small_run):
    """Without them, and without the loss, it stays where it is: `test_loop.py`."""
    config = small_run(
        max_iters=120, lr_decay_iters=120, batch_size=16, eval_interval=0, save_every=0, log_interval=40,
        router_bias_rate=0.02, model=BIAS | {"num_experts": 8},
    )  # fmt: skip
    trainer = collapsed(config)
    assert trainer.engine.aux_coef == 0
    with RunLog(Path(config.out_dir), console=False) as log:
        assert trainer.train_step().balance.min() > 1.8
        assert trainer.run(log) == 0
    last = records(config)[-1]
    share = torch.stack([block.moe.router.select_bias for block in trainer.model.blocks])
    assert sum(last["balance_per_layer"]) / 2 < 1.2
    assert (share[:, :2].amax(1) < share[:, 2:].amin(1)).all()  # held against the first two
    # The log speaks of balance with the coefficient that the loss would have.
    assert last["router_aux"] == pytest.approx(0.005 * (sum(last["balance_per_layer"]) / 2 - 1))


def test_uninitialised_biases_are_noticed(small_run):
    trainer = Trainer(small_run(model=BIAS), ONE, CPU)
    trainer.model.blocks[1].moe.router.select_bias[2] = math.nan
    with pytest.raises(RuntimeError, match="select_bias of the router of layer 1"):
        check_initialisation(trainer.model)
    trainer.loader.close()


# Jitter


def test_jitter_acts_in_training_and_not_in_evaluation(small_run):
    values = []
    for epsilon in (0.0, 0.3):
        trainer = Trainer(small_run(model={"router_jitter": epsilon}), ONE, CPU)
        with RunLog(Path(trainer.config.out_dir), console=False) as trainer.log:
            trainer.peak = 1.0
            loss = trainer.evaluate()
        first = trainer.train_step()
        values.append((loss, first.loss.item(), first.z.tolist(), trainer.train_step().loss.item()))
        trainer.loader.close()
    assert values[0][0] == values[1][0]
    assert all(a != b for a, b in zip(values[0][1:], values[1][1:], strict=True))


def test_sequences_are_numbered_over_ranks_and_micro_steps(small_run):
    trainer = Trainer(small_run(model=BOTH, batch_size=3, grad_accum_steps=2), ONE, CPU)
    trainer.loader.close()
    assert [trainer.engine._jitter(5 * 2 + m) for m in (0, 1)] == [(1337, 30), (1337, 33)]
    trainer.engine.world = World(1, 4, 1)
    assert [trainer.engine._jitter(5 * 2 + m) for m in (0, 1)] == [(1337, 123), (1337, 135)]


# z-loss of the logits


def test_the_z_loss_is_in_training_and_not_in_validation(small_run):
    validation, training = [], []
    for coef in (0.0, 0.01):
        trainer = Trainer(small_run(logit_z_coef=coef, max_iters=6), ONE, CPU)
        with RunLog(Path(trainer.config.out_dir), console=False) as trainer.log:
            trainer.peak = 1.0
            validation.append(trainer.evaluate())
        inputs, _ = trainer.loader.next_batch()
        with torch.no_grad():
            square = trainer.model(inputs).logits.logsumexp(-1).square().mean().item()
        trainer.loader.load_state_dict(trainer.loader.state_dict() | {"window": 0})
        training.append(trainer.train_step().loss.item())
        trainer.loader.close()
    assert validation[0] == validation[1]
    assert training[1] == pytest.approx(training[0] + 0.01 * square, rel=1e-6) and square > 20


# Configuration


def test_auto_is_no_loss_with_biases_and_a_number_stays(small_run):
    assert small_run().aux_coef(8, "loss") == 0.005 and small_run().aux_coef(8, "bias") == 0
    assert small_run(router_aux_coef="1e-4").aux_coef(8, "bias") == 1e-4
    trainer = Trainer(small_run(router_aux_coef="1e-4", model=BIAS), ONE, CPU)
    trainer.loader.close()
    assert trainer.engine.aux_coef == 1e-4


def test_runs_from_before_the_options_go_on_and_a_change_is_refused():
    old = {"model": {"d_ff": 32}}
    assert (
        differences(old, {"model": {"d_ff": 32, "router_balance": "loss", "router_jitter": 0.0, "autotune": True}})
        == []
    )
    assert differences(old, {"model": {"d_ff": 32, "router_balance": "bias"}}) == ["model.router_balance: loss → bias"]
    assert differences(old, old | {"router_bias_rate": 0.1}) == ["router_bias_rate: 0.001 → 0.1"]
    assert differences({"model": {"d_ff": 32}}, {"model": {}}) == ["model.d_ff: 32 → None"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router_bias_rate": -0.1}, "--router_bias_rate: expected at least 0, got -0.1"),
        ({"logit_z_coef": -1.0}, "--logit_z_coef: expected at least 0, got -1.0"),
        ({"logit_z_coef": math.inf}, "--logit_z_coef: expected at least 0, got inf"),
        ({"model": {"router_balance": "none"}}, "--model.router_balance: expected one of loss, bias, got 'none'"),
        ({"model": {"router_jitter": 1.5}}, "--model.router_jitter: expected a number in [0, 1), got 1.5"),
    ],
)
def test_bad_options(small_run, values, message):
    with pytest.raises(InputError) as error:
        small_run(**values).model_config(257)
    assert str(error.value) == message
