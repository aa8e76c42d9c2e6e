"""`moe-train --verify_resume`: it says yes where a resume is exact, and no, with the place, where it is not."""

import dataclasses
from pathlib import Path
from random import SystemRandom

import pytest
import torch

from moe_engine.train import __main__ as command
from moe_engine.train.checkpoint import Checkpoints
from moe_engine.train.data import TrainLoader
from moe_engine.train.loop import Trainer


def flags_of(config):
    """The command line that gives this configuration."""
    table = dataclasses.asdict(config)
    table |= {f"model.{name}": value for name, value in table.pop("model").items()}
    return [f"--{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in table.items() if v is not None]


@pytest.fixture
def verify(small_run, capsys):
    def run(**values):
        config = small_run(**values)
        status = command.main([*flags_of(config), "--verify_resume"])
        parent = Path(config.out_dir).parent
        assert [p.name for p in parent.iterdir() if "verify" in p.name or p == Path(config.out_dir)] == []
        return status, capsys.readouterr()

    return run


@pytest.mark.parametrize("values", [{}, {"dtype": "bfloat16", "grad_accum_steps": 2}, {"async_save": False}])
def test_a_resume_is_exact(verify, values):
    status, output = verify(**values)
    assert status == 0 and not output.err
    assert output.out.startswith("resume verified: iterations 4 to 6") and "1 process)" in output.out


def test_several_ranks_have_one_answer(small_run, forked_ranks):
    """Two replicas, which share the writing of what they both have."""
    config = small_run(dp_replicate=2, model={"tie_embeddings": True})
    statuses, outputs, errors = forked_ranks(2, config, verify_resume=True)
    assert statuses == [0, 0] and outputs[0].startswith("resume verified: ") and "2 processes)" in outputs[0], errors
    assert outputs[1] == "" and not Path(f"{config.out_dir}.verify_resume").exists()


def forget_moments(monkeypatch):
    def load(self, path, model, optimizer, device):
        state = whole(self, path, model, optimizer, device)
        for moments in optimizer.state.values():
            moments["exp_avg_sq"].mul_(1 + 2**-20)
        return state

    whole = Checkpoints.load
    monkeypatch.setattr(Checkpoints, "load", load)


def forget_place(monkeypatch):
    monkeypatch.setattr(TrainLoader, "load_state_dict", lambda self, state: None)


def not_repeatable(monkeypatch):
    def noisy(self):
        with torch.no_grad():
            self.model.head.weight.mul_(1 + 1e-4 * noise.random())
        return step(self)

    noise, step = SystemRandom(), Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", noisy)


CAUSE = "the checkpoint does not hold all of the run's state"


@pytest.mark.parametrize(
    ("spoil", "where", "cause"),
    [
        (forget_moments, "of iteration 5", CAUSE),
        (forget_place, "losses of iteration 4", CAUSE),
        (not_repeatable, "losses of iteration 4", "training itself is not repeatable here; try --deterministic"),
    ],
)
def test_what_is_not_exact_is_named(verify, monkeypatch, spoil, where, cause):
    spoil(monkeypatch)
    status, output = verify()
    assert status == 1 and output.err.startswith("error: resume is not exact: ") and output.err.count("\n") == 1
    assert where in output.err and cause in output.err


ON_SECOND_RANK = """
from moe_engine.train.errors import InputError
from moe_engine.train.loop import Trainer

def fail(self):
    if self.iteration == 1 and rank == 1:
        raise InputError("--data_dir x: gone")
    return step(self)

step = Trainer.train_step
Trainer.train_step = fail
"""


@pytest.mark.parametrize("before", ["", ON_SECOND_RANK])
def test_several_processes(small_run, forked_ranks, before):
    """Each looks at its own part; an error of one of them ends all, and leaves no folder behind."""
    config = small_run()
    statuses, outputs, errors = forked_ranks(2, config, before, timeout=60, verify_resume=True)
    if before:
        assert statuses == [1, 2] and errors[1] == "error: --data_dir x: gone\n"
    else:
        assert statuses == [0, 0] and "2 processes)" in outputs[0], errors
    assert not any(Path(config.out_dir).parent.glob("*verify*"))
