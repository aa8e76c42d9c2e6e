"""The training loop in one process: what a run leaves behind, exact repetition and resume, faults."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_engine.train import __main__ as command
from moe_engine.train import loop as loop_module
from moe_engine.train.checkpoint import Checkpoints
from moe_engine.train.errors import InputError
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import RunLog, deterministic, read_metrics
from moe_engine.train.parallel import World, check_initialisation
from moe_engine.train.step import Engine

ONE = World(0, 1, 0)
CPU = torch.device("cpu")


def records(config, kind="train"):
    return [deterministic(r) for r in read_metrics(Path(config.out_dir) / "metrics.jsonl") if r["kind"] == kind]


def weights(config, iteration):
    """The parameters in a run's checkpoint."""
    trainer = Trainer(config, ONE, CPU)
    trainer.resume(Path(config.out_dir) / "ckpt" / f"step_{iteration:08d}")
    trainer.loader.close()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def flags_of(config):
    """The command line that gives this configuration."""
    table = dataclasses.asdict(config)
    model = {f"model.{name}": value for name, value in table.pop("model").items()}
    given = {**table, **model}
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in given.items() if value is not None]  # fmt: skip


def test_a_run_leaves_everything_it_promises_and_learns(small_run, rendered):
    config = small_run(max_iters=60, lr_decay_iters=60, eval_interval=30, sample_every=30, lr=1e-2, log_interval=5)
    assert command.train(config) == 0
    out = Path(config.out_dir)
    for name in ("config.toml", "env.json", "logs.txt", "metrics.jsonl", "plots/loss.png", "samples/iter_00000030.txt"):
        assert (out / name).stat().st_size > 0, name
    assert list((out / "tensorboard").glob("events*"))
    assert (out / "ckpt/latest").read_text().strip() == "step_00000060"
    losses = [r["loss"] for r in records(config, "eval")]
    assert losses[0] == pytest.approx(math.log(264), abs=0.15)
    assert losses[-1] < losses[0] - 2  # three successors a token: ln 3 = 1.1 nats are left
    env = json.loads((out / "env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__ and env["devices"] == 1
    log = (out / "logs.txt").read_text()
    assert "dtype float32" in log and "router_aux" in log and "tok/s" in log and "mfu" in log
    assert (out / "samples/iter_00000030.txt").read_text().strip()


def test_two_runs_with_one_seed_agree_to_the_last_bit(small_run, tmp_path):
    first, second = (small_run(out_dir=str(tmp_path / name), sample_every=6) for name in "ab")
    other = small_run(out_dir=str(tmp_path / "c"), seed=1)
    for config in (first, second, other):
        assert command.train(config) == 0
    for kind in ("train", "eval"):
        assert records(first, kind) == records(second, kind)
        assert records(first, kind) != records(other, kind)
    samples = [(Path(c.out_dir) / "samples/iter_00000006.txt").read_text() for c in (first, second)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("model", [{}, {"tie_embeddings": True, "activation": "swiglu", "attention_sinks": False}])
def test_resume_is_bitwise_the_run_that_was_never_interrupted(small_run, tmp_path, model):
    """Six iterations, a new process' worth of objects, six more: same logs, same weights, same moments."""
    whole = small_run(out_dir=str(tmp_path / "whole"), model=model, grad_accum_steps=2)
    assert command.train(whole) == 0
    parts = dataclasses.replace(whole, out_dir=str(tmp_path / "parts"))
    assert command.train(dataclasses.replace(parts, max_iters=6)) == 0
    assert command.train(parts) == 0
    assert records(whole) == records(parts) and len(records(whole)) == 12
    a, b = weights(whole, 12), weights(parts, 12)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["blocks.0.moe.w_up"], weights(whole, 6)["blocks.0.moe.w_up"])


def test_metrics_written_after_the_last_checkpoint_do_not_count_twice(small_run, tmp_path):
    """A killed run has logged iterations that its checkpoint does not have; resuming logs them once."""
    whole = small_run(out_dir=str(tmp_path / "whole"))
    assert command.train(whole) == 0
    killed = dataclasses.replace(whole, out_dir=str(tmp_path / "killed"))

    class Killed(BaseException):
        pass

    def kill_at_nine(self):
        if self.iteration == 9:
            raise Killed
        return step(self)

    step = Trainer.train_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "train_step", kill_at_nine)
        command.train(killed)
    assert records(killed)[-1]["iter"] == 9
    assert command.train(killed) == 0
    assert records(killed) == records(whole)


def test_a_finished_run_started_again_says_so(small_run):
    config = small_run(max_iters=6)
    assert command.train(config) == 0
    before = records(config)
    assert command.train(config) == 0
    assert records(config) == before
    assert "nothing to do" in (Path(config.out_dir) / "logs.txt").read_text()


def test_only_the_last_checkpoints_and_the_best_are_kept(small_run, monkeypatch):
    """Validation gets worse after the second evaluation: `best` names that one and outlives pruning."""
    losses = iter([9.0, 3.0, 4.0, 5.0, 6.0, 7.0])

    def evaluate(self):
        self.val_loss = next(losses)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    config = small_run(max_iters=10, eval_interval=2, save_every=2, keep_last_n=2)
    assert command.train(config) == 0
    folder = Path(config.out_dir) / "ckpt"
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_00000002", "step_00000008", "step_00000010"]
    assert (folder / "best").read_text().strip() == "step_00000002"
    assert Checkpoints(Path(config.out_dir), ONE).latest() == folder / "step_00000010"


def test_another_configuration_is_refused_and_named(small_run):
    config = small_run(max_iters=6)
    assert command.train(config) == 0
    with pytest.raises(InputError, match=r"another configuration \(lr: 0\.003 → 0\.005; model\.d_ff: 32 → 48\)"):
        command.train(small_run(max_iters=6, lr=5e-3, model={"d_ff": 48}))
    with pytest.raises(InputError, match="64 tokens per iteration, this start has 128"):
        command.train(small_run(max_iters=12, batch_size=8))
    # What counts is the global batch: half of the batch, twice the micro-steps go on.
    assert command.train(small_run(max_iters=8, batch_size=2, grad_accum_steps=2)) == 0
    assert command.train(small_run(max_iters=6, lr=5e-3, fresh=True)) == 0
    assert [r["iter"] for r in records(config)] == [1, 2, 3, 4, 5, 6]


def test_a_runs_own_configuration_resumes_it(small_run, tmp_path, capsys):
    """`--config out_dir/config.toml` is the run again, also when the run was started with --fresh."""
    config = small_run(max_iters=6)
    assert command.train(config) == 0
    assert command.train(dataclasses.replace(config, fresh=True)) == 0
    file = Path(config.out_dir) / "config.toml"
    assert command.main(["--config", str(file), "--max_iters", "8"]) == 0
    assert [r["iter"] for r in records(config)] == list(range(1, 9))
    capsys.readouterr()
    assert command.main(["--config", str(file), "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert printed == file.read_text() and f'data_dir = "{config.data_dir}"' in printed


def test_other_data_is_refused(small_run, tmp_path, token_folder):
    config = small_run(max_iters=6)
    assert command.train(config) == 0
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in token_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "toy_train_000001.npy").unlink()
    with pytest.raises(InputError, match="fingerprint"):
        command.train(dataclasses.replace(config, data_dir=str(copy), max_iters=12))


def test_a_folder_of_something_else_is_left_alone(small_run, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty and no run folder"):
        command.train(small_run(out_dir=str(out)))
    with pytest.raises(InputError, match="expected a folder, found a file"):
        command.train(small_run(out_dir=str(out / "chapter.txt")))
    assert [p.name for p in out.iterdir()] == ["chapter.txt"]


def test_a_run_killed_before_its_configuration_was_written_begins_again(small_run, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "logs.txt").touch()
    (out / "metrics.jsonl").touch()
    (out / "config.toml.tmp").write_text("data_di")
    assert command.train(small_run(out_dir=str(out), max_iters=1)) == 0
    (out / "config.toml").unlink()  # now the logs hold something
    with pytest.raises(InputError, match="not empty and no run folder"):
        command.train(small_run(out_dir=str(out), max_iters=1))


def spoil(monkeypatch, iterations):
    """Make the gradient of these iterations not finite."""
    losses, train_step, now = Engine._losses, Trainer.train_step, []

    def spoiled(self, out):
        mean, balance, z = losses(self, out)
        return mean * (math.nan if now[-1] in iterations else 1.0), balance, z

    def noted(self):
        now.append(self.iteration)
        return train_step(self)

    monkeypatch.setattr(Engine, "_losses", spoiled)
    monkeypatch.setattr(Trainer, "train_step", noted)


def test_an_iteration_without_a_finite_gradient_changes_nothing(small_run, monkeypatch):
    config = small_run(max_iters=6)
    trainer = Trainer(config, ONE, CPU)
    spoil(monkeypatch, {1})
    trainer.train_step()
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    moments = {k: v.clone() for p in trainer.model.parameters() for k, v in trainer.engine.optimizer.state[p].items()}
    step = trainer.train_step()
    assert not step.applied and math.isnan(step.grad_norm)
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    after = {k: v for p in trainer.model.parameters() for k, v in trainer.engine.optimizer.state[p].items()}
    assert all(torch.equal(after[k], v) for k, v in moments.items())
    step = trainer.train_step()
    assert step.applied and not torch.equal(trainer.model.head.weight, before["head.weight"])
    trainer.loader.close()


def test_bad_iterations_are_reported_and_too_many_stop_the_run(small_run, monkeypatch):
    spoil(monkeypatch, range(3, 100))
    config = small_run(max_iters=50)
    with pytest.raises(InputError, match="10 iterations in a row skipped, the last for loss nan and gradient norm nan"):
        command.train(config)
    log = (Path(config.out_dir) / "logs.txt").read_text()
    assert "iter 4: loss nan and gradient norm nan: the update is skipped" in log and "window" in log
    assert Checkpoints(Path(config.out_dir), ONE).latest().name == "step_00000013"


def test_loss_scaling_skips_an_overflow_and_lowers_its_scale(small_run):
    """What fp16 on a GPU does, with a scaler on the CPU."""
    trainer = Trainer(small_run(), ONE, CPU)
    trainer.engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = trainer.model.head.weight
    before = weight.detach().clone()
    trainer.train_step()
    assert not torch.equal(weight, before)
    before = weight.detach().clone()
    hook = weight.register_hook(lambda grad: grad * math.inf)
    step = trainer.train_step()
    hook.remove()
    assert not step.applied and torch.equal(weight, before) and trainer.engine.scaler.get_scale() == 512.0
    trainer.loader.close()


def test_gradients_are_clipped_by_their_global_norm(small_run, monkeypatch):
    seen = []
    trainer = Trainer(small_run(grad_clip=0.05), ONE, CPU)
    monkeypatch.setattr(
        trainer.engine.optimizer,
        "step",
        lambda: seen.append(torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])),
    )
    step = trainer.train_step()
    assert step.grad_norm > 0.05 and float(seen[0]) == pytest.approx(0.05, rel=1e-4)
    trainer.loader.close()


def test_only_matrices_decay(small_run):
    trainer = Trainer(small_run(), ONE, CPU)
    decaying, others = ({id(p) for p in group["params"]} for group in trainer.engine.optimizer.param_groups)
    assert [group["weight_decay"] for group in trainer.engine.optimizer.param_groups] == [0.1, 0.0]
    for name, p in trainer.model.named_parameters():
        vector = any(part in name for part in ("norm", "bias", "b_up", "b_down", "sinks"))
        assert id(p) in (others if vector else decaying), name
    trainer.loader.close()


def test_an_uninitialised_parameter_is_noticed(small_run):
    trainer = Trainer(small_run(), ONE, CPU)
    check_initialisation(trainer.model)
    for name, value in (("blocks.1.moe.w_down", 1e27), ("head.weight", math.nan), ("head.norm.weight", 0.0)):
        parameter = trainer.model.get_parameter(name)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] = value
        with pytest.raises(RuntimeError, match=name):
            check_initialisation(trainer.model)
        with torch.no_grad():
            parameter.copy_(kept)
    trainer.loader.close()


