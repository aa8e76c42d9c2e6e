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
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_engine.testing import assert_close
from moe_engine.train import __main__ as command
from moe_engine.train import optim, parallel
from moe_engine.train.config import ModelOverrides, differences
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


BF16 = {"param_dtype": "bfloat16", "dtype": "bfloat16", "optimizer": "adamw8bit"}


@pytest.mark.parametrize("kind", [{"dtype": "float32"}, {"dtype": "bfloat16"}, BF16], ids=["fp32", "bf16", "bf16 only"])
@pytest.mark.parametrize("grad_clip", [0, 1e6], ids=["no clip", "clip out of reach"])
def test_steps_in_backward_are_the_ordinary_ones_to_the_last_bit(trainer, kind, grad_clip, request):
    """Over the warm-up and into the cosine, so that every iteration has another learning rate."""
    if kind is BF16:
        request.getfixturevalue("torchao")
    results = []
    for in_backward in (False, True):
        one = trainer(**kind, grad_clip=grad_clip, optimizer_in_backward=in_backward)
        results.append((*train(one, 5), copies(one)))
    (losses, norms, weights), (other_losses, other_norms, other_weights) = results
    assert losses == other_losses and len(set(losses)) == 5
    assert other_norms == pytest.approx(norms, rel=1e-5)
    assert all(torch.equal(weights[n], other_weights[n]) for n in weights)


def test_there_is_never_more_than_one_gradient(trainer, monkeypatch):
    one = trainer(optimizer_in_backward=True)
    parameters, step, alive = list(one.model.parameters()), one.engine.optimizer.step, []

    def counted():
        alive.append(sum(p.grad is not None for p in parameters))
        step()

    monkeypatch.setattr(one.engine.optimizer, "step", counted)
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


@pytest.mark.parametrize("in_backward", [False, True])
def test_bf16_weights_need_no_second_copy_in_one_process(trainer, torchao, in_backward):
    """No FSDP; everything is bf16 but the routers, which stay in fp32, and moments, in 8 bits or fp32."""
    one = trainer(**BF16, optimizer_in_backward=in_backward)
    grads = {}
    for name, parameter in one.model.named_parameters():
        parameter.register_hook(lambda grad, name=name: grads.update({name: grad.dtype}))
    train(one, 1)
    assert not torch.distributed.is_initialized()
    for name, parameter in one.model.named_parameters():
        expected = torch.float32 if ".router." in name else torch.bfloat16
        assert (parameter.dtype, grads[name]) == (expected, expected), name
        assert not hasattr(parameter, "full_tensor")
        for moment in ("exp_avg", "exp_avg_sq"):
            value = state_of(one, name)[moment]
            assert value.dtype == torch.float32 and (hasattr(value, "codes") or parameter.numel() < 4096), name


@pytest.mark.parametrize(
    ("values", "gigabytes"),
    [({}, 131), ({"optimizer": "adamw8bit"}, 82), (BF16, 49), (BF16 | {"optimizer_in_backward": True}, 33)],
)
def test_what_cannot_fit_is_counted_in_the_dtypes_that_are_kept(small_run, monkeypatch, values, gigabytes):
    """8.17 B parameters: 4 + 4 + 8 bytes each, 4 + 4 + 2, 2 + 2 + 2, 2 + 2."""
    monkeypatch.setattr("moe_engine.train.loop.memory_total", lambda device: 24 * 10**9)
    config = dataclasses.replace(small_run(**values), preset="8b", model=ModelOverrides())
    with pytest.raises(InputError, match=rf"of 8.17 B parameters take {gigabytes} GB"):
        Trainer(config, ONE, CPU)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bf16_weights_have_the_gradients_of_fp32_masters(trainer, torchao, backend):
    """To the last bit: FSDP2 makes of its masters, for forward and backward, what the weights are here."""
    results = []
    for kind in ({"dtype": "bfloat16"}, BF16):
        one = trainer(**kind, model={"backend": backend})
        loss = one.model(*one.loader.next_batch()).loss
        loss.backward()
        results.append((float(loss.detach()), {n: parallel.whole(p.grad) for n, p in one.model.named_parameters()}))
    (loss, wide), (other_loss, narrow) = results
    assert loss == other_loss
    assert all(torch.equal(grad, narrow[name].float()) and grad.any() for name, grad in wide.items())


def adamw8bit(parameters, lr=1e-3, weight_decay=0.1, seed=0):
    """The optimizer of `make_optimizer`, on parameters of the test's own."""
    groups = [{"params": parameters, "weight_decay": weight_decay}]
    return optim._adamw8bit_class()(groups, seed, lr=lr, betas=(0.9, 0.95), eps=1e-8)


