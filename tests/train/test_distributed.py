"""Several processes: the loss of a global batch does not depend on how many ranks share it, nor does a resume."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_engine.train import __main__ as command
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import read_metrics
from moe_engine.train.parallel import World

ITERATIONS = 20
HALF = 10
TIED = {"top_k": 4, "tie_embeddings": True}

# Several runs of `moe-train`, one after the other, in processes that are started once.
RUNS = """
import functools, json, sys
from moe_engine.train import loop, parallel
from moe_engine.train.__main__ import main

start, stop = parallel.start, parallel.stop
parallel.start = lambda *a: parallel.dist.is_initialized() or start(*a)  # one process group for all of them
parallel.stop = lambda: None
loop.peak_flops = functools.partial(loop.peak_flops, seconds=0.0)
for flags in json.loads(sys.argv[1]):
    assert main(flags) == 0
stop()
"""


def flags_of(config):
    """The command line that says what a configuration says."""
    table = dataclasses.asdict(config)
    table |= {f"model.{name}": value for name, value in table.pop("model").items()}
    return [f"--{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in table.items() if v is not None]


def torchrun(ranks, *arguments):
    """`torchrun` on this machine, with one thread a rank."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def losses(config):
    return {r["iter"]: r for r in read_metrics(Path(config.out_dir) / "metrics.jsonl") if r["kind"] == "train"}


def assert_same_curve(one, other, tolerance=1e-5):
    """Loss, gradient norm and balance of every iteration agree.

    A token whose second and third expert are as good as tied may choose differently after a rounding, and moves the
    loss of that one iteration by about 1e-4: up to two iterations may show it, where there is a choice at all.
    """
    a, b = losses(one), losses(other)
    assert a.keys() == b.keys() and len(a) == one.max_iters
    apart = [
        i
        for i in a
        if b[i]["loss"] != pytest.approx(a[i]["loss"], abs=tolerance)
        or b[i]["grad_norm"] != pytest.approx(a[i]["grad_norm"], abs=10 * tolerance)
        or b[i]["balance_per_layer"] != pytest.approx(a[i]["balance_per_layer"], abs=10 * tolerance)
    ]
    sparse = one.model.top_k != one.model.num_experts
    assert len(apart) <= (2 if sparse else 0), apart
    for i in apart:
        assert b[i]["loss"] == pytest.approx(a[i]["loss"], abs=2e-3), i


@pytest.fixture(scope="module")
def twenty(small_run_in, tmp_path_factory):
    """A run of twenty iterations of 4 × 32 sequences over all ranks."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name, batch_size, **values):
        defaults = {"max_iters": ITERATIONS, "lr_decay_iters": ITERATIONS, "eval_interval": 10, "save_every": 10}
        return small_run_in(folder / name, batch_size=batch_size, **defaults | values)

    return make


@pytest.fixture(scope="module")
def runs(twenty, tmp_path_factory):
    """Finished runs by name, of one and of two ranks. No process goes on with a run that it began."""
    script = tmp_path_factory.mktemp("script") / "runs.py"
    script.write_text(RUNS)

    def on_one(*configs):
        for config in configs:
            assert command.train(config) == 0

    def on_two(*configs):
        done = torchrun(2, str(script), json.dumps([flags_of(config) for config in configs]))
        assert done.returncode == 0, done.stderr[-3000:]

    def half(config):
        return dataclasses.replace(config, max_iters=HALF)

    one, two = (twenty(name, batch_size) for name, batch_size in (("one", 8), ("two", 4)))
    tied_one, tied_two = (twenty(n, b, model=TIED, grad_accum_steps=2) for n, b in (("tied one", 8), ("tied two", 4)))
    parts, down, up = twenty("parts", 4), twenty("down", 4), twenty("up", 8)
    on_two(two, tied_two, half(parts), half(down))
    on_one(one, tied_one, half(up), dataclasses.replace(down, batch_size=8))
    on_two(parts, dataclasses.replace(up, batch_size=4))
    configs = (one, two, tied_one, tied_two, parts, down, up)
    return {Path(config.out_dir).name: config for config in configs}


@pytest.mark.parametrize("kind", ["", "tied "], ids=["sparse", "every expert, tied, accumulated"])
def test_two_ranks_train_as_one(runs, kind):
    """The balance loss is not linear in the batch: only with global expert counts are these curves the same."""
    one, two = runs[f"{kind}one"], runs[f"{kind}two"]
    assert (one.model.top_k, one.grad_accum_steps) == ((4, 2) if kind else (2, 1))
    assert_same_curve(one, two)


def test_a_resume_may_change_the_number_of_ranks(runs):
    """Ten iterations on two ranks, the rest on one, and the other way round: the data order does not notice."""
    assert_same_curve(runs["one"], runs["down"])
    assert_same_curve(runs["one"], runs["up"])


def test_resume_on_the_same_ranks_is_bitwise(runs):
    whole, parts = runs["two"], runs["parts"]
    a, b = losses(whole), losses(parts)
    assert len(a) == ITERATIONS
    assert [a[i]["loss"] for i in a] == [b[i]["loss"] for i in b]
    assert [a[i]["grad_norm"] for i in a] == [b[i]["grad_norm"] for i in b]
    weights = []
    for config in (whole, parts):
        trainer = Trainer(dataclasses.replace(config, batch_size=8), World(0, 1, 0), torch.device("cpu"))
        trainer.resume(Path(config.out_dir) / "ckpt/step_00000020")
        weights.append(list(trainer.model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


@pytest.mark.parametrize(("name", "ranks"), [("parts", [2, 2]), ("down", [2, 1]), ("up", [1, 2])])
def test_the_runs_are_of_as_many_ranks_as_they_say(runs, name, ranks):
    folder = Path(runs[name].out_dir) / "ckpt"
    states = [json.loads((folder / f"step_{i:08}/state.json").read_text()) for i in (HALF, ITERATIONS)]
    assert [state["ranks"] for state in states] == ranks


def test_bad_input_on_two_ranks_ends_all_of_them_quickly(twenty):
    done = torchrun(2, "-m", "moe_engine.train", *flags_of(twenty("bad", 4, data_dir="nowhere")))
    assert done.returncode != 0 and "error: " in done.stderr and "nowhere" in done.stderr
