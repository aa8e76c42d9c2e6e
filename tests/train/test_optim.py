"""The optimizers: steps in backward against ordinary ones, 8-bit moments, in one process and on two ranks."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_engine.testing import assert_close
from moe_engine.train import __main__ as command
from moe_engine.train import parallel
from moe_engine.train.config import differences
from moe_engine.train.errors import InputError
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import read_metrics
from moe_engine.train.parallel import World

ONE = World(0, 1, 0)
CPU = torch.device("cpu")


@pytest.fixture
def torchao():
    """Torchao, its step not compiled: one shape takes seconds."""
    pytest.importorskip("torchao")
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def trainer(small_run):
    """Makes trainers whose threads and process groups end with the test."""
    made = []

    def make(**values) -> Trainer:
        parallel.stop()
        made.append(Trainer(small_run(**values), ONE, CPU))
        return made[-1]

    yield make
    for each in made:
        each.loader.close()
    parallel.stop()


def train(trainer, steps):
    """Losses and gradient norms of so many iterations."""
    done = [trainer.train_step() for _ in range(steps)]
    return [float(step.loss) for step in done], [step.grad_norm for step in done]


def copies(trainer):
    return {n: parallel.whole(p.detach()).clone() for n, p in trainer.model.named_parameters()}


def state_of(trainer, name):
    return trainer.engine.optimizer.state[trainer.model.get_parameter(name)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grad_clip", [0, 1e6], ids=["no clip", "clip out of reach"])
def test_steps_in_backward_are_the_ordinary_ones_to_the_last_bit(trainer, dtype, grad_clip):
    """Over the warm-up and into the cosine, so that every iteration has another learning rate."""
    results = []
    for in_backward in (False, True):
        one = trainer(dtype=dtype, grad_clip=grad_clip, optimizer_in_backward=in_backward)
        results.append((*train(one, 5), copies(one)))
    (losses, norms, weights), (other_losses, other_norms, other_weights) = results
    assert losses == other_losses and len(set(losses)) == 5
    assert other_norms == pytest.approx(norms, rel=1e-5)
    assert all(torch.equal(weights[n], other_weights[n]) for n in weights)


def test_there_is_never_more_than_one_gradient(trainer, monkeypatch):
    one = trainer(optimizer_in_backward=True)
    parameters, step, alive = list(one.model.parameters()), one.optimizer.step, []

    def counted():
        alive.append(sum(p.grad is not None for p in parameters))
        step()

    monkeypatch.setattr(one.optimizer, "step", counted)
    one.train_step()
    assert alive == [1] * len(parameters) and all(p.grad is None for p in parameters)


def test_each_gradient_is_clipped_by_its_own_norm(trainer):
    """After one iteration the first moment is (1 − beta1) times the gradient that was used."""
    clip = 0.2
    free, clipped = (trainer(grad_clip=c, optimizer_in_backward=True) for c in (0, clip))
    assert train(free, 1) == train(clipped, 1)  # the logged norm is the one before clipping
    factors = []
    for name, _ in free.model.named_parameters():
        gradient = state_of(free, name)["exp_avg"].double() / (1 - 0.9)
        factors.append(min(1.0, clip / (float(gradient.norm()) + 1e-6)))  # as PyTorch clips
        # the gradient's own, the factor's, the moment's and its product's rounding
        assert_close(state_of(clipped, name)["exp_avg"], 0.1 * gradient * factors[-1], roundings=4, name=name)
    assert min(factors) < 0.9 and factors.count(1.0) > 5


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_gradient_that_is_not_finite_changes_nothing_of_its_own_parameter(trainer, optimizer, request):
    if optimizer == "adamw8bit":
        request.getfixturevalue("torchao")
    one = trainer(optimizer=optimizer, optimizer_in_backward=True)
    train(one, 1)
    before, name = copies(one), "blocks.1.moe.w_down"
    moments = {k: plain(v).clone() for k, v in state_of(one, name).items()}
    hook = one.model.get_parameter(name).register_hook(lambda grad: grad * math.inf)
    step = one.train_step()
    hook.remove()
    assert not step.applied and not math.isfinite(step.grad_norm)
    after = copies(one)
    assert [n for n in after if torch.equal(after[n], before[n])] == [name]
    kept = state_of(one, name)
    assert all(torch.equal(plain(kept[k]), v) for k, v in moments.items()) and float(kept["step"]) == 1
    step = one.train_step()
    assert step.applied and not torch.equal(copies(one)[name], before[name])


def plain(value):
    """An 8-bit moment in fp32."""
    return value.dequantize() if hasattr(value, "codes") else value


def test_a_second_gradient_in_one_iteration_is_noticed(trainer):
    one = trainer(optimizer_in_backward=True)
    inputs, targets = one.loader.next_batch()
    one.model(inputs, targets).loss.backward()
    with pytest.raises(RuntimeError, match="second gradient in one iteration"):
        one.model(inputs, targets).loss.backward()


def test_a_resume_may_turn_steps_in_backward_on_and_off(small_run, tmp_path):
    """Moments and weights are the same things in the same checkpoint: to the last bit the run that never changed."""
    curves = []
    for name, changes in (("plain", [False]), ("changed", [False, True, False])):
        for count, in_backward in enumerate(changes, start=1):
            config = small_run(
                out_dir=str(tmp_path / name), max_iters=6 * count // len(changes), eval_interval=0, save_every=0,
                grad_clip=0, optimizer_in_backward=in_backward,
            )  # fmt: skip
            assert command.train(config) == 0
        rows = [r for r in read_metrics(Path(config.out_dir) / "metrics.jsonl") if r["kind"] == "train"]
        curves.append([(r["iter"], r["loss"]) for r in rows])
    assert curves[0] == curves[1] and len(curves[0]) == 6


def test_the_optimizer_may_not_change_and_an_older_run_had_adamw():
    assert differences({"optimizer": "adamw"}, {"optimizer": "adamw8bit"}) == ["optimizer: adamw → adamw8bit"]
    assert differences({}, {"optimizer": "adamw8bit"}) == ["optimizer: adamw → adamw8bit"]
    assert differences({}, {"optimizer": "adamw", "optimizer_in_backward": True}) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"grad_accum_steps": 2},
            "--optimizer_in_backward: expected --grad_accum_steps 1, got 2; a gradient is applied",
        ),
        ({"dtype": "float16"}, "--optimizer_in_backward: expected --dtype bfloat16 or float32, got float16; whether"),
    ],
)
def test_what_steps_in_backward_cannot_do_is_refused_with_the_reason(small_run, values, message):
    with pytest.raises(InputError) as caught:
        small_run(optimizer_in_backward=True, **values)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_without_torchao_the_extra_is_named(small_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(InputError, match=r"--optimizer adamw8bit: expected torchao .*'\.\[adamw8bit\]'") as caught:
        Trainer(small_run(optimizer="adamw8bit"), ONE, CPU)
    assert "\n" not in str(caught.value)


def test_8_bit_moments_lose_at_most_two_percent(trainer, torchao):
    """60 iterations from 5.6 nats down; a run that does not learn would be 100 % off."""
    last = {}
    for optimizer in ("adamw", "adamw8bit"):
        one = trainer(optimizer=optimizer, max_iters=60, lr_decay_iters=60, lr=1e-2)
        losses, _ = train(one, 60)
        last[optimizer] = sum(losses[-10:]) / 10
    assert last["adamw"] < 3
    assert last["adamw8bit"] == pytest.approx(last["adamw"], rel=0.02)
    state = state_of(one, "blocks.0.moe.w_up")
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[name].codes.dtype == torch.uint8 and state[name].codes.numel() == 4 * 32 * 64
        assert state[name].scale.numel() == 4 * 32 * 64 // 256
    assert not hasattr(state_of(one, "blocks.0.moe.b_up")["exp_avg"], "codes")  # too small


def test_the_compiled_step_is_the_eager_one(trainer, torchao):
    """As it runs for a user, on a sharded parameter: bf16 shards with FSDP2 in one process, too."""
    steps = []
    for stance in ("force_eager", "default"):
        one = trainer(optimizer="adamw8bit", dtype="bfloat16")
        weight = one.model.get_parameter("blocks.0.moe.w_up")
        weight.grad = torch.full_like(weight, 0.5) * weight.detach()
        torch.compiler.set_stance(stance)
        one.optimizer.step()
        steps.append(copies(one)["blocks.0.moe.w_up"])
    assert_close(steps[1], steps[0].double(), roundings=4)


RANKS = """
import dataclasses, json, sys
from pathlib import Path
import torch
from moe_engine.train import parallel
from moe_engine.train.config import resolve
from moe_engine.train.loop import Trainer
from moe_engine.train.parallel import World

