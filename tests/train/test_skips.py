"""Iterations that are skipped: on all ranks or none, nothing changed by them, their data named, and not for ever."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_engine.model import Transformer
from moe_engine.train import __main__ as command
from moe_engine.train import parallel, skips
from moe_engine.train.checkpoint import Checkpoints
from moe_engine.train.cli import guarded
from moe_engine.train.data import TokenDataset, TrainLoader
from moe_engine.train.errors import InputError
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import deterministic, read_metrics
from moe_engine.train.parallel import World
from moe_engine.train.skips import HISTORY, LEAST, SpikeGuard, coordinates, not_finite
from moe_engine.train.step import Engine

ONE = World(0, 1, 0)
CPU = torch.device("cpu")
BIAS = {"router_balance": "bias"}
# What becomes of a loss: the first leaves the gradient finite, the last is large and finite, gradient and all.
SPOILS = {
    "loss": lambda mean: mean + math.nan,
    "gradient": lambda mean: mean + (mean - mean.detach()) * math.inf,
    "both": lambda mean: mean * math.nan,
    "spike": lambda mean: mean * 50,
}


@pytest.fixture
def spoil(monkeypatch):
    """Makes `Engine._losses` spoil the loss of some iterations (counted from 0)."""
    losses, step, now = Engine._losses, Engine.step, []

    def noted(self, batches, iteration):
        now.append(iteration)
        return step(self, batches, iteration)

    def make(kind, iterations):
        def spoiled(self, out):
            mean, balance, z = losses(self, out)
            return SPOILS[kind](mean) if now[-1] in iterations else mean, balance, z

        monkeypatch.setattr(Engine, "step", noted)
        monkeypatch.setattr(Engine, "_losses", spoiled)

    return make


@pytest.fixture
def trainer(small_run):
    """Makes a trainer; its thread and its process group end with the test."""
    made = []

    def make(**values):
        made.append(Trainer(small_run(**values), ONE, CPU))
        return made[-1]

    yield make
    for one in made:
        one.loader.close()
    parallel.stop()


def state_of(trainer):
    """All that a step may change, copied."""
    state = {n: parallel.whole(t.detach()).clone() for n, t in trainer.model.named_parameters()}
    state |= {f"{n}.select_bias": b.moe.router.select_bias.clone() for n, b in enumerate(trainer.model.blocks)}
    for number, moments in enumerate(trainer.engine.optimizer.state.values()):
        state |= {f"{number}.{n}": parallel.whole(t).clone() for n, t in moments.items()}
    return state, json.dumps([trainer.engine.guard.state_dict(), trainer.engine.scaler.state_dict()])


def assert_same_state(one, other):
    assert one[1] == other[1] and one[0].keys() == other[0].keys()
    assert [n for n in one[0] if not torch.equal(one[0][n], other[0][n])] == []


def records(config, kind="train"):
    return [deterministic(r) for r in read_metrics(Path(config.out_dir) / "metrics.jsonl") if r["kind"] == kind]


# What a skipped iteration leaves alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_skipped_iteration_changes_nothing(trainer, spoil, monkeypatch, dtype):
    """Weights, moments, step counters, biases of the routers, history of the guard: to the last bit."""
    monkeypatch.setattr(skips, "LEAST", 3)
    one = trainer(dtype=dtype, model=BIAS, skip_spikes=6.0, max_iters=20)
    assert (dtype == "bfloat16") == torch.distributed.is_initialized()  # FSDP2 in one process
    for _ in range(3):
        assert one.train_step().applied
    for kind in SPOILS:
        spoil(kind, {one.iteration})
        before = state_of(one)
        assert len(before[0]) > 100 and float(one.engine.optimizer.state_dict()["state"][0]["step"]) == 3
        step = one.train_step()
        assert not step.applied and step.reason
        assert math.isfinite(step.grad_norm) == (kind in ("loss", "spike")), kind
        assert ("spike" in step.reason) == (kind == "spike"), step.reason
        assert_same_state(before, state_of(one))
        assert all(p.grad is None for p in one.model.parameters())
    assert one.loader.state_dict()["window"] == 7 * one.loader.batch_size  # the data is behind it
    step = one.train_step()
    assert step.applied and step.reason == ""
    after = state_of(one)
    assert not torch.equal(after[0]["head.weight"], before[0]["head.weight"]) and after[1] != before[1]


def test_what_follows_a_skipped_iteration_is_as_if_it_had_only_taken_data(trainer, spoil):
    """The reference moves its loader on by hand: no NaN has stayed anywhere, nor a trace of the skipped step."""
    skipping, reference = trainer(), trainer()
    for one in (skipping, reference):
        one.train_step()
    spoil("both", {1})
    assert not skipping.train_step().applied
    reference.loader.next_batch()
    reference.iteration += 1
    for _ in range(2):
        assert skipping.train_step().grad_norm == reference.train_step().grad_norm
    assert all(
        torch.equal(p, q) for p, q in zip(skipping.model.parameters(), reference.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("kind", ["loss", "spike"])
def test_a_loss_scale_hears_of_overflows_only(trainer, spoil, monkeypatch, kind):
    """fp16's scaler, on the CPU: a step that is skipped for another reason neither lowers nor feeds the scale."""
    monkeypatch.setattr(skips, "LEAST", 3)
    one = trainer(skip_spikes=20.0)
    one.engine.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    assert all(one.train_step().applied for _ in range(3))
    before = one.engine.scaler.state_dict()
    spoil(kind, {3})
    assert not one.train_step().applied
    assert one.engine.scaler.state_dict() == before and before["_growth_tracker"] == 3
    assert one.train_step().applied and one.engine.scaler.state_dict()["_growth_tracker"] == 4