def test_bfloat16_trains_with_fp32_master_weights(small_run):
    config = small_run(dtype="bfloat16", max_iters=60, lr_decay_iters=60, eval_interval=30, lr=1e-2, log_interval=10)
    seen = {}

    def look(self):
        seen["master"] = {p.dtype for p in self.model.parameters()}
        block = self.model.blocks[0]
        hooks = [
            block.moe.register_forward_pre_hook(lambda m, a: seen.update(x=a[0].dtype, w_up=m.w_up.dtype)),
            block.moe.router.register_forward_hook(lambda m, a, z: seen.update(router=m.weight.dtype, logits=z.dtype)),
        ]
        result = step(self)
        [hook.remove() for hook in hooks]
        return result

    step = Trainer.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", look)
        assert command.train(config) == 0
    assert seen == {
        "master": {torch.float32}, "x": torch.bfloat16, "w_up": torch.bfloat16,
        "router": torch.float32, "logits": torch.float32,
    }  # fmt: skip
    losses = [r["loss"] for r in records(config, "eval")]
    assert losses[-1] < losses[0] - 1.5


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_a_checkpoint_that_resumes(small_run, number, status):
    config = small_run(max_iters=100_000, save_every=0, eval_interval=0)
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_engine.train", *flags_of(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    metrics = Path(config.out_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status, err.decode()
    assert f"stopped by {number.name}" in out.decode() and not err
    last = Checkpoints(Path(config.out_dir), ONE).latest()
    iteration = int(last.name[-8:])
    assert records(config)[-1]["iter"] == iteration
    assert command.train(dataclasses.replace(config, max_iters=iteration + 2)) == 0
    assert records(config)[-1]["iter"] == iteration + 2


