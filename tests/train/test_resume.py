"""A run of two ranks goes on: on as many others, after its data went away on one rank, after a stop at any point."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from moe_engine.train import __main__ as command
from moe_engine.train.checkpoint import Checkpoints
from moe_engine.train.data import TokenDataset, ValLoader
from moe_engine.train.errors import InputError
from moe_engine.train.metrics import deterministic, read_metrics
from moe_engine.train.parallel import World
from moe_engine.train.step import Engine

generation = importlib.import_module("moe_engine.generate")  # the package has a function of that name
ONE = World(0, 1, 0)
HALF, WHOLE = 10, 30


def records(config, *kinds):
    found = read_metrics(Path(config.out_dir) / "metrics.jsonl")
    return [deterministic(record) for record in found if record["kind"] in (kinds or ("train",))]


def tensors(config, iteration):
    """What every rank's file of a checkpoint holds."""
    found = {}
    for path in sorted((Path(config.out_dir) / f"ckpt/step_{iteration:08d}").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {(path.name, key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return {name: tensor for name, tensor in found.items() if not name[1].startswith("rng.")}


def assert_same_end(one, other, iteration):
    a, b = tensors(one, iteration), tensors(other, iteration)
    assert a and a.keys() == b.keys()
    assert [name for name in a if not a[name].equal(b[name])] == []


@pytest.fixture(scope="module")
def half(small_run_in, tmp_path_factory, forked_ranks):
    """A run of two ranks that has come as far as iteration 10 of 30, with twelve sequences an iteration."""
    config = small_run_in(
        tmp_path_factory.mktemp("runs") / "half", batch_size=6, max_iters=HALF, lr_decay_iters=WHOLE, eval_interval=0,
        save_every=HALF,
    )  # fmt: skip
    assert forked_ranks(2, config)[0] == [0, 0]
    return config


@pytest.fixture(scope="module")
def goes_on(half, tmp_path_factory, forked_ranks):
    """Makes a copy of it and takes it to iteration 30 on so many ranks, once for each number."""
    done = {}

    def run(ranks):
        if ranks not in done:
            folder = tmp_path_factory.mktemp(f"on {ranks}") / "run"
            shutil.copytree(half.out_dir, folder)
            done[ranks] = config = dataclasses.replace(
                half, out_dir=str(folder), batch_size=12 // ranks, max_iters=WHOLE
            )
            statuses, _, errors = forked_ranks(ranks, config)
            assert statuses == [0] * ranks, errors
        return done[ranks]

    return run


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_another_number_of_ranks_has_the_same_losses(goes_on, ranks):
    """The same data in the same order: losses of the next 20 iterations agree to 1e-6, in fp32."""
    same, other = (records(goes_on(number))[HALF:] for number in (2, ranks))
    assert len(same) == len(other) == WHOLE - HALF
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(same, other, strict=True)) < 1e-6
    folder = Path(goes_on(ranks).out_dir) / f"ckpt/step_{WHOLE:08d}"
    assert len(list(folder.glob("ckpt_rank*.safetensors"))) == ranks
    assert Checkpoints(folder.parents[1], ONE).defect(folder) is None


def test_the_data_order_goes_on_and_is_not_begun_again(goes_on):
    """Losses of the same windows would fall below those of new ones: here they are another iteration's."""
    states = [json.loads((Path(goes_on(n).out_dir) / f"ckpt/step_{WHOLE:08d}/state.json").read_text()) for n in (2, 3)]
    assert states[0]["loader"] == states[1]["loader"] and states[0]["loader"]["window"] == 12 * WHOLE % 1249


# Data that goes away on one rank

GONE = """
from moe_engine.train.data import TokenDataset
from moe_engine.train.errors import InputError
window, calls = TokenDataset.window, []
def spoiled(self, index):
    if self.split == {split!r}:
        calls.append(index)
        if rank == 1 and len(calls) > {after}:
            raise InputError("toy.npy: truncated")
    return window(self, index)
TokenDataset.window = spoiled
"""


@pytest.fixture(scope="module")
def whole(small_run_in, tmp_path_factory, forked_ranks):
    """A run of two ranks that nothing happens to, with evaluations before iterations 1, 9 and 13."""
    config = small_run_in(tmp_path_factory.mktemp("runs") / "whole", eval_interval=8)
    assert forked_ranks(2, config)[0] == [0, 0]
    return config


# A rank's evaluation reads four windows, and an iteration four: the second evaluation and an iteration in the middle.
@pytest.mark.parametrize(("split", "after", "stops_at"), [("train", 19, 4), ("val", 6, 8)])
def test_data_that_one_rank_cannot_read_stops_all_with_a_checkpoint(
    whole, tmp_path, forked_ranks, split, after, stops_at
):
    config = dataclasses.replace(whole, out_dir=str(tmp_path / "parts"))
    statuses, _, errors = forked_ranks(2, config, before=GONE.format(split=split, after=after))
    assert statuses == [2, 2]
    for text in errors:
        (line,) = text.splitlines()
        assert line.startswith(
            f"error: rank 1: toy.npy: truncated; stopped at iteration {stops_at}; once it is repaired"
        )
    assert Checkpoints(Path(config.out_dir), ONE).newest_sound()[0].name == f"step_{stops_at:08d}"
    assert forked_ranks(2, config)[0] == [0, 0]
    assert records(config, "train", "eval") == records(whole, "train", "eval")
    assert_same_end(config, whole, 12)


def test_data_that_goes_away_within_an_iteration_is_not_passed_over(small_run_in, tmp_path, monkeypatch):
    """The first of its two micro-steps could be read: it is read again."""
    whole = small_run_in(tmp_path / "whole", grad_accum_steps=2, eval_interval=0)
    config = dataclasses.replace(whole, out_dir=str(tmp_path / "parts"))
    assert command.train(whole) == 0
    window, calls = TokenDataset.window, []

    def gone(self, index):
        calls.append(index)
        if len(calls) > 29:  # of 8 an iteration
            raise InputError("toy.npy: truncated")
        return window(self, index)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="truncated; stopped at iteration 3"):
        patch.setattr(TokenDataset, "window", gone)
        command.train(config)
    assert command.train(config) == 0
    assert records(config) == records(whole)
    assert_same_end(config, whole, 12)


# A save that fails on one rank

REFUSED = """
import errno
from moe_engine.train import checkpoint, storage
save_file, write, calls = storage.save_file, checkpoint.write_atomically, []
def refuse(*args):
    calls.append(args)
    if rank == 1 and len(calls) == 2:
        raise OSError(errno.ENOSPC, "No space left on device")
    save_file(*args)
def refuse_to_publish(path, text):
    if path.name == "SHA256SUMS" and len(calls) == 3:
        raise OSError(errno.EIO, "Input/output error")
    write(path, text)
storage.save_file, checkpoint.write_atomically = refuse, refuse_to_publish
"""


def test_a_save_that_fails_on_one_rank_fails_on_all_and_training_goes_on(small_run, forked_ranks):
    """The second on rank 1, which writes, the third on rank 0, which publishes; there is no half of them."""
    config = small_run(eval_interval=0, save_every=3, async_save=False, keep_last_n=0)
    statuses, outputs, errors = forked_ranks(2, config, before=REFUSED)
    assert statuses == [0, 0], errors
    assert "iter 6: rank 1: checkpoint not written: No space left" in outputs[0]
    assert "iter 7: checkpoint not written: Input/output error" in outputs[0]
    folder = Path(config.out_dir) / "ckpt"
    assert sorted(p.name for p in folder.glob("step_*")) == [
        "step_00000003", "step_00000008", "step_00000009", "step_00000012",
    ]  # fmt: skip
    assert all(Checkpoints(Path(config.out_dir), ONE).defect(path) is None for path in folder.glob("step_*"))


# Stops at any point, in one process

POINTS = {
    "the first iteration": (Engine, "step", 1),
    "an iteration before an evaluation": (Engine, "step", 6),
    "the evaluation before the first iteration": (ValLoader, "__iter__", 1),
    "an evaluation": (ValLoader, "__iter__", 2),
    "a sample": (generation, "_choose", 3),
    "the last evaluation": (ValLoader, "__iter__", 3),
    "the last sample": (generation, "_choose", 12),
    "saving": (Checkpoints, "save", 1),
    "publishing": (Checkpoints, "_publish", 1),
}


@pytest.fixture(scope="module")
def alone(small_run_in, tmp_path_factory):
    """A run of one process that nothing happens to; the tokens of its data have texts of their own."""
    config = small_run_in(tmp_path_factory.mktemp("runs") / "alone", sample_every=6)
    assert command.train(config) == 0
    return config


@pytest.mark.parametrize("point", POINTS)
def test_a_stop_at_any_point_changes_nothing(alone, tmp_path, monkeypatch, point):
    """Evaluations, samples and `best` too: what the stop has kept from the run is done when it goes on."""
    owner, name, count = POINTS[point]
    # A thread could be so late that the run is over when its checkpoint is published.
    config = dataclasses.replace(alone, out_dir=str(tmp_path / "run"), async_save=point != "publishing")
    calls, function = [], getattr(owner, name)

    def stopped(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        begin = time.monotonic()
        assert command.train(config) == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 30
    before_any = point == "the evaluation before the first iteration"
    stopped_at, _ = Checkpoints(Path(config.out_dir), ONE).newest_sound()
    assert (stopped_at is None) == before_any
    assert command.train(config) == 0
    for kind in ("train", "eval", "sample"):
        assert records(config, kind) == records(alone, kind)
    assert_same_end(config, alone, 12)
    for file in ("ckpt/best", "ckpt/latest", "samples/iter_00000006.txt", "samples/iter_00000012.txt"):
        assert (Path(config.out_dir) / file).read_text() == (Path(alone.out_dir) / file).read_text(), file