torch.compiler.set_stance("force_eager")
torch.set_num_threads(1)
world, results = World.from_environment(), {}
start = parallel.start
parallel.start = lambda *a: torch.distributed.is_initialized() or start(*a)  # one process group for all trainers
for name, values in json.loads(Path(sys.argv[1]).read_text()).items():
    config = resolve(values)
    whole = Trainer(config, world, torch.device("cpu"))
    steps = [whole.train_step() for _ in range(3)]
    whole.save_to = whole.checkpoints.save(
        whole.model, whole.optimizer, {"iteration": 3, "loader": whole.loader.state_dict()}, whole.device
    )
    steps += [whole.train_step() for _ in range(2)]
    part = Trainer(config, world, torch.device("cpu"))
    state = part.checkpoints.load(whole.save_to, part.model, part.optimizer, part.device)
    part.loader.load_state_dict(state["loader"])
    part.iteration = 3
    again = [part.train_step() for _ in range(2)]
    same = all(
        torch.equal(parallel.whole(p.detach()), parallel.whole(q.detach()))
        for p, q in zip(whole.model.parameters(), part.model.parameters(), strict=True)
    )
    losses = [parallel.all_sum(s.loss.clone(), world) / world.size for s in steps]
    results[name] = {
        "losses": [float(l) for l in losses],
        "norms": [s.grad_norm for s in steps],
        "resumed": same and [s.grad_norm for s in again] == [s.grad_norm for s in steps[3:]],
        "no_gradients": all(p.grad is None for p in whole.model.parameters()),
    }
    whole.loader.close(), part.loader.close()
