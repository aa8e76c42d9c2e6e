"""The split of a training step: parts tile it, time goes to the part that took it, hooks are gone afterwards."""

from types import SimpleNamespace

import pytest
import torch

from moe_engine.bench import parts, steps
from moe_engine.train import config as settings
from moe_engine.train import parallel
from moe_engine.train.loop import Trainer
from moe_engine.train.parallel import World

LAYERS, MICRO_STEPS = 2, 2
SIZES = {"d_model": 32, "num_heads": 4, "head_dim": 8, "d_ff": 24, "vocab_size": 64, "num_layers": LAYERS}


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(parts, "time", clock)
    return clock


@pytest.fixture
def make_trainer(tmp_path):
    made = []

    def make(**options):
        model = SIZES | options.pop("model", {})
        given = {"preset": "tiny", "device": "cpu", "batch_size": 1, "block_size": 16, "sample_every": 0} | options
        given |= {"data_dir": str(tmp_path / "data"), "out_dir": str(tmp_path / "run"), "model": model}
        if not (tmp_path / "data").exists():
            steps.random_data(tmp_path / "data", 64, 16)
        made.append(Trainer(settings.resolve(given), World(0, 1, 0), torch.device("cpu")))
        return made[-1]

    yield make
    for trainer in made:
        trainer.loader.close()
    parallel.stop()


def slow(monkeypatch, clock, module, forward, backward):
    """Let a module take that many seconds at the beginning of its forward, and in its backward."""
    inner = module.forward

    def wrapped(*args, **kwargs):
        clock.pass_(forward)
        result = inner(*args, **kwargs)
        out = result[0] if isinstance(result, tuple) else result
        if out.requires_grad:
            out.register_hook(lambda _: clock.pass_(backward))
        return result

    monkeypatch.setattr(module, "forward", wrapped)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpointing": "block"},
        {"checkpointing": "selective"},
        {"dtype": "bfloat16", "checkpointing": "block"},  # sharded, in one process
        {"model": {"tie_embeddings": True}},
    ],
    ids=str,
)
def test_time_goes_to_the_part_that_took_it(monkeypatch, make_trainer, clock, options):
    trainer = make_trainer(grad_accum_steps=MICRO_STEPS, **options)
    model = trainer.model
    for block in model.blocks:
        slow(monkeypatch, clock, block.attention, 1, 2)
        slow(monkeypatch, clock, block.moe, 10, 20)
        slow(monkeypatch, clock, block.moe.router, 100, 200)
        slow(monkeypatch, clock, block.moe_norm, 1e3, 2e3)
    slow(monkeypatch, clock, model.head, 1e4, 2e4)
    for owner, name, seconds in ((trainer.engine.optimizer, "step", 1e5), (trainer.loader, "next_batch", 1e6)):
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _f=inner, _s=seconds, **k: (clock.pass_(_s), _f(*a, **k))[1])
    (seconds,) = parts.split(trainer, 1)
    again = 2 if "checkpointing" in options else 1  # forward runs twice
    blocks = LAYERS * MICRO_STEPS
    assert seconds == {
        "attention": blocks * (1 * again + 2),
        "experts": blocks * (10 * again + 20),
        "router": blocks * (100 * again + 200),
        "other": blocks * (1e3 * again + 2e3),
        "head + loss": MICRO_STEPS * 3e4,
        "optimizer": 1e5,
        "data wait": MICRO_STEPS * 1e6,
        "communication": 0,
    }
    assert 2 * sum(seconds.values()) == clock.now  # split takes one step that does not count


def test_steps_in_backward_are_the_optimizers(monkeypatch, make_trainer, clock):
    trainer = make_trainer(optimizer_in_backward=True)
    inner = trainer.engine.optimizer.step
    monkeypatch.setattr(trainer.engine.optimizer, "step", lambda: (clock.pass_(1), inner())[1])
    slow(monkeypatch, clock, trainer.model.blocks[0].attention, 100, 200)
    (seconds,) = parts.split(trainer, 1)
    assert seconds["optimizer"] == len(list(trainer.model.parameters())) and seconds["attention"] == 300


def test_the_parts_are_the_step_by_the_real_clock(make_trainer):
    trainer = make_trainer()
    with parts.watched(trainer) as timeline:
        marks = []
        seconds = timeline.measure(lambda: (marks.append(parts.time.perf_counter()), trainer.train_step(),
                                            marks.append(parts.time.perf_counter())))  # fmt: skip
    assert marks[1] - marks[0] <= sum(seconds.values()) < marks[1] - marks[0] + 0.1
    assert all(value >= 0 for value in seconds.values())


def test_a_gpu_has_events_and_is_waited_for(monkeypatch):
    events, waits = iter(range(100)), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(events)

        def elapsed_time(self, other):
            assert waits, "read before the device was done"
            return float(other.at - self.at)

    monkeypatch.setattr(parts.torch, "cuda", SimpleNamespace(Event=Event, synchronize=waits.append))
    timeline = parts.Timeline(torch.device("cuda"))
    seconds = timeline.measure(timeline.within("attention", lambda: timeline.enter("router")))
    assert seconds == {**dict.fromkeys(parts.PARTS, 0), "other": 2e-3, "attention": 1e-3, "router": 1e-3}


def hooks(trainer):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [(name, kind, len(getattr(m, kind))) for name, m in trainer.model.named_modules() for kind in kinds]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_left_after_a_split_or_an_error(make_trainer, dtype):
    trainer = make_trainer(dtype=dtype)
    trainer.train_step()
    before, owners = hooks(trainer), (trainer.engine, trainer.engine.optimizer, trainer.loader)
    attributes = [set(vars(owner)) for owner in owners]
    with pytest.raises(ZeroDivisionError), parts.watched(trainer) as timeline:
        assert hooks(trainer) != before
        timeline.measure(lambda: (trainer.train_step(), 1 / 0))
    assert hooks(trainer) == before and [set(vars(owner)) for owner in owners] == attributes
    trainer.train_step()


def test_a_split_changes_no_result(make_trainer):
    plain, watched = make_trainer(checkpointing="block"), make_trainer(checkpointing="block")
    parts.split(watched, 1)
    for _ in range(2):
        plain.train_step()
    for (name, a), b in zip(plain.model.named_parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b), name