@pytest.mark.parametrize("shape", [(8, 4, 512), (3, 5000), (3, 40)], ids=["whole slices", "a rest", "fp32 moments"])
def test_slices_make_no_difference(torchao, monkeypatch, shape):
    """16,384 elements are four slices; 15,000 are no multiple of a block of 256 and 120 too few for 8 bits."""
    from torchao.optim import AdamW8bit

    monkeypatch.setattr(optim, "_SLICE", 4096)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    sliced = adamw8bit([ours])
    whole = AdamW8bit([theirs], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        sliced.step(), whole.step()
        assert torch.equal(ours, theirs) and float(sliced.state[ours]["step"]) == step
        for name in ("exp_avg", "exp_avg_sq"):
            mine, other = sliced.state[ours][name], whole.state[theirs][name]
            assert hasattr(mine, "codes") == hasattr(other, "codes") == (shape == (8, 4, 512))
            assert mine.shape == shape and torch.equal(plain(mine), plain(other))
    assert not torch.equal(ours, weight)


def test_bf16_weights_take_updates_that_rounding_to_nearest_would_lose(torchao, monkeypatch):
    """Ten updates of 1/20 of bf16's step at 1: half a step in the mean, none with rounding to nearest."""
    monkeypatch.setattr(optim, "_SLICE", 4096)
    count, step = 1 << 15, 2**-8  # below 1 the next bf16 number is 2⁻⁸ away
    weight = torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    optimizer = adamw8bit([weight], lr=step / 20, weight_decay=0.0)
    state = torch.get_rng_state()
    for _ in range(10):
        weight.grad = torch.ones_like(weight)  # Adam's update is then lr, but for the moments' rounding
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)  # draws are the optimizer's own
    moved = (1 - weight.detach().double()) / step
    assert float(moved.mean()) == pytest.approx(0.5, abs=5 * 0.5 / count**0.5 + 0.01)  # five deviations, and moments
    assert moved.unique().numel() > 2
    slices = moved.view(-1, 4096)
    assert all(not torch.equal(a, b) for i, a in enumerate(slices) for b in slices[:i])


def test_draws_are_those_of_seed_parameter_and_step(torchao):
    """Not of what was drawn before, so replicas agree and a resume needs nothing."""

    def stepped(seed, first_step, number):
        torch.rand(torch.randint(1, 99, ()))
        weights = [torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = adamw8bit(weights, seed=seed)
        for weight in weights:
            optimizer.state[weight]["step"].fill_(first_step)
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        return weights[number].detach().float()

    once = stepped(1, 3, 0)
    assert 0 < float((once != 1).float().mean()) < 1
    assert torch.equal(stepped(1, 3, 0), once)
    for other in ((2, 3, 0), (1, 4, 0), (1, 3, 1)):
        assert not torch.equal(stepped(*other), once), other


def test_the_step_runs_on_fake_tensors(torchao):
    """As the memory estimate needs it: weights of 8b's size, without storage."""
    with FakeTensorMode():
        weights = [
            torch.nn.Parameter(torch.empty(8, 2880, 7680, dtype=torch.bfloat16)),
            torch.nn.Parameter(torch.ones(8)),
        ]
        optimizer = adamw8bit(weights)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.empty_like(weight)
            optimizer.step()
    assert optimizer.state[weights[0]]["exp_avg"].codes.shape == weights[0].shape


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_run_with_bf16_weights_resumes_exactly(small_run, torchao, tmp_path, in_backward):
    """Whatever happens between iterations: evaluations time the CPU with random numbers, samples draw tokens."""
    curves, weights = [], []
    for name, ends in (("whole", [6]), ("parts", [3, 6])):
        for end in ends:
            config = small_run(
                out_dir=str(tmp_path / name), max_iters=end, eval_interval=2 if name == "whole" else 1, save_every=0,
                sample_every=0 if name == "whole" else 3, optimizer_in_backward=in_backward, **BF16,
            )  # fmt: skip
            assert command.train(config) == 0
        rows = [r for r in read_metrics(Path(config.out_dir) / "metrics.jsonl") if r["kind"] == "train"]
        curves.append([(r["iter"], r["loss"], r["grad_norm"]) for r in rows])
        one = Trainer(config, ONE, CPU)
        one.resume(one.checkpoints.latest())
        weights.append(copies(one))
        moments = {n: state_of(one, n) for n in weights[-1]}
        assert all(m["exp_avg"].dtype == torch.float32 and float(m["step"]) == 6 for m in moments.values())
        one.loader.close()
    assert curves[0] == curves[1] and len({loss for _, loss, _ in curves[0]}) == 6
    assert all(value.dtype == weights[1][n].dtype for n, value in weights[0].items())
    assert all(torch.equal(value, weights[1][n]) for n, value in weights[0].items())


def plain(value):
    """An 8-bit moment in fp32."""
    return value.dequantize() if hasattr(value, "codes") else value


def test_a_second_gradient_in_one_iteration_is_noticed(trainer):
    one = trainer(optimizer_in_backward=True)
    inputs, targets = one.loader.next_batch()
    one.engine.in_backward.loss = torch.zeros(())
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adamw"}, "--param_dtype bfloat16: expected --optimizer adamw8bit, got adamw; an update is"),
        ({"dtype": "float32"}, "--param_dtype bfloat16: expected --dtype bfloat16, got float32"),
        ({"dtype": None}, "--param_dtype bfloat16: expected --dtype bfloat16, got none, which on --device cpu"),
    ],
)  # fmt: skip
def test_what_bf16_weights_need_is_named(small_run, values, message):
    with pytest.raises(InputError) as caught:
        Trainer(small_run(**(BF16 | values)), ONE, CPU)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert differences({}, {"param_dtype": "bfloat16"}) == ["param_dtype: float32 → bfloat16"]


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
        one.engine.optimizer.step()
        steps.append(copies(one)["blocks.0.moe.w_up"])
    assert_close(steps[1], steps[0].double(), roundings=4)