if world.is_main:
    Path(sys.argv[2]).write_text(json.dumps(results))
if world.size > 1:
    torch.distributed.barrier()
parallel.stop()
"""


@pytest.fixture(scope="session")
def ranks_script(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "steps.py"
    path.write_text(RANKS)
    return path


def test_two_ranks_step_as_one_and_resume_exactly(small_run, tmp_path, ranks_script):
    """Every optimizer, on parameters that FSDP2 shards; 8-bit moments of parts have blocks of their own."""
    tied = {"tie_embeddings": True}  # a parameter with two uses has one gradient
    kinds = {"backward": {"optimizer_in_backward": True, "grad_clip": 0.2, "model": tied}}
    if ao := importlib.util.find_spec("torchao"):
        kinds["8 bit"] = {"optimizer": "adamw8bit"}
        kinds["8 bit, backward"] = {"optimizer": "adamw8bit", "optimizer_in_backward": True, "dtype": "bfloat16"}
    results = {}
    for ranks in (1, 2):
        tables = {}
        for name, values in kinds.items():
            values = {**values, "model": dict(values.get("model", {}))}
            config = small_run(out_dir=str(tmp_path / f"{name} {ranks}"), batch_size=8 // ranks, **values)
            table = dataclasses.asdict(config)
            table["model"] = {k: v for k, v in table["model"].items() if v is not None}
            tables[name] = table
        given, out = tmp_path / f"given{ranks}.json", tmp_path / f"results{ranks}.json"
        given.write_text(json.dumps(tables))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if ranks == 2 else []
        done = subprocess.run(
            [sys.executable, *launcher, str(ranks_script), str(given), str(out)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        results[ranks] = json.loads(out.read_text())
    for name in kinds:
        one, two = results[1][name], results[2][name]
        assert one["resumed"] and two["resumed"] and two["no_gradients"], name
        tolerance = 0.02 if ao and name.startswith("8 bit") else 1e-5
        assert two["losses"] == pytest.approx(one["losses"], abs=tolerance), name
        assert two["norms"] == pytest.approx(one["norms"], abs=10 * tolerance), name
        assert one["losses"][-1] < one["losses"][0] - 0.1, name


def test_8_bit_moments_stay_with_their_number_of_processes(small_run, torchao):
    config = small_run(max_iters=2, eval_interval=0, optimizer="adamw8bit")
    assert command.train(config) == 0
    file = Path(config.out_dir) / "ckpt/step_00000002/state.json"
    state = json.loads(file.read_text())
    assert state["ranks"] == 1
    file.write_text(json.dumps(state | {"ranks": 2}))
    with pytest.raises(InputError, match=r"--optimizer adamw8bit: .* in the parts of 2 processes, this start has 1"):
        command.train(config)
