"""MoELayer and the torch backend against the reference in fp64: forward, every gradient, routing, what is saved."""

import copy
import dataclasses
import itertools
import pickle
import threading
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from moe_engine import MoEConfig, MoELayer, moe, reference, torch_backend, triton_backend
from moe_engine.config import ACTIVATIONS
from moe_engine.router import RouterStats, balance_loss
from moe_engine.testing import (
    FP64_SUMS,
    assert_budget_bites,
    assert_close,
    normal,
    parameters,
    relative_error,
)


class Case(NamedTuple):
    """A layer, how its experts are used, and why it is worth a test."""

    why: str
    config: MoEConfig
    tokens: int = 37
    push: float = 0  # added to the router's bias of expert 1: +40 makes it everyone's, −40 nobody's
    stretch: float = 1  # of the up-projection, so that h passes the activation's limit
    threads: int = 1


OAI = MoEConfig(d_model=24, d_ff=20)
MIXTRAL = MoEConfig(24, 20, activation="swiglu", expert_bias=False, router_bias=False)
OLMOE = dataclasses.replace(MIXTRAL, gate="softmax_then_topk")


def _but(config: MoEConfig, **changes) -> MoEConfig:
    return dataclasses.replace(config, **changes)


CASES = [
    Case("gpt-oss manner, an odd number of tokens", OAI),
    Case("Mixtral manner: no bias anywhere, plain SwiGLU", MIXTRAL),
    Case("OLMoE manner: weights not renormalised, so gradients reach every logit", OLMOE),
    Case("OLMoE gate with gpt-oss experts", _but(OAI, gate="softmax_then_topk")),
    Case("expert biases without a router bias", _but(OAI, router_bias=False)),
    Case("a router bias without expert biases", _but(OAI, expert_bias=False)),
    Case("top-1, renormalised: the weight is 1 and the router learns from the statistics alone", _but(OAI, top_k=1)),
    Case("top-1, not renormalised, as in Switch Transformer", _but(OLMOE, top_k=1)),
    Case("top-4", _but(OAI, top_k=4)),
    Case("5 experts: no power of two", _but(OAI, num_experts=5)),
    Case("5 experts, top-4: nearly dense", _but(OLMOE, num_experts=5, top_k=4)),
    Case("every expert chosen", _but(OAI, num_experts=2)),
    Case("one expert: an ordinary MLP", _but(OAI, num_experts=1, top_k=1)),
    Case("no token", OAI, tokens=0),
    Case("one token: most experts idle", OAI, tokens=1),
    Case("an expert without a token: its gradient is zero, not what was in memory", OAI, push=-40),
    Case("one hot expert: every token goes there first", OAI, push=40),
    Case("one hot expert takes everything", _but(OAI, top_k=1), push=40),
    Case("values beyond the limit of swiglu_oai", OAI, stretch=8),
    Case("the same values in plain SwiGLU, which has none", MIXTRAL, stretch=8),
    Case("enough work for experts side by side", _but(OAI, d_model=32, d_ff=128), tokens=601, threads=2),
]
BACKENDS = ("torch", "triton")
ON_BACKENDS = [  # fp64 is for torch alone; so is the case for its threads, which would take the interpreter minutes
    pytest.param(backend, case, id=f"{backend}: {case.why}")
    for backend in BACKENDS
    for case in CASES
    if backend == "torch" or case.threads == 1
]
BALANCE, Z = 3.0, 0.5  # large, so that the gradient through the statistics weighs as much as the one through out


def _values(case: Case) -> dict[str, Tensor]:
    values = parameters(MoELayer(case.config))
    values["w_up"] *= case.stretch
    if "router.bias" in values:
        values["router.bias"][-1 if case.config.num_experts == 1 else 1] += case.push
    return values


def _losses(out, grad_out, prob_sum, lse_sq, counts, config):
    """What is differentiated: the output against a fixed gradient, and both auxiliary losses, from their definition."""
    tokens = max(len(out), 1)
    share = counts.to(prob_sum.dtype) / (tokens * config.top_k)
    balance = config.num_experts * (share * (prob_sum / tokens)).sum()
    return (out * grad_out).sum().to(prob_sum.dtype) + BALANCE * balance + Z * lse_sq / tokens


