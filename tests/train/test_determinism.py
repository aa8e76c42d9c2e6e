"""`--deterministic`: what it sets, that it is put back, and that a CPU's results do not notice."""

import os
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_engine import torch_backend
from moe_engine.train import __main__ as command
from moe_engine.train import determinism, loop, parallel
from moe_engine.train.errors import InputError
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import deterministic, read_metrics
from moe_engine.train.parallel import World

# Parts of names of operations that PyTorch (2.11 to 2.14) refuses in this mode on a GPU, of those that a transformer
# may come near: from the list in the documentation of torch.use_deterministic_algorithms.
REFUSED = (
    "nll_loss", "ctc_loss", "histc", "bincount", "median", "aten.put", "scatter_reduce", "kthvalue",
    "interpolate", "upsample", "grid_sampl", "_embedding_bag", "pool", "reflection_pad", "max_unpool",
)  # fmt: skip
# Those that work in it, by another algorithm than without it.
ALLOWED = ("scatter_add", "index_put", "index_add", "index_select", "embedding_dense_backward", "cumsum")

# Our own operations, whose bodies PyTorch's modes do not look into by themselves.
OURS = {str(op._opoverload): op._init_fn for op in (torch_backend._forward, torch_backend._backward)}


def settings():
    """Everything that the mode touches."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
        {name: os.environ.get(name) for name in determinism.DEFAULTS},
    )


def records(config):
    found = read_metrics(Path(config.out_dir) / "metrics.jsonl")
    return [deterministic(r) for r in found if r["kind"] != "save"]  # which are logged when a disk is done


def weights(config, iteration):
    trainer = Trainer(config, World(0, 1, 0), torch.device("cpu"))
    try:
        trainer.resume(Path(config.out_dir) / f"ckpt/step_{iteration:08d}")
        return [parallel.whole(p.detach()) for p in trainer.model.parameters()]
    finally:
        parallel.stop()


@pytest.fixture(autouse=True)
def no_peak(monkeypatch):
    """Timing a product in bfloat16 takes many processors seconds."""
    monkeypatch.setattr(loop, "peak_flops", lambda *_: (1e12, "nothing"))


@pytest.fixture
def nothing_set(monkeypatch):
    for name in determinism.DEFAULTS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("on", [False, True])
def test_the_mode_is_on_during_a_run_and_off_behind_it(small_run, monkeypatch, nothing_set, on):
    before, seen, run = settings(), [], Trainer._run
    monkeypatch.setattr(Trainer, "_run", lambda self: seen.append(settings()) or run(self))
    config = small_run(max_iters=2, deterministic=on, eval_interval=0)
    assert command.train(config) == 0
    assert before == settings() and before[0] is False and before[3] is True
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0"}
    assert seen == [(True, False, False, False, environment)] if on else seen == [before]
    assert ("deterministic algorithms only" in (Path(config.out_dir) / "logs.txt").read_text()) == on


def test_the_mode_ends_with_a_run_that_fails_and_puts_back_what_was_there(monkeypatch, nothing_set):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings()
        with pytest.raises(KeyError), determinism.mode(True):
            assert settings()[:3] == (True, False, False)
            raise KeyError
        assert settings() == before and before[:3] == (True, True, True)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def test_a_users_own_environment_is_kept_if_it_can_be(monkeypatch, nothing_set):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    with determinism.mode(True):
        assert determinism.note().count("(CUBLAS_WORKSPACE_CONFIG=:16:8, NCCL_NVLS_ENABLE=1)") == 1
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with (
        pytest.raises(InputError, match="expected CUBLAS_WORKSPACE_CONFIG :4096:8 or :16:8, or none, got :0:0"),
        determinism.mode(True),
    ):
        pass
    assert not torch.are_deterministic_algorithms_enabled()


def test_tuned_tiles_are_refused(small_run):
    with pytest.raises(InputError, match=r"--deterministic: cannot be used with --model.autotune; .* differ"):
        small_run(deterministic=True, model={"autotune": True})


@pytest.mark.parametrize(
    ("save", "values"),
    [
        ("h", {"checkpointing": "none", "sample_every": 2}),
        ("x", {"checkpointing": "block", "grad_accum_steps": 2}),
        ("h", {"checkpointing": "selective", "dtype": "bfloat16"}),
    ],
)
def test_a_run_on_a_cpu_is_bitwise_the_one_without_it(small_run, tmp_path, save, values):
    """Both save modes, all modes of checkpointing; with evaluation and sampling."""
    common = {"max_iters": 2, "eval_interval": 2, "model": {"save": save}, **values}
    without, on = (small_run(out_dir=tmp_path / str(d), deterministic=d, **common) for d in (False, True))
    for config in (without, on):
        assert command.train(config) == 0
    assert records(without) == records(on) and len(records(on)) >= 4
    assert all(torch.equal(p, q) for p, q in zip(weights(without, 2), weights(on, 2), strict=True))


def test_it_may_be_turned_on_at_a_resume(small_run, tmp_path):
    common = {"save_every": 2, "eval_interval": 0}
    whole = small_run(out_dir=tmp_path / "whole", max_iters=4, **common)
    parts = [
        small_run(out_dir=tmp_path / "parts", max_iters=n, deterministic=d, **common)
        for n, d in ((2, False), (4, True))
    ]
    for config in (whole, *parts):
        assert command.train(config) == 0
    assert records(whole) == records(parts[1]) and len(records(whole)) == 4


class _Seen(TorchDispatchMode):
    """Names of all operations, those within our own operations too."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        body = OURS.get(str(function))
        if body is None:
            return function(*args, **kwargs or {})
        with self:
            return body(*args, **kwargs or {})


def test_no_operation_is_one_that_a_gpu_would_refuse(small_run, monkeypatch):
    """Of a run on the CPU: training in both forms of the cross-entropy, evaluation, sampling."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # the mode would not see what other threads do
    names = set()
    for values in ({}, {"dtype": "bfloat16", "model": {"router_balance": "bias", "router_jitter": 0.1}}):
        config = small_run(max_iters=2, eval_interval=2, sample_every=2, deterministic=True, fresh=True, **values)
        with _Seen() as seen:
            assert command.train(config) == 0
        names |= seen.names
    assert {n for n in names if any(part in n for part in REFUSED)} == set()
    found = {part for part in ALLOWED if any(part in n for n in names)}
    assert {"scatter_add", "embedding_dense_backward", "cumsum"} <= found, sorted(names)
    assert OURS.keys() <= names and "aten.mm.default" in names
