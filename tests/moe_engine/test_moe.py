"""MoELayer and the torch backend against the reference in fp64: forward, every gradient, routing, what is saved."""

import dataclasses
import threading
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_engine import MoEConfig, MoELayer, moe, reference, torch_backend
from moe_engine.config import ACTIVATIONS, GATES
from moe_engine.router import RouterStats, balance_loss, z_loss
from moe_engine.testing import (
    FP64_SUMS,
    LOGITS,
    assert_budget_bites,
    assert_close,
    normal,
    parameters,
    relative_error,
    routing_logits,
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


def _layer(config: MoEConfig):
    def forward(x, values):
        # Through the public losses where there is a layer, to hold them too.
        layer = MoELayer(config).to(x.dtype)
        return torch.func.functional_call(layer, values, (x,), strict=True)

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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_layer_in_fp32(case):
    torch.set_num_threads(case.threads)
    inputs = _inputs(case, torch.float32)
    actual = _run(_layer(case.config), *inputs, case.config)
    plain = _run(_reference(case.config), *inputs, case.config)
    exact = _run(_reference(case.config), *_widen(*inputs), case.config)
    for name, value in actual.items():
        assert_close(value, exact[name], plain[name], roundings=_least(value), name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_layer_in_16_bits(case, dtype):
    torch.set_num_threads(case.threads)
    inputs = _inputs(case, dtype)
    actual = _run(_layer(case.config), *inputs, case.config)
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


# ---- routing


def _identity_params(experts: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A reference layer whose logits are its input."""
    zeros = torch.zeros(experts, experts, 2, dtype=dtype)
    return {"router.weight": torch.eye(experts, dtype=dtype), "w_up": zeros, "w_down": zeros[..., :1].mT}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", [kind for kind in LOGITS if kind != "nan"])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(41, 8, 2), (41, 5, 4), (33, 8, 1), (7, 256, 8), (3, 1, 1), (0, 8, 2)],
    ids=["top-2 of 8", "top-4 of 5", "top-1", "the largest: top-8 of 256", "one expert", "no token"],
)
def test_gate_in_fp64(gate, kind, tokens, experts, top_k):
    z = routing_logits(kind, tokens, experts, dtype=torch.float64).requires_grad_()
    idx, weights, stats = torch_backend.gate(z, top_k, gate)
    config = MoEConfig(experts, 1, experts, top_k, expert_bias=False, router_bias=False, gate=gate)
    expected = reference.moe(z, _identity_params(experts, z.dtype), config)

    # By falling logit, ties to the lower expert, in the plainest words there are.
    order = [sorted(range(experts), key=lambda e, row=row: (-row[e], e))[:top_k] for row in z.tolist()]
    assert idx.tolist() == order and idx.dtype == torch.int32
    assert stats.expert_counts.tolist() == [sum(row.count(e) for row in order) for e in range(experts)]
    assert stats.expert_counts.dtype == torch.int32

    assert_close(weights, expected.topk_weights.detach(), roundings=FP64_SUMS, name="topk_weights")
    for name in ("prob_sum", "lse_sq"):
        assert_close(getattr(stats, name), getattr(expected, name).detach(), roundings=FP64_SUMS, name=name)
    # The logarithm of a probability near 1 is known to a rounding of 1, not of itself: judged beside a nat per token.
    assert_close(stats.entropy + tokens, expected.entropy + tokens, roundings=FP64_SUMS, name="entropy")
    assert not stats.entropy.requires_grad and not idx.requires_grad

    # Each way back on its own: weights, prob_sum, lse_sq.
    for actual, wanted in ((weights, expected.topk_weights), *zip(stats[1:3], expected[4:6], strict=True)):
        cotangent = normal(*actual.shape, seed=4)
        (grad,) = torch.autograd.grad(actual, z, cotangent, retain_graph=True)
        (grad_expected,) = torch.autograd.grad(wanted, z, cotangent, retain_graph=True)
        # A softmax's gradient is a difference of terms as large as the cotangent, 0 for the weight of top-1 that is
        # renormalised: beside ones it is judged on their scale.
        one = torch.ones_like(z)
        assert_close(torch.cat((grad, one)), torch.cat((grad_expected, one)).detach(), roundings=FP64_SUMS)


def test_gate_in_fp32_is_as_exact_as_plain_autograd():
    z = routing_logits("skewed", 200, 8)
    for gate in GATES:
        config = MoEConfig(8, 1, expert_bias=False, router_bias=False, gate=gate)
        results = []
        for dtype, run in ((torch.float32, "gate"), (torch.float32, "reference"), (torch.float64, "reference")):
            leaf = z.to(dtype).requires_grad_()
            if run == "gate":
                _, weights, stats = torch_backend.gate(leaf, 2, gate)
            else:
                result = reference.moe(leaf, _identity_params(8, dtype), config)
                weights, stats = result.topk_weights, RouterStats(*result[3:])
            loss = (weights * normal(200, 2, dtype=dtype)).sum() + balance_loss(stats, 2) * 30 + z_loss(stats, 2)
            results.append((weights, stats.prob_sum, torch.autograd.grad(loss, leaf)[0]))
        for actual, plain, exact in zip(*results, strict=True):
            assert_close(actual, exact.detach(), plain.detach(), roundings=2)


def _assert_valid_routing(idx: Tensor, experts: int) -> None:
    assert ((idx >= 0) & (idx < experts)).all()
    assert all(len(set(row)) == len(row) for row in idx.tolist()), "an expert twice in one token's list"


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_nan_logits_give_valid_experts_and_nan_weights(gate, top_k):
    z = routing_logits("nan", 40, 8)
    idx, weights, stats = torch_backend.gate(z, top_k, gate)
    bad = z.isnan().any(1)
    _assert_valid_routing(idx, 8)
    assert weights[bad].isnan().all()
    assert weights[~bad].isfinite().all()
    assert torch.equal(idx[~bad], torch_backend.gate(z[~bad], top_k, gate)[0])  # the others do not notice
    assert stats.expert_counts.sum() == 40 * top_k
    assert stats.prob_sum.isnan().all() and stats.lse_sq.isnan()  # the guard of the loop sees it in the loss


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf], ids=["+inf", "-inf"])
def test_infinite_logits_give_valid_experts(gate, value):
    z = routing_logits("balanced", 20, 8)
    z[::2, 3] = value
    z[1] = value
    idx, weights, stats = torch_backend.gate(z, 2, gate)
    _assert_valid_routing(idx, 8)
    assert weights[1].isnan().all()
    assert stats.expert_counts.sum() == 40
    if value > 0:
        assert (idx[::2, 0] == 3).all() and weights[::2].isnan().all()
    else:
        assert (idx[::2] != 3).all() and weights[::2].isfinite().all()
        z.requires_grad_()
        grad_rows = torch.autograd.grad(torch_backend.gate(z, 2, gate)[1][::2, 0].sum(), z)[0][::2]
        assert grad_rows.isfinite().all() and (grad_rows[:, 3] == 0).all()


def test_entropy_of_excluded_experts_is_zero():
    z = routing_logits("balanced", 20, 8)
    z[:, 3:] = -torch.inf
    _, _, stats = torch_backend.gate(z, 2, GATES[0])
    assert_close(stats.entropy, torch_backend.gate(z[:, :3].double(), 2, GATES[0])[2].entropy, roundings=8)


def test_a_nan_token_leaves_the_others_alone():
    x, values, _ = _inputs(CASES[0], torch.float32)
    layer = MoELayer(OAI)
    layer.load_state_dict(values)
    clean, _ = layer(x)
    x = x.clone()
    x[5, 3] = torch.nan
    x = x.requires_grad_()
    out, stats = layer(x)
    others = torch.arange(len(x)) != 5
    assert out[5].isnan().all()
    assert_close(out[others], clean[others].double().detach(), roundings=8)
    (out[others].sum() + out[5].sum()).backward()  # no crash, and the fault is visible in the gradient
    assert x.grad[5].isnan().all() and x.grad[others].isfinite().all()
    assert stats.prob_sum.isnan().all()


@pytest.mark.parametrize("kind", [kind for kind in LOGITS if kind != "nan"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(50, 8, 2), (1, 8, 1), (0, 8, 2), (9, 256, 8)])
def test_sort_by_expert(kind, tokens, experts, top_k):
    idx, _, stats = torch_backend.gate(routing_logits(kind, tokens, experts), top_k, GATES[0])
    offsets, permutation = torch_backend.sort_by_expert(idx, stats.expert_counts)
    flat = idx.flatten().tolist()
    assert permutation.tolist() == sorted(range(len(flat)), key=lambda slot: (flat[slot], slot))
    assert offsets.tolist() == [sum(expert < e for expert in flat) for e in range(experts + 1)]
    assert permutation.dtype == offsets.dtype == torch.int32


# ---- activation


def test_gradient_passes_at_the_limit_and_not_beyond():
    # One token of value 1 and one expert: h is w_up itself, and grad_w_up is grad_h.
    gate_up = [(7, 7), (7, -7), (-7, 3), (7.0625, 7.0625), (-9, -7.0625), (6.96875, -6.96875), (100, -100)]
    act = ACTIVATIONS["swiglu_oai"]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        w_up = torch.tensor(gate_up, dtype=dtype).reshape(1, 1, -1).requires_grad_()
        w_down = normal(1, len(gate_up), 1, dtype=dtype)
        routing = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
        weight = torch.ones(1, 1, dtype=torch.promote_types(dtype, torch.float32))
        one = torch.ones(1, 1, dtype=dtype)
        out = torch_backend.expert_mlp(one, w_up, None, w_down, None, weight, *routing, act)
        (grad,) = torch.autograd.grad(out.sum(), w_up)
        exact_up = w_up.detach().double().requires_grad_()
        exact = reference.gated_activation(exact_up[0], act) @ w_down[0].double()
        (exact_grad,) = torch.autograd.grad(exact.sum(), exact_up)
        assert_close(out.detach(), exact.detach(), roundings=FP64_SUMS if dtype == torch.float64 else 8)
        assert torch.equal(grad == 0, exact_grad == 0)
        assert (grad[0, 0, :4] != 0).all() and (grad[0, 0, 6:8] == 0).all()
        assert_close(grad.detach(), exact_grad, roundings=8)


@pytest.mark.parametrize("bias", ["b_up", "b_down"])
def test_one_bias_without_the_other(bias):
    x, values, grad_out = _inputs(CASES[0], torch.float64)
    routing = reference.moe(x, values, OAI)
    offsets, permutation = torch_backend.sort_by_expert(routing.topk_idx.int(), routing.expert_counts.int())
    given, results = {name: values[name] for name in ("w_up", "w_down", bias)}, []
    for run in ("expert_mlp", "reference"):
        leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
        if run == "reference":
            routers = {name: value for name, value in values.items() if "router" in name}
            out = reference.moe(x, routers | leaves, OAI).out
        else:
            weights = [leaves.get(name) for name in ("w_up", "b_up", "w_down", "b_down")]
            routed = (routing.topk_weights, permutation, offsets)
            out = torch_backend.expert_mlp(x, *weights, *routed, ACTIVATIONS["swiglu_oai"])
        results.append([out, *torch.autograd.grad(out, list(leaves.values()), grad_out)])
    for actual, exact in zip(*results, strict=True):
        assert_close(actual.detach(), exact.detach(), roundings=FP64_SUMS)


# ---- the layer as a module


def test_any_leading_shape_and_the_statistics_of_the_whole():
    layer = MoELayer(OAI)
    x = normal(2, 3, 5, 24, dtype=torch.float32)
    out, stats = layer(x)
    flat, flat_stats = layer(x.reshape(30, 24))
    assert out.shape == x.shape and torch.equal(out.reshape(30, 24), flat)
    assert all(torch.equal(a, b) for a, b in zip(stats, flat_stats, strict=True))
    assert stats.expert_counts.sum() == 60
    single, _ = layer(x[0, 0, 0])
    assert_close(single, out[0, 0, 0].double().detach(), roundings=8)


def test_memory_layout_of_x_does_not_matter():
    layer, grad_out = MoELayer(OAI), normal(30, 24, dtype=torch.float32, seed=1)
    results = []
    for x in (normal(24, 30, dtype=torch.float32).t(), normal(24, 30, dtype=torch.float32).t().contiguous()):
        x.requires_grad_()
        out, _ = layer(x)
        results.append((out, *torch.autograd.grad(out, [x, *layer.parameters()], grad_out)))
    for strided, contiguous in zip(*results, strict=True):
        assert_close(strided, contiguous.double().detach(), roundings=16)


def test_errors_name_what_is_wrong(monkeypatch):
    with pytest.raises(ValueError, match=r"x: expected a last dimension of d_model = 24, got shape \(3, 16\)"):
        MoELayer(OAI)(torch.zeros(3, 16))
    monkeypatch.setattr(moe, "_BACKENDS", {"torch": torch_backend})
    with pytest.raises(ValueError, match=r"backend: this version has torch .*got 'triton'"):
        MoELayer(_but(OAI, backend="triton"))
    assert MoELayer(_but(OAI, backend="torch")).backend is MoELayer(OAI).backend is torch_backend


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


@pytest.mark.parametrize("config", [OAI, OLMOE], ids=["gpt-oss", "OLMoE"])
def test_what_backward_keeps(config):
    """2·T·D bytes of x, 4·T·K·F of h, and a small part for the router and the indices: no activation, no output."""
    config = _but(config, d_model=64, d_ff=48)
    tokens, d, f, e, k = 300, config.d_model, config.d_ff, config.num_experts, config.top_k
    layer = MoELayer(config).bfloat16()
    x = normal(tokens, d, dtype=torch.bfloat16).requires_grad_()
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
    assert sizes.pop() == 4 * tokens * k * f
    # Logits, gate weights, chosen experts, permutation, offsets; twice the weights where they are saved in two places.
    small = tokens * e * 4 + 4 * tokens * k * 4 + (e + 1) * 4
    assert sum(sizes) <= small, [shape for _, shape, _ in kept.values()]
    (out.sum() + stats.prob_sum.sum()).backward()
    assert x.grad.dtype == torch.bfloat16 and layer.w_up.grad.any()


# ---- auxiliary losses


def _stats(counts: list, probs: list, lse_sq: float = 0.0) -> RouterStats:
    return RouterStats(torch.tensor(counts), torch.tensor(probs), torch.tensor(lse_sq), torch.tensor(0.0))


def test_balance_loss_is_one_when_balanced_and_experts_over_k_when_collapsed():
    assert balance_loss(_stats([4, 4, 4, 4], [2.0, 2.0, 2.0, 2.0]), 2).item() == 1  # 8 tokens, top-2
    assert balance_loss(_stats([8, 8, 0, 0], [4.0, 4.0, 0.0, 0.0]), 2).item() == 2
    assert balance_loss(_stats([8, 0, 0, 0], [8.0, 0.0, 0.0, 0.0]), 1).item() == 4
    assert z_loss(_stats([4, 4, 4, 4], [2.0] * 4, 20.0), 2).item() == 2.5
    nothing = _stats([0, 0], [0.0, 0.0])
    assert balance_loss(nothing, 1).item() == z_loss(nothing, 1).item() == 0


def test_balance_loss_takes_the_counts_of_all_ranks():
    mine = _stats([4, 0], [3.0, 1.0])
    assert balance_loss(mine, 1).item() == pytest.approx(2 * 3 / 4)
    assert balance_loss(mine, 1, torch.tensor([4, 4])).item() == pytest.approx(1)


def test_losses_of_stacked_layers_are_those_of_each():
    layers = [torch_backend.gate(routing_logits(kind, 30, 8), 2, GATES[0])[2] for kind in ("skewed", "balanced")]
    stacked = RouterStats(*(torch.stack(field) for field in zip(*layers, strict=True)))
    for loss in (balance_loss, z_loss):
        assert torch.equal(loss(stacked, 2), torch.stack([loss(stats, 2) for stats in layers]))
    assert balance_loss(stacked, 2)[0] > balance_loss(stacked, 2)[1] > 0.9


def test_balance_gradient_lowers_the_crowded_expert():
    z = routing_logits("skewed", 100, 8).requires_grad_()
    (grad,) = torch.autograd.grad(balance_loss(torch_backend.gate(z, 2, GATES[0])[2], 2), z)
    assert grad[:, 0].sum() > 0 > grad[:, -1].sum()
    assert_close(grad.sum(1) + grad.abs().sum(1), grad.abs().sum(1).double(), roundings=8)  # softmax: rows sum to 0


# ---- the custom operators


def _op_inputs(biases: bool, activation: str = "swiglu_oai") -> tuple:
    config = _but(OAI, expert_bias=biases, activation=activation)
    x, values, _ = _inputs(Case("", config, tokens=9), torch.float32)
    idx, weights, stats = torch_backend.gate(x @ values["router.weight"].T, 2, GATES[0])
    offsets, permutation = torch_backend.sort_by_expert(idx, stats.expert_counts)
    floats = [x, values["w_up"], values.get("b_up"), values["w_down"], values.get("b_down"), weights.detach()]
    floats = [None if t is None else t.clone().requires_grad_() for t in floats]
    return (*floats, permutation, offsets, *ACTIVATIONS[activation])


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_opcheck_of_forward(biases):
    inputs = _op_inputs(biases)
    torch.library.opcheck(torch.ops.moe_engine.expert_mlp_torch.default, inputs)
    strided = inputs[0].detach().t().contiguous().t().requires_grad_()  # the fake outputs must not copy its strides
    torch.library.opcheck(torch.ops.moe_engine.expert_mlp_torch.default, (strided, *inputs[1:]))


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_opcheck_of_backward(biases):
    x, w_up, _, w_down, b_down, weights, permutation, offsets, *constants = (
        t.detach() if isinstance(t, Tensor) else t for t in _op_inputs(biases)
    )
    h = normal(18, 40, dtype=torch.float32)
    args = (torch.ones_like(x), x, h, w_up, w_down, b_down, weights, permutation, offsets, biases, *constants)
    torch.library.opcheck(torch.ops.moe_engine.expert_mlp_torch_backward.default, args)


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