def collapse(trainer, bias):
    """Make all tokens start on the same two experts of every layer."""
    with torch.no_grad():
        for block in trainer.model.blocks:
            block.moe.router.weight.mul_(0.01)
            block.moe.router.bias[:2] += bias


def test_a_collapsed_router_recovers_with_the_default_coefficient(small_run):
    """The balance loss alone has to spread the tokens; without it they stay where they are."""
    last = {}
    for coef in ("auto", "0"):
        config = small_run(
            max_iters=250, lr_decay_iters=250, batch_size=16, eval_interval=0, save_every=0, log_interval=50,
            fresh=True, router_aux_coef=coef, model={"num_experts": 8},
        )  # fmt: skip
        trainer = Trainer(config, ONE, CPU)
        collapse(trainer, 1.0)
        with RunLog(Path(config.out_dir), console=False) as log:
            first = trainer.train_step()
            assert first.balance.min() > 1.8  # 1 is balanced
            assert trainer.run(log) == 0
        last[coef] = sum(records(config)[-1]["balance_per_layer"]) / 2
    assert last["auto"] < 1.2 < 1.4 < last["0"]


BAD = {
    "batch_size 0": (["--batch_size", "0"], "--batch_size: expected at least 1, got 0"),
    "negative lr": (["--lr", "-1"], "--lr: expected at least 0, got -1.0"),
    "lr not a number": (["--lr", "fast"], "--lr: expected a number, got 'fast'"),
    "min_lr above lr": (["--min_lr", "1"], "--min_lr: expected at most lr = 0.003, got 1.0"),
    "heads do not divide": (["--model.num_kv_heads", "3"], "--model.num_heads: expected a multiple of num_kv_heads"),
    "fp16 on a CPU": (["--dtype", "float16"], "--dtype float16: needs a GPU"),
    "unknown dtype": (["--dtype", "int8"], "--dtype: expected one of bfloat16, float16, float32 or none"),
    "unknown preset": (["--preset", "9b"], "--preset: expected one of tiny, small, 6b, 8b, got '9b'"),
    "mistyped flag": (["--bach-size", "3"], "no such flag --bach-size; did you mean --batch_size?"),
    "aux coef": (["--router_aux_coef", "lots"], "--router_aux_coef: expected auto or a number of at least 0, got lots"),
    "vocabulary too small": (["--model.vocab_size", "32"], "--model.vocab_size: expected at least the data's 257"),
    "block larger than a shard": (["--block_size", "20000"], "--block_size 20000: needs train shards of at least"),
    "no such folder": (["--data_dir", "nowhere"], "nowhere"),
    "no GPU": (["--device", "cuda"], "--device: expected a CUDA or ROCm device, found none"),
    "8b on this machine": (["--preset", "8b"], "--preset 8b"),
    "model field": (["--model.top_k", "9"], "--model.top_k: expected at most min(num_experts, 8) = 4, got 9"),
    "no such backend": (["--model.backend", "triton"], "--model.backend: 'triton' needs a GPU"),
    "config missing": (["--config", "no.toml"], "--config no.toml: No such file or directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, small_run, capsys, monkeypatch):
    extra, expected = BAD[case]
    config = small_run()
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    if case == "no such backend":
        monkeypatch.setattr("moe_engine.kernels.launch.INTERPRETED", False)
    if case == "8b on this machine":
        monkeypatch.setattr(loop_module, "memory_total", lambda device: 24 * 10**9)
        flags = [f"--data_dir={config.data_dir}", f"--out_dir={config.out_dir}", "--block_size=16", "--sample_every=0"]
    else:
        flags = flags_of(config)
    assert command.main([*flags, *extra]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ") and expected in captured.err
    assert not Path(config.out_dir).exists() and not captured.out


def test_a_token_outside_the_vocabulary_is_named(small_run, token_folder, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in token_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    np.load(folder / "toy_train_000000.npy", mmap_mode="r+")[:] = 257
    assert command.main(flags_of(dataclasses.replace(small_run(), data_dir=str(folder)))) == 2
    error = capsys.readouterr().err
    assert "toy_train_000000.npy" in error and "257" in error


@pytest.mark.parametrize("sample_every", [0, 6])
def test_an_unknown_tokenizer_is_an_error(small_run, token_folder, tmp_path, capsys, sample_every):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in token_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer": "o20k_base"}))
    config = dataclasses.replace(small_run(), data_dir=str(folder), sample_every=sample_every)
    assert command.main(flags_of(config)) == 2
    assert "o20k_base" in capsys.readouterr().err and not Path(config.out_dir).exists()