def test_steps_in_backward_skip_all_parameters_of_a_loss_that_is_not_finite(trainer, spoil):
    """Though every gradient is finite."""
    one = trainer(optimizer_in_backward=True)
    one.train_step()
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    spoil("loss", {1})
    step = one.train_step()
    assert not step.applied and math.isfinite(step.grad_norm) and step.reason == "loss nan"
    assert all(torch.equal(p, before[n]) for n, p in one.model.named_parameters())
    assert one.train_step().applied


# All ranks alike

RANK = """
import hashlib, json, math, sys
import torch
from moe_engine.train import loop, parallel, skips
from moe_engine.train.__main__ import main
from moe_engine.train.step import Engine

skips.LEAST = 5
loop.peak_flops = lambda *_: (None, "nothing")
losses, step, seen = Engine._losses, Engine.step, []

def spoiled(self, out):
    mean, balance, z = losses(self, out)
    if self.world.rank == 1 and len(seen) == 3:
        mean = mean + math.nan  # the gradient stays finite
    if self.world.rank == 1 and len(seen) == 8:
        mean = mean * 50
    return mean, balance, z

def noted(self, batches, iteration):
    done = step(self, batches, iteration)
    weights = hashlib.sha256()
    for p in self.model.parameters():
        weights.update(parallel.whole(p.detach()).numpy().tobytes())
    seen.append([done.applied, done.reason, done.grad_norm, bool(done.loss.isfinite()), weights.hexdigest()])
    return done

Engine._losses, Engine.step = spoiled, noted
status = main(json.loads(sys.argv[1]))
rank = loop.World.from_environment().rank
with open(f"{sys.argv[2]}/rank{rank}.json", "w") as f:
    json.dump(seen, f)
sys.exit(status)
"""