def test_the_compiled_step_draws_by_the_seed_too(torchao):
    """The compiler has a generator of its own, seeded from PyTorch's."""

    def stepped(seed):
        weight = torch.nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
        weight.grad = torch.ones_like(weight)
        adamw8bit([weight], lr=2**-9, weight_decay=0.0, seed=seed).step()
        return (1 - weight.detach().float()) * 2**8  # in bf16's steps: half of one in the mean

    torch.compiler.set_stance("default")
    once = stepped(1)
    torch.rand(7)
    assert torch.equal(stepped(1), once) and not torch.equal(stepped(2), once)
    assert float(once.mean()) == pytest.approx(0.5, abs=5 * 0.5 / 8192**0.5)


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
    state = {"iteration": 3, "loader": whole.loader.state_dict()}
    whole.checkpoints.save(whole.model, whole.engine.optimizer, state, whole.device)
    saved = whole.checkpoints.finish().path
    steps += [whole.train_step() for _ in range(2)]
    part = Trainer(config, world, torch.device("cpu"))
    state = part.checkpoints.load(saved, part.model, part.engine.optimizer, part.device)
    part.loader.load_state_dict(state["loader"])
    part.iteration = 3
    again = [part.train_step() for _ in range(2)]
    same = all(
        torch.equal(parallel.whole(p.detach()), parallel.whole(q.detach()))
        for p, q in zip(whole.model.parameters(), part.model.parameters(), strict=True)
    )
    replicas_equal = True
    if world.size > 1 and config.dp_replicate == world.size:  # the first rank's, and this one's
        for p in whole.model.parameters():
            mine = p.detach().to_local()
            first = mine.clone()
            torch.distributed.broadcast(first, 0)
            replicas_equal &= torch.equal(first, mine)
    replicas_equal = not parallel.any_rank(not replicas_equal, world, whole.device)
    losses = [parallel.all_sum(s.loss.clone(), world) / world.size for s in steps]
    results[name] = {
        "losses": [float(l) for l in losses],
        "norms": [s.grad_norm for s in steps],
        "resumed": same and [s.grad_norm for s in again] == [s.grad_norm for s in steps[3:]],
        "replicas_equal": replicas_equal,
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
        # Two ranks cut three experts' weights along the next dimension.
        kinds["8 bit, bf16, 3 experts"] = {**BF16, "model": {"num_experts": 3}}
        kinds["8 bit, bf16, replicas"] = {**BF16, "optimizer_in_backward": True, "dp_replicate": 2}
    results = {}
    for ranks in (1, 2):
        tables = {}
        for name, values in kinds.items():
            values = {**values, "model": dict(values.get("model", {}))}
            values["dp_replicate"] = min(values.get("dp_replicate", 1), ranks)
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
        assert one["resumed"] and two["resumed"] and two["no_gradients"] and two["replicas_equal"], name
        tolerance = 0.02 if ao and name.startswith("8 bit") else 1e-5
        assert two["losses"] == pytest.approx(one["losses"], abs=tolerance), name
        assert two["norms"] == pytest.approx(one["norms"], abs=10 * tolerance), name
        assert one["losses"][-1] < one["losses"][0] - 0.1, name


def test_8_bit_moments_stay_with_their_number_of_processes(small_run, torchao, rewrite_state):
    config = small_run(max_iters=2, eval_interval=0, optimizer="adamw8bit")
    assert command.train(config) == 0
    rewrite_state(Path(config.out_dir) / "ckpt/step_00000002", ranks=2)
    with pytest.raises(InputError, match=r"--optimizer adamw8bit: .* in the parts of 2 processes, this start has 1"):
        command.train(config)
