"""Chunked cross-entropy against F.cross_entropy in fp64: value, gradients, z-loss, chunk borders, memory."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_engine import loss
from moe_engine.loss import linear_cross_entropy
from moe_engine.testing import FP64_SUMS, assert_budget_bites, assert_close, normal, relative_error


def _recompute(x: Tensor, weight: Tensor, targets: Tensor, z_coef: float = 0.0) -> Tensor:
    """The form that fp32 and fp64 take on other devices than the CPU, and 16-bit dtypes everywhere."""
    return loss._Recompute.apply(x, weight, targets, z_coef)


FORMS = pytest.mark.parametrize("form", [linear_cross_entropy, _recompute], ids=["one pass", "recompute"])


@pytest.fixture
def small_chunks(monkeypatch):
    """Of 64 tokens, and of 16 words: 16, 16, 16 and 2 of the inputs' 50."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 0)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 0)
    monkeypatch.setattr(loss, "CHUNK_WORDS", 16)
    assert loss._chunk_tokens(50) == 64 and loss._chunk_words(300) == 16


def _inputs(tokens: int, dtype=torch.float64, vocab=50, width=24, masked=0.2) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = normal(tokens, width, seed=1, dtype=dtype), normal(vocab, width, seed=2, dtype=dtype) / width**0.5
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < masked] = -1
    return x, weight * 3, targets


def _plain(x: Tensor, weight: Tensor, targets: Tensor, z_coef: float = 0.0) -> Tensor:
    """All logits at once, the softmax in fp32 or better."""
    logits = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
    nats = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return nats + z_coef * logits.logsumexp(1)[targets >= 0].square().sum()


def _run(function, x, weight, targets, z_coef=0.0, scale=1.0) -> dict[str, Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    value = function(x, weight, targets, z_coef)
    grad_x, grad_weight = torch.autograd.grad(value * scale, (x, weight))
    return {"loss": value.detach(), "grad x": grad_x, "grad weight": grad_weight}


@FORMS
@pytest.mark.parametrize("z_coef", [0, 0.01], ids=["plain", "z-loss"])
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
def test_loss_and_gradients_in_fp64(small_chunks, form, z_coef, tokens, masked, why):
    inputs = (*_inputs(tokens, masked=masked), z_coef)
    actual, exact = _run(form, *inputs, scale=0.37), _run(_plain, *inputs, scale=0.37)
    for name, value in actual.items():
        assert_close(value, exact[name], roundings=FP64_SUMS, name=f"{why}: {name}")


@FORMS
def test_a_whole_chunk_masked_between_others(small_chunks, form):
    x, weight, targets = _inputs(200)
    targets[64:128] = -100  # any negative id
    actual = _run(form, x, weight, targets)
    exact = _run(_plain, x, weight, targets.clamp(min=-1))
    for name, value in actual.items():
        assert_close(value, exact[name], roundings=FP64_SUMS, name=name)
    assert not actual["grad x"][64:128].any() and actual["grad x"][:64].any()


@pytest.mark.parametrize("z_coef", [0, 0.01], ids=["plain", "z-loss"])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        pytest.param(linear_cross_entropy, torch.float32, id="one pass-fp32"),
        pytest.param(_recompute, torch.float32, id="recompute-fp32"),
        pytest.param(linear_cross_entropy, torch.bfloat16, id="recompute-bf16"),
        pytest.param(linear_cross_entropy, torch.float16, id="recompute-fp16"),
    ],
)
def test_lower_precision(small_chunks, z_coef, form, dtype):
    x, weight, targets = _inputs(300, dtype)
    actual, plain = (_run(function, x, weight, targets, z_coef) for function in (form, _plain))
    exact = _run(_plain, x.double(), weight.double(), targets, z_coef)
    assert actual["loss"].dtype == torch.float32
    assert actual["grad x"].dtype == actual["grad weight"].dtype == dtype
    for name, value in actual.items():
        assert_close(value, exact[name], plain[name], roundings=8 if name == "loss" else 0, name=name)
    for name in ("grad x", "grad weight"):
        assert_budget_bites(exact[name], plain[name])


