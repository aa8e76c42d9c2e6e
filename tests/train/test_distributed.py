"""Several processes: the loss of a global batch does not depend on how many ranks share it, nor does a resume."""

import dataclasses
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


def run_ranks(config, ranks, *, check=True):
    """`torchrun -m moe_engine.train` on this machine, with one thread a rank."""
    table = dataclasses.asdict(config)
    table |= {f"model.{name}": value for name, value in table.pop("model").items()}
    flags = [f"--{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in table.items() if v is not None]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "moe_engine.train", *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


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


@pytest.fixture
def twenty(small_run, tmp_path):
    """A run of twenty iterations of 4 × 32 sequences over all ranks."""

    def make(name, batch_size, **values):
        defaults = {"max_iters": ITERATIONS, "lr_decay_iters": ITERATIONS, "eval_interval": 10, "save_every": 10}
        return small_run(out_dir=str(tmp_path / name), batch_size=batch_size, **defaults | values)

    return make


@pytest.mark.parametrize(
    ("model", "accumulation"),
    [({"top_k": 2}, 1), ({"top_k": 4, "tie_embeddings": True}, 2)],
    ids=["sparse", "every expert, tied, accumulated"],
)
def test_two_ranks_train_as_one(twenty, model, accumulation):
    """The balance loss is not linear in the batch: only with global expert counts are these curves the same."""
    one, two = (twenty(n, b, model=model, grad_accum_steps=accumulation) for n, b in (("one", 8), ("two", 4)))
    assert command.train(one) == 0
    run_ranks(two, 2)
    assert_same_curve(one, two)


def test_a_resume_may_change_the_number_of_ranks(twenty):
    """Ten iterations on two ranks, the rest on one, and the other way round: the data order does not notice."""
    one = twenty("one", 8)
    assert command.train(one) == 0
    down = twenty("down", 4)
    run_ranks(dataclasses.replace(down, max_iters=10), 2)
    assert command.train(dataclasses.replace(down, batch_size=8)) == 0
    up = twenty("up", 8)
    assert command.train(dataclasses.replace(up, max_iters=10)) == 0
    run_ranks(dataclasses.replace(up, batch_size=4), 2)
    assert_same_curve(one, down)
    assert_same_curve(one, up)


def test_resume_on_the_same_ranks_is_bitwise(twenty, tmp_path):
    whole, parts = twenty("whole", 4), twenty("parts", 4)
    run_ranks(whole, 2)
    run_ranks(dataclasses.replace(parts, max_iters=10), 2)
    run_ranks(parts, 2)
    a, b = losses(whole), losses(parts)
    assert [a[i]["loss"] for i in a] == [b[i]["loss"] for i in b]
    assert [a[i]["grad_norm"] for i in a] == [b[i]["grad_norm"] for i in b]
    weights = []
    for config in (whole, parts):
        trainer = Trainer(dataclasses.replace(config, batch_size=8), World(0, 1, 0), torch.device("cpu"))
        trainer.resume(Path(config.out_dir) / "ckpt/step_00000020")
        weights.append(list(trainer.model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


def test_bad_input_on_two_ranks_ends_all_of_them_quickly(twenty):
    done = run_ranks(twenty("bad", 4, data_dir="nowhere"), 2, check=False)
    assert done.returncode != 0 and "error: " in done.stderr and "nowhere" in done.stderr