def torchrun(script, config, folder):
    """A script on two ranks, with a run's flags and a folder for what it writes."""
    table = dataclasses.asdict(config)
    table |= {f"model.{name}": value for name, value in table.pop("model").items()}
    flags = [f"--{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in table.items() if v is not None]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [sys.executable, *launcher, script, json.dumps(flags), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_ranks_skip_together_what_only_one_of_them_sees(small_run, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    config = small_run(skip_spikes=6.0, max_iters=10, batch_size=2, grad_accum_steps=2, eval_interval=0)
    done = torchrun(str(tmp_path / "rank.py"), config, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert [s[:3] + s[4:] for s in one] == [s[:3] + s[4:] for s in two]  # decisions, reasons, norms, weights
    assert [i for i, s in enumerate(one) if not s[0]] == [3, 8]
    assert one[3][1] == "loss nan" and math.isfinite(one[3][2]) and (one[3][3], two[3][3]) == (True, False)
    assert "loss" in one[8][1] and "gradient norm" in one[8][1] and "a spike" in one[8][1]
    assert [one[i][4] == one[i - 1][4] for i in range(1, 10)] == [i in (3, 8) for i in range(1, 10)]
    lines = [line for line in (Path(config.out_dir) / "logs.txt").read_text().splitlines() if "skipped on all" in line]
    assert len(lines) == 2
    # 4 iterations before of 2 ranks × 2 micro-steps × 2 sequences; rank 1 comes behind rank 0 in a micro-step
    loader = TrainLoader(TokenDataset.open(config.data_dir, "train", 16), 2, rank=1, world_size=2, seed=config.seed)
    loader.load_state_dict(loader.state_dict() | {"window": 4 * 8})
    windows = loader.read_by(1, 2)[1]
    assert loader.read_by(1, 2)[0] == 26
    assert "iter 4: loss nan: the update" in lines[0] and "order positions 24 to 31" in lines[0]
    assert "loss not finite on rank 1;" in lines[0] and f"rank 1 in micro-step 0: {windows[0]} (toy_train" in lines[0]
    assert "highest loss" in lines[1] and "on rank 1" in lines[1] and "(1 in a row, 2 in all)" in lines[1]
    assert [r["skipped"] for r in records(config)] == [0] * 3 + [1] * 5 + [2] * 2


# Where the data is


def test_a_window_is_located_in_its_shard(data_dir):
    """Token i of this data is i: 12 windows of 8 in the first shard, of which the second begins with token 100."""
    dataset = TokenDataset.open(data_dir, "train", 8)
    for window, (shard, position) in {0: (0, 0), 11: (0, 88), 12: (1, 0), 18: (1, 48)}.items():
        found, token = dataset.locate(window)
        assert (found.name, token) == (f"toy_train_00000{shard}.npy", position)
        assert dataset.window(window)[0] == 100 * shard + position
    with pytest.raises(IndexError):
        dataset.locate(19)


def test_what_each_rank_read_is_known_to_all(data_dir):
    """Against the batches themselves, across the end of an epoch of 19 windows."""
    dataset = TokenDataset.open(data_dir, "train", 8)
    loaders = [TrainLoader(dataset, 3, rank=r, world_size=2, prefetch=0) for r in range(2)]
    batches = [[loader.next_batch() for _ in range(5)] for loader in loaders]
    for rank in range(2):
        for micro_step in range(5):
            position, windows = loaders[1 - rank].read_by(rank, 5 - micro_step)
            assert position == 6 * micro_step + 3 * rank
            assert torch.equal(batches[rank][micro_step][0], torch.from_numpy(dataset.batch(windows)[0]))
    text = coordinates(loaders[0], [[1.0, 2.0], [1.0, math.nan]])
    position, windows = loaders[0].read_by(1, 1)
    shard, token = dataset.locate(int(windows[0]))
    assert position == 27 and "order positions 18 to 29, which begin at place 18 of epoch 0" in text
    assert "rank r of 2 read 3 from 18 + 6·m + 3·r in micro-step m" in text
    assert (
        f"not finite on rank 1; windows of rank 1 in micro-step 1: {windows[0]} ({shard.name} at token {token})" in text
    )
    assert "highest loss, 3, on rank 0; windows of rank 0 in micro-step 1: " in coordinates(
        loaders[0], [[1, 3], [2, 2]]
    )


def test_the_warning_is_of_bounded_length(data_dir):
    loader = TrainLoader(TokenDataset.open(data_dir, "train", 8), 64, world_size=1024, prefetch=0)
    loader.load_state_dict(loader.state_dict() | {"epoch": 10**6})
    text = coordinates(loader, [[math.nan] * 32] * 1024)
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 1016 more" in text and "and 56 more" in text
    assert len(text) < 1000 and "\n" not in text


def test_not_finite_names_what_is_not():
    assert (not_finite(1.0, 2.0), not_finite(math.nan, 2.0)) == ("", "loss nan")
    assert not_finite(-math.inf, math.nan) == "loss -inf and gradient norm nan"


# Spikes


@pytest.fixture
def guard():
    """A guard of 3 standard deviations that knows 40 iterations of loss 4 ± 0.1 and gradient norm 1 ± 0.2."""
    one = SpikeGuard(3.0)
    for i in range(40):
        one.applied(4 + 0.1 * (-1) ** i, 1 + 0.2 * (-1) ** i)
    return one


def test_a_spike_is_above_the_mean_by_so_many_deviations(guard):
    assert guard.spike(4.29, 1.59) == "" and guard.spike(-100.0, 0.0) == ""  # below is no spike
    assert guard.spike(4.31, 1.59).startswith("loss 4.31, a spike: above 4 + 3 · 0.1 of the last 40 applied")
    assert guard.spike(4.29, 1.61).startswith("gradient norm 1.61, a spike: above 1 + 3 · 0.2")
    assert " and gradient norm" in guard.spike(9.0, 9.0)


def test_nothing_is_a_spike_before_enough_is_known_and_old_iterations_are_forgotten():
    one = SpikeGuard(3.0)
    for i in range(LEAST):
        assert one.spike(100.0 + i, 100.0) == ""
        one.applied(1 + 0.01 * (i % 2), 1.0)
    assert one.spike(2.0, 1.0)
    for i in range(HISTORY):
        one.applied(10 + 0.01 * (i % 2), 1.0)
    assert one.spike(10.0, 1.0) == "" and [len(v) for v in one.state_dict().values()] == [HISTORY] * 2


def test_a_guard_that_is_off_finds_nothing_and_keeps_nothing():
    one = SpikeGuard(0.0)
    for _ in range(40):
        one.applied(1.0, 1.0)
    assert one.spike(1e9, 1e9) == "" and one.state_dict() == {"loss": [], "gradient norm": []}
    one.load_state_dict({"loss": [1.0], "gradient norm": [1.0]})
    assert one.state_dict() == {"loss": [], "gradient norm": []}


def test_the_history_comes_back_from_json_to_the_last_bit():
    one, other = SpikeGuard(2.0), SpikeGuard(2.0)
    for loss, norm in np.random.default_rng(0).random((40, 2)):
        one.applied(float(loss), float(norm))
    other.applied(5.0, 5.0)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict()
    other.load_state_dict({})  # a checkpoint from before there was a guard
    assert other.state_dict() == {"loss": [], "gradient norm": []}


def test_the_guard_is_off_unless_it_is_asked_for(trainer, spoil):
    spoil("spike", {40})
    one = trainer(max_iters=50)
    assert one.config.skip_spikes == 0 and all(one.train_step().applied for _ in range(42))


def test_a_resume_with_the_guard_on_is_bitwise_the_uninterrupted_run(small_run, tmp_path, spoil, monkeypatch):
    """The spike of iteration 8 is one only to a guard that remembers what came before the resume at 6."""
    monkeypatch.setattr(skips, "LEAST", 7)
    spoil("spike", {8})
    values = {"skip_spikes": 5.0, "max_iters": 12}
    whole = small_run(out_dir=tmp_path / "whole", **values)
    parts = small_run(out_dir=tmp_path / "parts", **values)
    assert command.train(whole) == 0
    assert command.train(dataclasses.replace(parts, max_iters=6)) == 0
    state = Checkpoints(tmp_path / "parts", ONE).read_state(tmp_path / "parts/ckpt/step_00000006")
    assert len(state["counters"]["spike_history"]["loss"]) == 6
    assert command.train(parts) == 0
    assert records(whole) == records(parts) and records(whole, "eval") == records(parts, "eval")
    assert [r["skipped"] for r in records(whole)] == [0] * 8 + [1] * 4
    weights = []
    for config in (whole, parts):
        one = Trainer(config, ONE, CPU)
        one.resume(Path(config.out_dir) / "ckpt/step_00000012")
        weights.append((list(one.model.parameters()), one.engine.guard.state_dict(), one.counters))
    assert all(torch.equal(p, q) for p, q in zip(weights[0][0], weights[1][0], strict=True))
    assert weights[0][1:] == weights[1][1:]


# Too many


def test_a_window_that_never_gives_a_finite_loss_stops_the_run_and_the_same_command_goes_on(
    small_run, monkeypatch, capsys
):
    config = small_run(max_bad_steps=1, max_iters=8, save_every=100)
    dataset = TokenDataset.open(config.data_dir, "train", config.block_size)
    loader = TrainLoader(dataset, config.batch_size, seed=config.seed)
    loader.load_state_dict(loader.state_dict() | {"window": 4 * config.batch_size})
    bad = int(loader.read_by(0, 1)[1][2])  # the third of the fourth iteration
    tokens = dataset.window(bad)
    now, losses = [], Engine._losses

    def forward(self, inputs, targets=None, **options):
        now.append(bool((inputs == torch.from_numpy(tokens[:-1].astype(np.int64))).all(1).any()))
        return before(self, inputs, targets, **options)

    def spoiled(self, out):
        mean, balance, z = losses(self, out)
        return mean * (math.nan if now[-1] else 1.0), balance, z

    before = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", forward)
    monkeypatch.setattr(Engine, "_losses", spoiled)
    assert guarded(lambda: command.train(config)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: 1 iterations in a row skipped, the last for loss nan")
    assert "checkpoint of the last good state (iteration 4)" in error and "the same command goes on" in error
    log = (Path(config.out_dir) / "logs.txt").read_text()
    shard, token = dataset.locate(bad)
    assert f"{bad} ({shard.name} at token {token})" in log
    path = Checkpoints(Path(config.out_dir), ONE).latest()
    assert path.name == "step_00000004"
    kept = Trainer(config, ONE, CPU)
    kept.resume(path)
    assert all(p.isfinite().all() for p in kept.model.parameters())
    assert {float(s["step"]) for s in kept.engine.optimizer.state.values()} == {3.0}
    assert kept.counters == {"skipped": 1, "skipped_in_a_row": 0}
    assert guarded(lambda: command.train(config)) == 0
    assert [r["iter"] for r in records(config)] == [1, 2, 3, 5, 6, 7, 8]
    assert [r["skipped"] for r in records(config)] == [0, 0, 0, 1, 1, 1, 1]


def test_spikes_count_towards_the_end_too_and_it_says_which_kind(small_run, spoil, monkeypatch):
    monkeypatch.setattr(skips, "LEAST", 4)
    spoil("spike", range(5, 100))
    config = small_run(skip_spikes=6.0, max_bad_steps=3, max_iters=50, eval_interval=0)
    with pytest.raises(InputError, match=r"^3 iterations in a row skipped, the last for loss .* a spike.*skip_spikes"):
        command.train(config)
    assert Checkpoints(Path(config.out_dir), ONE).latest().name == "step_00000008"


def test_a_good_iteration_ends_a_row(small_run, spoil):
    spoil("both", {1, 2, 4, 5})
    config = small_run(max_bad_steps=3, max_iters=8, eval_interval=0)
    assert command.train(config) == 0
    assert records(config)[-1]["skipped"] == 4
    lines = [line for line in (Path(config.out_dir) / "logs.txt").read_text().splitlines() if "in a row" in line]
    assert [line[line.index("(") : line.index(")") + 1] for line in lines] == [
        f"({row} in a row, {total} in all)" for row, total in ((1, 1), (2, 2), (1, 3), (2, 4))
    ]


def test_counts_are_kept_across_a_resume_and_an_old_checkpoint_has_none(small_run, spoil):
    spoil("loss", {3, 5, 6})
    config = small_run(max_iters=8, max_bad_steps=3, eval_interval=0)
    assert command.train(dataclasses.replace(config, max_iters=6)) == 0
    state = Path(config.out_dir) / "ckpt/step_00000006/state.json"
    assert json.loads(state.read_text())["counters"]["skipped_in_a_row"] == 1
    one = Trainer(config, ONE, CPU)
    one.resume(state.parent)
    assert one.counters == {"skipped": 2, "skipped_in_a_row": 1}
    state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k != "counters"}))
    other = Trainer(config, ONE, CPU)
    other.resume(state.parent)
    assert other.counters == {"skipped": 0, "skipped_in_a_row": 0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_bad_steps": 0}, "--max_bad_steps: expected at least 1, got 0"),
        ({"skip_spikes": -1.0}, "--skip_spikes: expected at least 0, got -1"),
        ({"skip_spikes": math.nan}, "--skip_spikes: expected at least 0, got nan"),
        (
            {"skip_spikes": 6.0, "optimizer_in_backward": True},
            "--skip_spikes 6: cannot be used with --optimizer_in_back",
        ),
    ],
)
def test_what_cannot_be_is_refused(small_run, values, message):
    with pytest.raises(InputError, match=message):
        small_run(**values)