def test_many_chunks_in_bf16_are_as_exact_as_one_gemm(small_chunks):
    """The gradient of W is rounded once. That of x is a sum in fp32 of rounded products, one for each of 32 chunks."""
    x, weight, targets = _inputs(4096, torch.bfloat16, vocab=512)
    exact = _run(_plain, x.double(), weight.double(), targets)
    pieces, whole = (_run(function, x, weight, targets) for function in (linear_cross_entropy, _plain))
    for name, factor in {"grad weight": 1.02, "grad x": 1.1}.items():
        ours, theirs = (relative_error(run[name], exact[name]).typical for run in (pieces, whole))
        assert ours < factor * theirs, name


@FORMS
def test_large_logits_neither_overflow_nor_lose_the_loss(small_chunks, form):
    x, weight, targets = _inputs(40, torch.float32)
    actual = _run(form, 300 * x, weight, targets)
    exact = _run(_plain, (300 * x).double(), weight.double(), targets)
    for name, value in actual.items():
        assert_close(value, exact[name], roundings=FP64_SUMS, name=name)


@FORMS
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_the_gradients_that_are_asked_for(small_chunks, form, frozen):
    x, weight, targets = _inputs(128)
    exact = _run(_plain, x, weight, targets)
    wanted = weight if frozen == "x" else x
    form(x, weight, targets)  # neither is
    wanted.requires_grad_()
    with Watch() as watch:
        form(x, weight, targets).backward()
    assert_close(wanted.grad, exact["grad weight" if frozen == "x" else "grad x"], roundings=FP64_SUMS)
    assert (x if frozen == "x" else weight).grad is None
    assert watch.gemms == (3 * 4 if form is _recompute else 2 * 2)


def test_a_second_backward_is_right_or_an_error():
    x, weight, targets = _inputs(100)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    value = linear_cross_entropy(x, weight, targets)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    once, weight.grad = weight.grad, None
    value = _recompute(x, weight, targets)
    value.backward(retain_graph=True)
    value.backward()
    assert_close(weight.grad, 2 * once, roundings=FP64_SUMS)


@FORMS
def test_a_gradient_of_the_gradient_is_refused(form):
    x, weight, targets = _inputs(100)
    value = form(x.requires_grad_(), weight, targets)
    with pytest.raises(RuntimeError, match="differentiable once: create_graph=True"):
        torch.autograd.grad(value, x, create_graph=True)


@pytest.mark.parametrize("z_coef", [-0.1, math.nan, math.inf])
def test_a_bad_coefficient_is_named(z_coef):
    with pytest.raises(ValueError, match=f"^z_coef: expected a finite number of at least 0, got {z_coef}$"):
        linear_cross_entropy(*_inputs(10), z_coef)


def test_autocast_is_the_same_in_its_dtype(small_chunks):
    x, weight, targets = _inputs(100, torch.float32)
    expected = _run(linear_cross_entropy, x.bfloat16(), weight.bfloat16(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        actual = _run(linear_cross_entropy, x, weight, targets)
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32 and torch.equal(actual[name], value.float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["one pass", "recompute"])
def test_compiled_loss_has_the_same_gradients(small_chunks, dtype):
    inputs = (*_inputs(100, dtype), 0.01)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    eager, traced = _run(linear_cross_entropy, *inputs), _run(compiled, *inputs)
    assert all(torch.equal(value, traced[name]) for name, value in eager.items())


@FORMS
def test_the_choice_of_chunks_does_not_matter(monkeypatch, form):
    inputs = _inputs(500)
    whole = _run(form, *inputs)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 0)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 0)
    monkeypatch.setattr(loss, "CHUNK_WORDS", 7)
    pieces = _run(form, *inputs)
    for name, value in whole.items():
        assert_close(pieces[name], value, roundings=FP64_SUMS, name=name)