def _run(forward, x: Tensor, values: dict[str, Tensor], grad_out: Tensor, config: MoEConfig) -> dict[str, Tensor]:
    """Results of `forward(x, values) → (out, stats)` by name, gradients included."""
    x, values = x.clone().requires_grad_(), {name: v.clone().requires_grad_() for name, v in values.items()}
    out, stats = forward(x, values)
    loss = _losses(out, grad_out, stats.prob_sum, stats.lse_sq, stats.expert_counts, config)
    grads = torch.autograd.grad(loss, [x, *values.values()])
    results = {"out": out, "prob_sum": stats.prob_sum, "lse_sq": stats.lse_sq, "entropy": stats.entropy}
    return results | {f"grad {name}": grad for name, grad in zip(["x", *values], grads, strict=True)}


def _device(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def _layer(config: MoEConfig):
    device = _device(config.backend)

    def forward(x, values):
        layer = MoELayer(config).to(x.dtype)
        values = {name: value.to(device) for name, value in values.items()}
        out, stats = torch.func.functional_call(layer, values, (x.to(device),), strict=True)
        return out.cpu(), RouterStats(*(value.cpu() for value in stats))

    return forward


def _reference(config: MoEConfig):
    def forward(x, values):
        result = reference.moe(x, values, config)
        return result.out, RouterStats(*result[3:])

    return forward


def _mixed(config: MoEConfig):
    """Plain autograd with the layer's mixed precision: routing in fp32, one expert after the other in x's dtype."""

    def forward(x, values):
        routing = reference.moe(x.float(), {name: v.float() for name, v in values.items()}, config)
        out = torch.zeros(x.shape)
        for e in range(config.num_experts):
            token, slot = torch.where(routing.topk_idx == e)
            h = x[token] @ values["w_up"][e] + (values["b_up"][e] if "b_up" in values else 0)
            a = reference.gated_activation(h, ACTIVATIONS[config.activation])
            y = a @ values["w_down"][e] + (values["b_down"][e] if "b_down" in values else 0)
            out = out.index_add(0, token, routing.topk_weights[token, slot, None] * y)
        return out.to(x.dtype), RouterStats(*routing[3:])

    return forward


def _inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    x, grad_out = (normal(case.tokens, case.config.d_model, seed=seed, dtype=dtype) for seed in (1, 2))
    return x, {name: value.to(dtype) for name, value in _values(case).items()}, grad_out


def _widen(x, values, grad_out):
    return x.double(), {name: value.double() for name, value in values.items()}, grad_out.double()


def _least(value: Tensor) -> float:
    # See assert_close: a reference of few numbers may be right by luck. In fp32 nothing rests on the last bits.
    return 4 if value.numel() < 100 or value.dtype == torch.float32 else 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_layer_in_fp64(case):
    torch.set_num_threads(case.threads)
    inputs = _inputs(case, torch.float64)
    actual = _run(_layer(case.config), *inputs, case.config)
    exact = _run(_reference(case.config), *inputs, case.config)
    for name, value in actual.items():
        assert_close(value, exact[name], roundings=FP64_SUMS, name=name)


@pytest.mark.parametrize(("backend", "case"), ON_BACKENDS)
def test_layer_in_fp32(backend, case):
    torch.set_num_threads(case.threads)
    inputs = _inputs(case, torch.float32)
    actual = _run(_layer(_but(case.config, backend=backend)), *inputs, case.config)
    plain = _run(_reference(case.config), *inputs, case.config)
    exact = _run(_reference(case.config), *_widen(*inputs), case.config)
    for name, value in actual.items():
        assert_close(value, exact[name], plain[name], roundings=_least(value), name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("backend", "case"), ON_BACKENDS)
def test_layer_in_16_bits(backend, case, dtype):
    torch.set_num_threads(case.threads)
    inputs = _inputs(case, dtype)
    actual = _run(_layer(_but(case.config, backend=backend)), *inputs, case.config)
    plain = _run(_mixed(case.config), *inputs, case.config)
    exact = _run(_reference(case.config), *_widen(*inputs), case.config)
    for name, value in actual.items():
        assert value.dtype == (torch.float32 if name in ("prob_sum", "lse_sq", "entropy") else dtype)
        assert_close(value, exact[name], plain[name], roundings=_least(value), name=name)


def test_rows_of_a_token_are_weighted_and_added_in_fp32():
    """In bf16 the sums over 8 experts are more exact than those of plain autograd, which rounds each gradient first."""
    case = Case("", _but(OAI, top_k=8), tokens=400)
    inputs = _inputs(case, torch.bfloat16)
    actual, plain = (_run(make(case.config), *inputs, case.config) for make in (_layer, _mixed))
    exact = _run(_reference(case.config), *_widen(*inputs), case.config)
    for name in ("out", "grad x"):
        ours, theirs = (relative_error(run[name], exact[name]).typical for run in (actual, plain))
        assert ours < 0.93 * theirs, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_budget_of_these_tests_rejects_faults(dtype):
    inputs = _inputs(CASES[0], dtype)
    plain = _run(_mixed(OAI), *inputs, OAI)
    exact = _run(_reference(OAI), *_widen(*inputs), OAI)
    for name in ("out", "grad x", "grad w_up", "grad w_down", "grad b_up", "grad router.weight"):
        assert_budget_bites(exact[name], plain[name])


# ---- the layer as a module


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_shape_and_the_statistics_of_the_whole(backend):
    layer = MoELayer(_but(OAI, backend=backend)).to(_device(backend))
    x = normal(2, 3, 5, 24, dtype=torch.float32).to(_device(backend))
    out, stats = layer(x)
    flat, flat_stats = layer(x.reshape(30, 24))
    assert out.shape == x.shape and torch.equal(out.reshape(30, 24), flat)
    assert all(torch.equal(a, b) for a, b in zip(stats, flat_stats, strict=True))
    assert stats.expert_counts.sum() == 60
    single, _ = layer(x[0, 0, 0])
    assert_close(single, out[0, 0, 0].double().detach(), roundings=8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_of_x_does_not_matter(backend):
    device = _device(backend)
    layer = MoELayer(_but(OAI, backend=backend)).to(device)
    grad_out = normal(30, 24, dtype=torch.float32, seed=1).to(device)
    results = []
    for x in (normal(24, 30, dtype=torch.float32).t(), normal(24, 30, dtype=torch.float32).t().contiguous()):
        x = x.to(device).requires_grad_()
        out, _ = layer(x)
        results.append((out, *torch.autograd.grad(out, [x, *layer.parameters()], grad_out)))
    for strided, contiguous in zip(*results, strict=True):
        assert_close(strided, contiguous.double().detach(), roundings=16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_token_leaves_the_others_alone(backend):
    x, values, _ = _inputs(CASES[0], torch.float32)
    layer = MoELayer(_but(OAI, backend=backend)).to(_device(backend))
    layer.load_state_dict(values)
    x = x.to(_device(backend))
    clean, _ = layer(x)
    x = x.clone()
    x[5, 3] = torch.nan
    x = x.requires_grad_()
    out, stats = layer(x)
    others = torch.arange(len(x), device=x.device) != 5
    assert out[5].isnan().all()
    assert_close(out[others], clean[others].double().detach(), roundings=8)
    (out[others].sum() + out[5].sum()).backward()  # no crash, and the fault is visible in the gradient
    assert x.grad[5].isnan().all() and x.grad[others].isfinite().all()
    assert stats.prob_sum.isnan().all()


def _no_gpu():
    raise RuntimeError("0 active drivers ([]). There should only be one.")


def test_errors_name_what_is_wrong(monkeypatch):
    with pytest.raises(ValueError, match=r"x: expected a last dimension of d_model = 24, got shape \(3, 16\)"):
        MoELayer(OAI)(torch.zeros(3, 16))
    with pytest.raises(ValueError, match=r"x: expected the dtype of the weights, torch.float32, got torch.bfloat16"):
        MoELayer(OAI)(torch.zeros(3, 24, dtype=torch.bfloat16))
    monkeypatch.setattr("moe_engine.kernels.launch.target", _no_gpu)
    with pytest.raises(ValueError, match=r"backend: 'triton' needs a GPU .* or its interpreter .* says: 0 active"):
        MoELayer(_but(OAI, backend="triton"))
    monkeypatch.undo()
    for backend in ("torch", "auto"):
        assert MoELayer(_but(OAI, backend=backend))._functions[1] is torch_backend.expert_mlp
    assert MoELayer(_but(OAI, backend="triton"))._functions[1] is triton_backend.expert_mlp


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_can_be_copied_and_pickled(backend):
    layer = MoELayer(_but(OAI, backend=backend)).to(_device(backend))
    x = normal(5, 24, dtype=torch.float32).to(_device(backend))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], layer(x)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_experts_and_leaves_the_router_alone(backend):
    device = _device(backend)
    layer = MoELayer(_but(OAI, backend=backend)).to(device)
    x = normal(20, 24, dtype=torch.float32).to(device)
    half = copy.deepcopy(layer).bfloat16()
    half.router = layer.router
    expected, expected_stats = half(x.bfloat16())
    for given in (x, x.bfloat16()):
        layer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            out, stats = layer(given)
            assert torch.equal(out, expected) and torch.equal(stats.prob_sum, expected_stats.prob_sum)
            (out.sum() + stats.prob_sum[0]).backward()  # within, so that backward is under autocast as well
        assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())
    within = layer.router.weight.grad.clone()
    layer.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        out, stats = layer(x.bfloat16())
    (out.sum() + stats.prob_sum[0]).backward()
    assert torch.equal(layer.router.weight.grad, within)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_changes_no_bit(reentrant, backend):
    layer = MoELayer(_but(OAI, backend=backend)).to(_device(backend))
    x = normal(20, 24, dtype=torch.float32).to(_device(backend))
    results = []
    for checkpointing in (False, True):
        leaf = x.clone().requires_grad_()
        out, _ = checkpoint(layer, leaf, use_reentrant=reentrant) if checkpointing else layer(leaf)
        layer.zero_grad()
        out.square().sum().backward()
        results.append([out, leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_looks_at_each_saved_tensor_once(backend):
    """Offloading hooks fetch a tensor at every look."""
    layer, unpacked = MoELayer(_but(OAI, backend=backend)).to(_device(backend)), []
    x = normal(20, 24, dtype=torch.float32).to(_device(backend)).requires_grad_()

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        unpacked.append(packed[0])
        return packed[1]

    packs = itertools.count()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (next(packs), tensor), unpack):
        out, stats = layer(x)
        (out.sum() + stats.prob_sum[0]).backward()
    assert unpacked and len(unpacked) == len(set(unpacked))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_experts(backend):
    device = _device(backend)
    layer = MoELayer(_but(OAI, backend=backend)).to(device)
    x = normal(20, 24, dtype=torch.float32).to(device)
    gradients = []
    for frozen in (False, True):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not (frozen and name.startswith(("w_", "b_")))).grad = None
        leaf = x.clone().requires_grad_()
        layer(leaf)[0].square().sum().backward()
        gradients.append([leaf.grad, layer.router.weight.grad.clone()])
    assert layer.w_up.grad is None and layer.b_down.grad is None
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_auto_takes_triton_for_tensors_on_a_gpu_and_says_so_if_it_cannot(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for target, expected in ((lambda: "sm_90", triton_backend), (_no_gpu, torch_backend)):
        moe._gpu_backend.cache_clear()
        monkeypatch.setattr("moe_engine.kernels.launch.target", target)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layers = [MoELayer(OAI) for _ in range(2)]
        assert (
            layers[0]._gpu_functions[1] is expected.expert_mlp and layers[0]._functions[1] is torch_backend.expert_mlp
        )
        assert [str(w.message)[:17] for w in caught] == (["the torch backend"] if expected is torch_backend else [])
    assert MoELayer(_but(OAI, backend="torch"))._gpu_functions[1] is torch_backend.expert_mlp
    moe._gpu_backend.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_modes_agree_bit_for_bit(backend, dtype):
    inputs = _inputs(CASES[0], dtype)
    kept_h, kept_x = (_run(_layer(_but(OAI, backend=backend, save=save)), *inputs, OAI) for save in ("h", "x"))
    assert all(torch.equal(value, kept_x[name]) for name, value in kept_h.items())


def test_reset_parameters():
    layer = MoELayer(MoEConfig(128, 96, init_std=0.05))
    for name, p in layer.named_parameters():
        if name in ("router.bias", "b_up", "b_down"):
            assert not p.any(), name
        else:
            assert p.std().item() == pytest.approx(0.05, rel=5 / (2 * p.numel()) ** 0.5), name
            assert abs(p.mean().item()) < 5 * 0.05 / p.numel() ** 0.5, name


def test_two_runs_agree_bit_for_bit():
    for case in (CASES[0], CASES[-1]):
        torch.set_num_threads(2)
        for dtype in (torch.float32, torch.bfloat16):
            inputs = _inputs(case, dtype)
            first, second = (_run(_layer(case.config), *inputs, case.config) for _ in range(2))
            assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_experts_side_by_side_compute_what_they_do_one_after_the_other(monkeypatch):
    case, activation, seen = CASES[-1], torch_backend._activation, []

    def record(h, act):
        seen.append(threading.get_ident())
        return activation(h, act)

    monkeypatch.setattr(torch_backend, "_activation", record)
    inputs, results = _inputs(case, torch.float32), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seen.clear()
        results.append(_run(_layer(case.config), *inputs, case.config))
        assert (set(seen) == {threading.get_ident()}) == (threads == 1), "this case does not reach the threads"
    assert torch.get_num_threads() == 2
    for name in ("out", "grad w_up", "grad b_up", "grad w_down", "grad b_down"):
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=lambda case: case.why)
def test_without_gradients_the_output_is_the_same(case):
    """The modes are each thread's own: experts side by side have to be told."""
    torch.set_num_threads(case.threads)
    layer, x = MoELayer(case.config), _inputs(case, torch.float32)[0]
    expected, _ = layer(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out, _ = layer(x)
        assert torch.equal(out, expected) and not out.requires_grad


@pytest.mark.parametrize("save", ["h", "x"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", [OAI, OLMOE], ids=["gpt-oss", "OLMoE"])
def test_what_backward_keeps(config, backend, save):
    """2·T·D bytes of x, 4·T·K·F of h, and a small part for the router and the indices: no activation, no output."""
    config = _but(config, d_model=64, d_ff=48, backend=backend, save=save)
    tokens, d, f, e, k = 150, config.d_model, config.d_ff, config.num_experts, config.top_k
    layer = MoELayer(config).bfloat16().to(_device(backend))
    x = normal(tokens, d, dtype=torch.bfloat16).to(_device(backend)).requires_grad_()
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tuple(tensor.shape), tensor)  # kept alive: one address each
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out, stats = layer(x)
    assert kept.pop(x.untyped_storage().data_ptr())[0] == 2 * tokens * d
    sizes = sorted(nbytes for nbytes, _, _ in kept.values())
    if save == "h":
        assert sizes.pop() == 4 * tokens * k * f
    # Logits, gate weights, chosen experts, permutation, offsets; weights or the inverse permutation once more.
    small = tokens * e * 4 + 4 * tokens * k * 4 + (e + 1) * 4
    assert sum(sizes) <= small, [shape for _, shape, _ in kept.values()]
    (out.sum() + stats.prob_sum.sum()).backward()
    assert x.grad.dtype == torch.bfloat16 and layer.w_up.grad.any()


# ---- without data, and compiled


def _backward_shapes(layer: MoELayer, x: Tensor) -> None:
    out, stats = layer(x)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    assert stats.prob_sum.shape == stats.expert_counts.shape == (8,) and stats.lse_sq.shape == ()
    (out.sum() + balance_loss(stats, 2)).backward()
    assert all(p.grad.shape == p.shape and p.grad.dtype == p.dtype for p in layer.parameters())


@pytest.mark.parametrize("config", [OAI, MIXTRAL], ids=["gpt-oss", "Mixtral"])
def test_shapes_without_data(config):
    with FakeTensorMode():
        _backward_shapes(MoELayer(config), torch.randn(2, 5, 24))
    with torch.device("meta"):
        for dtype in (torch.float32, torch.bfloat16):
            _backward_shapes(MoELayer(config).to(dtype), torch.randn(2, 5, 24, dtype=dtype))


def test_compiled_layer_is_one_graph_and_gives_the_same_numbers():
    layer = MoELayer(OAI)
    layer.load_state_dict(_inputs(CASES[0], torch.float32)[1])
    x = normal(37, 24, dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for run in (layer, compiled):
        leaf = x.clone().requires_grad_()
        out, stats = run(leaf)
        loss = out.square().sum() + balance_loss(stats, 2)
        results.append((out, *stats, *torch.autograd.grad(loss, [leaf, *layer.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
