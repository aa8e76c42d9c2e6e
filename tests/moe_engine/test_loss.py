"""Chunked cross-entropy against F.cross_entropy in fp64: value, gradients, chunk borders, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_engine import loss
from moe_engine.loss import linear_cross_entropy
from moe_engine.testing import FP64_SUMS, assert_budget_bites, assert_close, normal, relative_error


@pytest.fixture
def chunks_of_64(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 0)
    assert loss._chunk_tokens(torch.zeros(1), 50) == 64


def _inputs(tokens: int, dtype=torch.float64, vocab=50, width=24, masked=0.2) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = normal(tokens, width, seed=1, dtype=dtype), normal(vocab, width, seed=2, dtype=dtype) / width**0.5
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < masked] = -1
    return x, weight * 3, targets


def _plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once, the softmax in fp32 or better."""
    logits = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


def _run(function, x, weight, targets, scale=1.0) -> dict[str, Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    value = function(x, weight, targets)
    grad_x, grad_weight = torch.autograd.grad(value * scale, (x, weight))
    return {"loss": value.detach(), "grad x": grad_x, "grad weight": grad_weight}


@pytest.mark.parametrize(
    ("tokens", "masked", "why"),
    [
        (0, 0, "no token"),
        (1, 0, "one token"),
        (63, 0.2, "one short of a chunk"),
        (64, 0.2, "a chunk"),
        (65, 0.2, "one over: a chunk of one"),
        (300, 0.2, "several chunks and a ragged last one"),
        (200, 1.1, "every target masked"),
        (200, 0, "none masked"),
    ],
)
def test_loss_and_gradients_in_fp64(chunks_of_64, tokens, masked, why):
    inputs = _inputs(tokens, masked=masked)
    actual, exact = _run(linear_cross_entropy, *inputs, scale=0.37), _run(_plain, *inputs, scale=0.37)
    for name, value in actual.items():
        assert_close(value, exact[name], roundings=FP64_SUMS, name=f"{why}: {name}")


def test_a_whole_chunk_masked_between_others(chunks_of_64):
    x, weight, targets = _inputs(200)
    targets[64:128] = -100  # any negative id
    actual = _run(linear_cross_entropy, x, weight, targets)
    exact = _run(_plain, x, weight, targets.clamp(min=-1))
    for name, value in actual.items():
        assert_close(value, exact[name], roundings=FP64_SUMS, name=name)
    assert not actual["grad x"][64:128].any() and actual["grad x"][:64].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_lower_precision(chunks_of_64, dtype):
    x, weight, targets = _inputs(300, dtype)
    actual, plain = (_run(function, x, weight, targets) for function in (linear_cross_entropy, _plain))
    exact = _run(_plain, x.double(), weight.double(), targets)
    assert actual["loss"].dtype == torch.float32
    assert actual["grad x"].dtype == actual["grad weight"].dtype == dtype
    for name, value in actual.items():
        assert_close(value, exact[name], plain[name], roundings=8 if name == "loss" else 0, name=name)
    for name in ("grad x", "grad weight"):
        assert_budget_bites(exact[name], plain[name])


def test_the_gradient_of_the_weight_adds_up_in_fp32(chunks_of_64):
    """As exact in bf16 after 64 chunks as from one GEMM over all of them."""
    x, weight, targets = _inputs(64 * 64, torch.bfloat16)
    exact = _run(_plain, x.double(), weight.double(), targets)
    pieces, whole = (_run(function, x, weight, targets) for function in (linear_cross_entropy, _plain))
    for name in ("grad x", "grad weight"):
        ours, theirs = (relative_error(run[name], exact[name]).typical for run in (pieces, whole))
        assert ours < 1.1 * theirs, name


def test_large_logits_neither_overflow_nor_lose_the_loss():
    x, weight, targets = _inputs(40, torch.float32)
    actual = _run(linear_cross_entropy, 300 * x, weight, targets)
    exact = _run(_plain, (300 * x).double(), weight.double(), targets)
    for name, value in actual.items():
        assert_close(value, exact[name], roundings=FP64_SUMS, name=name)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_the_gradients_that_are_asked_for(frozen):
    x, weight, targets = _inputs(100)
    exact = _run(_plain, x, weight, targets)
    wanted = weight if frozen == "x" else x
    linear_cross_entropy(x, weight, targets)  # neither is
    wanted.requires_grad_()
    linear_cross_entropy(x, weight, targets).backward()
    assert_close(wanted.grad, exact["grad weight" if frozen == "x" else "grad x"], roundings=FP64_SUMS)
    assert (x if frozen == "x" else weight).grad is None


def test_a_second_backward_is_an_error_and_not_a_wrong_gradient():
    x, weight, targets = _inputs(100)
    value = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_compiled_loss_has_the_same_gradients(chunks_of_64):
    inputs = _inputs(100, torch.float32)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    eager, traced = _run(linear_cross_entropy, *inputs), _run(compiled, *inputs)
    assert all(torch.equal(value, traced[name]) for name, value in eager.items())


def test_the_choice_of_chunks_does_not_matter(monkeypatch):
    inputs = _inputs(500)
    whole = _run(linear_cross_entropy, *inputs)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 0)
    pieces = _run(linear_cross_entropy, *inputs)
    for name, value in whole.items():
        assert_close(pieces[name], value, roundings=FP64_SUMS, name=name)


class Watch(TorchDispatchMode):
    """Elements of the largest tensor that any operation puts out, all shapes, and how many GEMMs there were."""

    def __init__(self):
        super().__init__()
        self.largest, self.shapes, self.gemms = 0, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.gemms += "mm" in func.overloadpacket.__name__
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.itemsize)
                self.shapes.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_never_exist_whole(monkeypatch, dtype):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1 << 22)
    tokens, vocab, width, chunk = 2048, 4096, 8, 256
    x, weight, targets = _inputs(tokens, dtype, vocab, width)
    with Watch() as watch:
        linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets).backward()
    assert (chunk, vocab) in watch.shapes and (vocab, width) in watch.shapes
    assert watch.largest == chunk * vocab
    assert watch.gemms == 3 * tokens // chunk  # none is done twice


def test_a_chunk_is_a_small_part_of_a_large_vocabulary():
    for device in ("cpu", "meta"):
        assert 64 <= loss._chunk_tokens(torch.zeros(1, device=device), 201_088) <= 1024


def test_without_gradients_none_are_computed(chunks_of_64):
    """Evaluation: the parameters require gradients, but nobody will ask."""
    x, weight, targets = _inputs(300)
    expected = _plain(x, weight, targets)
    weight = weight.requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Watch() as watch:
            value = linear_cross_entropy(x, weight, targets)
        assert_close(value, expected, roundings=FP64_SUMS)
        assert not value.requires_grad
        assert watch.gemms == 5  # one for each chunk of 64