class Watch(TorchDispatchMode):
    """What operations allocate, and how many GEMMs there are.

    Attributes:
        elements: of the largest allocation.
        shapes: of all results, with the number of allocations that have it.
        live, peak: bytes of the allocations that are alive, now and at most.
    """

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.elements, self.shapes, self.gemms, self.live, self.peak = 0, {}, 0, 0, 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in before)

    def _free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.gemms += "mm" in func.overloadpacket.__name__
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(tensor, Tensor):
                continue
            shape, storage = tuple(tensor.shape), tensor.untyped_storage()
            self.shapes.setdefault(shape, 0)
            if storage in self._known:
                continue
            self._known.add(storage)
            self.shapes[shape] += 1
            self.elements = max(self.elements, storage.nbytes() // tensor.itemsize)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, storage.nbytes())
        return result


def test_one_pass_holds_a_chunk_of_tokens(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1 << 22)
    tokens, vocab, width, chunk = 2048, 4096, 8, 256
    x, weight, targets = _inputs(tokens, torch.float32, vocab, width)
    with Watch(x, weight) as watch:
        linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets).backward()
    assert watch.shapes[chunk, vocab] and watch.shapes[vocab, width]
    assert watch.elements == chunk * vocab
    assert watch.gemms == 3 * tokens // chunk  # none is done twice


@pytest.mark.parametrize("z_coef", [0, 0.01], ids=["plain", "z-loss"])
@pytest.mark.parametrize("tokens", [4096, 16384, 32768])
def test_memory_of_the_8b_models_output_layer(tokens, z_coef):
    """Nothing of a vocabulary's size but the gradient of W, in its own dtype; the docstring's figure holds."""
    vocab, width, words = 201_088, 2880, max(4096, (1 << 25) // tokens)
    with FakeTensorMode():
        x = torch.empty(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocab, width, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.empty(tokens, dtype=torch.int64)
        with Watch(x, weight, targets) as forward:
            value = linear_cross_entropy(x, weight, targets, z_coef)
        kept = forward.live
        with Watch(x, weight, targets) as backward:
            value.backward()
        assert weight.grad.dtype == torch.bfloat16
    assert kept < 5 * tokens  # the log-sum-exp
    logits = 6 * tokens * words
    assert forward.elements == tokens * words and forward.peak < 1.01 * logits
    large = {shape for shape, count in backward.shapes.items() if count and math.prod(shape) > 64 * tokens}
    assert large == {(tokens, words), (tokens, vocab % words), (tokens, width), (vocab, width)}
    assert backward.shapes[vocab, width] == 1
    assert backward.peak < 2 * vocab * width + 1.01 * logits + 4 * tokens * width
    assert backward.gemms == 3 * forward.gemms == 3 * math.ceil(vocab / words)


def test_a_chunk_is_a_small_part_of_a_large_vocabulary():
    assert loss._chunk_tokens(201_088) == 64
    words = {1: 1 << 25, 2048: 16384, 4000: 8320, 4096: 8192, 1 << 20: 4096}
    assert {tokens: loss._chunk_words(tokens) for tokens in words} == words


@FORMS
def test_without_gradients_none_are_computed(small_chunks, form):
    """Evaluation: the parameters require gradients, but nobody will ask."""
    x, weight, targets = _inputs(300)
    expected = _plain(x, weight, targets)
    weight = weight.requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Watch() as watch:
            value = form(x, weight, targets)
        assert_close(value, expected, roundings=FP64_SUMS)
        assert not value.requires_grad
        assert watch.gemms == (4 if form is _recompute else 5)  # one for each chunk


def test_which_form_is_taken():
    for dtype, form in {torch.float64: "OnePass", torch.float32: "OnePass", torch.bfloat16: "Recompute"}.items():
        x, weight, targets = _inputs(10, dtype)
        assert linear_cross_entropy(x.requires_grad_(), weight, targets).grad_fn.name() == f"_{form}Backward"
    x, weight, targets = (tensor.to("meta") for tensor in _inputs(10, torch.float32))
    assert linear_cross_entropy(x.requires_grad_(), weight, targets).grad_fn.name() == "_RecomputeBackward"
