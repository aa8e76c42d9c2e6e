"""The expert MLP, and the layer of all kernels: every result and gradient against fp64, and what is promised of it."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_engine import MoEConfig, MoELayer, reference, triton_backend
from moe_engine.config import ACTIVATIONS, GATES
from moe_engine.kernels import launch
from moe_engine.kernels.expert_mlp import expert_mlp
from moe_engine.router import balance_loss, z_loss
from moe_engine.testing import (
    assert_budget_bites,
    assert_close,
    normal,
    parameters,
    routing_logits,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("x", "w_up", "b_up", "w_down", "b_down", "topk_weights")


class Case(NamedTuple):
    why: str
    tokens: int
    d: int
    f: int
    experts: int
    top_k: int
    kind: str = "skewed"
    activation: str = "swiglu_oai"
    biases: bool = True

    def __str__(self) -> str:
        return self.why


# Interpreter tiles: 32 rows, 64 columns of h, F or D, steps of 32; see launch.py.
CASES = [
    Case("ordinary", 96, 64, 64, 4, 2),
    Case("SwiGLU without biases", 96, 64, 64, 4, 2, activation="swiglu", biases=False),
    Case("an expert without rows", 70, 64, 64, 4, 1, "empty_expert"),
    Case("one expert with all rows", 70, 64, 64, 4, 1, "one_expert"),
    Case("one token", 1, 64, 64, 4, 2),
    Case("D and F no multiple of anything", 50, 45, 51, 3, 2),
    Case("D and F below every tile", 9, 7, 5, 2, 2),
    Case("one row past a tile", 33, 64, 64, 1, 1),
    Case("one column past a tile", 40, 65, 65, 3, 2),
    Case("top-1", 40, 32, 64, 5, 1),
    Case("top-4, experts no power of two", 40, 32, 64, 6, 4),
    Case("fewer rows than experts", 3, 32, 32, 60, 2),
    Case("equal logits", 64, 32, 32, 8, 2, "duplicates"),
]


class Routing(NamedTuple):
    topk_weights: Tensor
    expert_offsets: Tensor
    permutation: Tensor
    inverse: Tensor


def _routing(case: Case, seed: int = 0) -> Routing:
    """Weights in fp32, so that every dtype gets the same ones; made without our kernels."""
    logits = routing_logits(case.kind, case.tokens, case.experts, seed=seed)
    idx = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, : case.top_k]
    weights = logits.gather(1, idx).softmax(-1)
    order = torch.sort(idx.reshape(-1), stable=True).indices
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    offsets = torch.zeros(case.experts + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(idx.reshape(-1), minlength=case.experts).cumsum(0)
    return Routing(weights, offsets.int(), order.int(), inverse.int())


def _inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values of realistic size: h reaches the limit of gpt-oss's activation here and there."""
    e, d, f = case.experts, case.d, case.f
    values = {
        "x": normal(case.tokens, d, seed=1),
        "w_up": 3 * normal(e, d, 2 * f, seed=2) / math.sqrt(d),
        "b_up": 0.3 * normal(e, 2 * f, seed=3),
        "w_down": normal(e, f, d, seed=4) / math.sqrt(f),
        "b_down": 0.3 * normal(e, d, seed=5),
    }
    if not case.biases:
        del values["b_up"], values["b_down"]
    return {name: value.to(dtype) for name, value in values.items()}


def _plain(values: dict[str, Tensor], routing: Routing, activation: str) -> Tensor:
    """A loop over experts in the values' dtype: the reference, exact in fp64."""
    x, weights = values["x"], values["topk_weights"]
    top_k = weights.shape[1]
    out = torch.zeros_like(x)
    for e in range(values["w_up"].shape[0]):
        slots = routing.permutation[routing.expert_offsets[e] : routing.expert_offsets[e + 1]].long()
        h = x[slots // top_k] @ values["w_up"][e]
        if "b_up" in values:
            h = h + values["b_up"][e]
        y = reference.gated_activation(h, ACTIVATIONS[activation]) @ values["w_down"][e]
        if "b_down" in values:
            y = y + values["b_down"][e]
        out = out.index_add(0, slots // top_k, (weights.flatten()[slots, None] * y).to(x.dtype))
    return out


def _ours(values: dict[str, Tensor], routing: Routing, activation: str, device: str, save: str = "h") -> Tensor:
    on = {name: value.to(device) for name, value in values.items()}
    order = (t.to(device) for t in routing[1:])
    weights = (on["x"], on["w_up"], on.get("b_up"), on["w_down"], on.get("b_down"))
    return expert_mlp(*weights, on["topk_weights"], *order, *ACTIVATIONS[activation], save=save).cpu()


def _run(function, values: dict[str, Tensor], grad_out: Tensor, *arguments, **options) -> dict[str, Tensor]:
    """The output, and the gradient of everything."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    out = function(leaves, *arguments, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out.to(out.dtype))
    return {"out": out.detach()} | dict(zip((f"grad {name}" for name in leaves), grads, strict=True))


def _compare(case: Case, dtype: torch.dtype, device: str, bites: bool = False, **options) -> None:
    routing = _routing(case)
    values = _inputs(case, dtype) | {"topk_weights": routing.topk_weights}
    grad_out = normal(case.tokens, case.d, seed=6).to(dtype)
    wide = {name: value.double() for name, value in values.items()}
    exact = _run(_plain, wide, grad_out.double(), routing, case.activation)
    plain = _run(_plain, values, grad_out, routing, case.activation)
    ours = _run(_ours, values, grad_out, routing, case.activation, device, **options)
    assert list(ours) == list(exact)
    for name in ours:
        # Of few numbers some are right by luck: grant a few roundings.
        assert_close(ours[name], exact[name], plain[name], roundings=4 if case.tokens < 10 else 1, name=name)
        if bites:
            assert_budget_bites(exact[name], plain[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case, dtype, device):
    _compare(case, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_budget_bites(dtype, device):
    _compare(Case("every expert has many rows", 64, 32, 32, 3, 2, "balanced"), dtype, device, bites=True)


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(1, 48),
    d=st.integers(1, 70),
    f=st.integers(1, 70),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    kind=st.sampled_from(["balanced", "skewed", "one_expert", "empty_expert", "duplicates"]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    biases=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    save=st.sampled_from(["h", "x"]),
)
def test_drawn_shapes(tokens, d, f, experts, top_k, kind, activation, biases, dtype, save):
    case = Case("drawn", tokens, d, f, experts, min(top_k, experts), kind, activation, biases)
    _compare(case, dtype, "cuda" if torch.cuda.is_available() else "cpu", save=save)


def test_the_reference_has_the_gradients_of_its_equation():
    case = Case("small", 5, 4, 3, 3, 2)
    routing = _routing(case)
    values = _inputs(case, torch.float64) | {"topk_weights": routing.topk_weights.double()}
    names = list(values)

    def function(*tensors: Tensor) -> Tensor:
        return _plain(dict(zip(names, tensors, strict=True)), routing, "swiglu")

    assert torch.autograd.gradcheck(function, [value.requires_grad_() for value in values.values()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_one_bias_without_the_other(biases, dtype, device):
    routing = _routing(CASES[0])
    values = _inputs(CASES[0], dtype) | {"topk_weights": routing.topk_weights}
    del values["b_up" if biases else "b_down"]
    grad_out = normal(CASES[0].tokens, CASES[0].d, seed=6).to(dtype)
    exact = _run(_plain, {n: v.double() for n, v in values.items()}, grad_out.double(), routing, "swiglu_oai")
    plain = _run(_plain, values, grad_out, routing, "swiglu_oai")
    for name, actual in _run(_ours, values, grad_out, routing, "swiglu_oai", device).items():
        assert_close(actual, exact[name], plain[name], roundings=1, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_modes_and_runs_agree_bit_for_bit(dtype, device):
    case = CASES[0]
    routing = _routing(case)
    values = _inputs(case, dtype) | {"topk_weights": routing.topk_weights}
    grad_out = normal(case.tokens, case.d, seed=6).to(dtype)
    first, *others = (
        _run(_ours, values, grad_out, routing, case.activation, device, save=save) for save in ("h", "h", "x")
    )
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(_ours(values, routing, case.activation, device), first["out"])


@pytest.mark.parametrize(("descriptor", "subtiles"), [(True, 1), (True, 4), (False, 1), (False, 8)])
def test_other_tiles_give_the_same_bits(descriptor, subtiles, device, monkeypatch):
    """Descriptor loads and the parts of an epilogue move data, they do not change sums along D or F."""
    if not launch.INTERPRETED:
        pytest.skip("on a GPU the target's own tiles are tested")
    case = Case("aligned and ragged", 70, 72, 40, 3, 2)
    routing = _routing(case)
    values = _inputs(case, torch.bfloat16) | {"topk_weights": routing.topk_weights}
    grad_out = normal(case.tokens, case.d, seed=6).bfloat16()
    expected = _run(_ours, values, grad_out, routing, case.activation, device)
    used, default_tile = [], launch.default_tile

    def other(kernel: str, *arguments) -> launch.Tile:
        tile = default_tile(kernel, *arguments)
        tile = tile._replace(descriptor=descriptor, SUBTILES=subtiles if tile.SUBTILES else 0)
        used.append(tile)
        return tile

    monkeypatch.setattr(launch, "default_tile", other)
    actual = _run(_ours, values, grad_out, routing, case.activation, device)
    assert {tile.SUBTILES for tile in used} == {0, subtiles}
    for name in actual:
        if name == "grad topk_weights" and subtiles != 4:  # a sum over F, part by part
            assert_close(actual[name], expected[name].double(), roundings=4)
        else:
            assert torch.equal(actual[name], expected[name]), name


def test_no_token(device):
    case = Case("no token", 0, 16, 16, 4, 2)
    routing = _routing(case)
    values = _inputs(case, torch.bfloat16) | {"topk_weights": routing.topk_weights}
    results = _run(_ours, values, torch.empty(0, 16), routing, "swiglu_oai", device)
    assert results["out"].shape == (0, 16)
    for name in ("grad w_up", "grad b_up", "grad w_down", "grad b_down"):
        assert not results[name].any(), name


def test_a_bad_token_stays_with_its_experts(device):
    """One row of NaN reaches its own output and the gradients of its two experts; others do not notice."""
    case = CASES[0]
    routing = _routing(case)
    values = _inputs(case, torch.float32) | {"topk_weights": routing.topk_weights}
    grad_out = normal(case.tokens, case.d, seed=6).float()
    clean = _run(_ours, values, grad_out, routing, case.activation, device)
    values["x"][5] = math.nan
    spoilt = _run(_ours, values, grad_out, routing, case.activation, device)
    others = torch.arange(case.tokens) != 5
    for name in ("out", "grad x", "grad topk_weights"):
        assert spoilt[name][5].isnan().all(), name
        assert torch.equal(spoilt[name][others], clean[name][others]), name
    slots = routing.inverse[2 * 5 : 2 * 5 + 2]
    hit = {int((routing.expert_offsets <= slot).sum()) - 1 for slot in slots}
    for name in ("grad w_up", "grad b_up", "grad w_down"):
        for e in range(case.experts):
            assert torch.equal(spoilt[name][e], clean[name][e]) == (e not in hit), (name, e)
            assert spoilt[name][e].isnan().any() == (e in hit), (name, e)


# ---- what is kept, launched, and waited for


@pytest.mark.parametrize("save", ["h", "x"])
def test_what_backward_keeps(save, device):
    """2·T·D bytes of x, 4·T·K·F of h in the one mode and nothing in the other, and the routing."""
    case = CASES[0]
    t, d, f, e, k = case.tokens, case.d, case.f, case.experts, case.top_k
    routing = _routing(case)
    values = _inputs(case, torch.bfloat16) | {"topk_weights": routing.topk_weights}
    leaves = {name: value.to(device).requires_grad_() for name, value in values.items()}
    parameters = {leaves[name].data_ptr() for name in leaves if name.startswith(("w_", "b_"))}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters and tensor.numel():
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = _ours(leaves, routing, case.activation, device, save=save)
    floats = {"x": 2 * t * d} | ({"h": 4 * t * k * f} if save == "h" else {})
    indices = {"topk_weights": 4 * t * k, "offsets": 4 * (e + 1), "permutation": 4 * t * k, "inverse": 4 * t * k}
    assert sorted(t.numel() * t.element_size() for t in kept.values()) == sorted((floats | indices).values())
    out.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())


CONFIG = MoEConfig(d_model=32, d_ff=32, num_experts=6, backend="triton")


def _layer(config: MoEConfig, device: str) -> MoELayer:
    layer = MoELayer(config)
    layer.load_state_dict({name: value.float() for name, value in parameters(layer).items()})
    return layer.to(device)


def _step(layer: MoELayer, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out, stats = layer(leaf)
    loss = out.square().sum() + balance_loss(stats, layer.config.top_k) + z_loss(stats, layer.config.top_k)
    return [out, *stats, *torch.autograd.grad(loss, [leaf, *layer.parameters()])]


@pytest.mark.parametrize(("biases", "limit"), [(True, 14), (False, 12)])
def test_launches_of_a_layer(biases, limit, device, launches):
    if launches is None:
        pytest.skip("launches are counted in the interpreter")
    config = dataclasses.replace(CONFIG, expert_bias=biases)
    _step(_layer(config, device), normal(40, 32).float().to(device))
    assert 0 < len(launches) <= limit, [launch.kernel for launch in launches]


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, gate=GATES[1], expert_bias=False)])
def test_no_word_to_the_host(config):
    """Fake tensors have no values: whatever reads one on the host fails."""
    with FakeTensorMode():
        layer = MoELayer(config)
        results = _step(layer, torch.empty(5, 7, 32))
    assert [tuple(t.shape) for t in results[-len(list(layer.parameters())) :]] == [p.shape for p in layer.parameters()]


def test_a_read_on_the_host_would_be_seen(monkeypatch):
    """The proof that the test before can fail."""
    route = triton_backend.route

    def reading(*arguments):
        routed, stats = route(*arguments)
        stats.expert_counts.tolist()
        return routed, stats

    monkeypatch.setattr(triton_backend, "route", reading)
    with FakeTensorMode(), pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        _step(MoELayer(CONFIG), torch.empty(5, 7, 32))


def test_compiled_layer_is_one_graph_and_gives_the_same_numbers(device):
    layer, x = _layer(CONFIG, device), normal(37, 32).float().to(device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(_step(compiled, x), _step(layer, x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("save", ["h", "x"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_opcheck(biases, save, device):
    case = CASES[0]._replace(tokens=9, d=16, f=12)
    routing = _routing(case)
    values = _inputs(case, torch.float32)
    if not biases:
        del values["b_up"], values["b_down"]
    leaves = [values[n].to(device).requires_grad_() if n in values else None for n in NAMES[:-1]]
    order = [t.to(device) for t in routing[1:]]
    weights = routing.topk_weights.to(device).requires_grad_()
    constants = (*ACTIVATIONS["swiglu_oai"], save, False)
    torch.library.opcheck(torch.ops.moe_engine.expert_mlp.default, (*leaves, weights, *order, *constants))
    x, *rest = (None if leaf is None else leaf.detach() for leaf in leaves)
    h = normal(18, 24, dtype=torch.float32).to(device) if save == "h" else x.new_empty(0)
    arguments = (torch.ones_like(x), x, h, *rest, weights.detach(), *order, *constants)
    for want_weights in (True, False):
        torch.library.opcheck(torch.ops.moe_engine.expert_mlp_backward.default, (*arguments, want_weights))


BAD = {
    "x of one dimension": ("x", lambda v: v["x"][0], r"x: expected shape \(T, D\), got \(32,\)"),
    "x in fp64": ("x", lambda v: v["x"].double(), "x: expected float32 or float16 or bfloat16, got torch.float64"),
    "x strided": ("x", lambda v: v["x"].t().contiguous().t(),
        r"x: expected a contiguous tensor, got strides \(1, 10\)"),
    "w_up of another width": ("w_up", lambda v: v["w_up"][:, 1:],
        r"w_up: expected shape \(E, 32, 2F\), got \(3, 31, 24\)"),
    "w_up of another dtype": ("w_up", lambda v: v["w_up"].half(), "w_up: expected float32, got torch.float16"),
    "w_up strided": ("w_up", lambda v: v["w_up"].mT.contiguous().mT, "w_up: expected a contiguous tensor"),
    "w_up odd": ("w_up", lambda v: v["w_up"][..., 1:].contiguous(), "w_up: expected an even number of columns"),
    "no expert": ("w_up", lambda v: v["w_up"][:0], "w_up: expected at least one expert and one row"),
    "w_up elsewhere": ("w_up", lambda v: v["w_up"].to("meta"), "w_up: expected a tensor on "),
    "w_down of another F": ("w_down", lambda v: v["w_down"][:, 1:].contiguous(),
        r"w_down: expected shape \(3, 12, 32\)"),
    "b_up of another width": ("b_up", lambda v: v["b_up"][:, 1:].contiguous(), r"b_up: expected shape \(3, 24\)"),
    "b_down of another width": ("b_down", lambda v: v["b_down"][:, 1:].contiguous(),
        r"b_down: expected shape \(3, 32\)"),
    "weights in 16-bit": ("topk_weights", lambda v: v["topk_weights"].half(), "topk_weights: expected float32"),
    "weights of other tokens": ("topk_weights", lambda v: v["topk_weights"][1:],
        r"topk_weights: expected shape \(10, K\)"),
    "top_k over E": ("topk_weights", lambda v: torch.ones(10, 4),
        r"topk_weights: expected 1 to min\(E, 8\) = 3 columns, got \(10, 4\)"),
    "top_k zero": ("topk_weights", lambda v: torch.ones(10, 0), r"topk_weights: expected 1 to min\(E, 8\) = 3 columns"),
    "offsets too few": ("expert_offsets", lambda v: v["expert_offsets"][1:], r"expert_offsets: expected shape \(4,\)"),
    "offsets in int64": ("expert_offsets", lambda v: v["expert_offsets"].long(), "expert_offsets: expected int32"),
    "permutation too short": ("permutation", lambda v: v["permutation"][1:], r"permutation: expected shape \(20,\)"),
    "inverse in int64": ("inverse_permutation", lambda v: v["permutation"].long(),
        "inverse_permutation: expected int32"),
    "limit zero": ("limit", lambda v: 0.0, "limit: expected a positive number, got 0.0"),
    "limit NaN": ("limit", lambda v: math.nan, "limit: expected a positive number, got nan"),
    "a row twice": ("permutation", lambda v: 0 * v["permutation"], "permutation: expected each of 0 to 19 once"),
    "not the inverse": ("inverse_permutation", lambda v: v["permutation"].flip(0), "inverse_permutation: expected the"),
    "unknown mode": ("save", lambda v: "a", "save: expected one of h, x, got 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_errors_name_the_argument(fault, device):
    name, spoil, message = BAD[fault]
    case = Case("", 10, 32, 12, 3, 2)
    names = ("topk_weights", "expert_offsets", "permutation", "inverse_permutation")
    routing = dict(zip(names, _routing(case), strict=True))
    values = {key: value.to(device) for key, value in (_inputs(case, torch.float32) | routing).items()}
    expert_mlp(**values)
    bad = spoil(values)
    if isinstance(bad, Tensor) and bad.device.type != "meta":
        bad = bad.to(device)
    with pytest.raises(ValueError, match="^" + message):
        expert_mlp(**(values | {name: bad}))


@pytest.mark.parametrize("offsets", [[0, 5, 9, 19], [1, 5, 9, 20], [0, 9, 5, 20], [0, 5, 9, 21]])
def test_offsets_that_do_not_fit(offsets, device):
    """In the interpreter an error. On a GPU nobody looks, and nothing is touched that is not there."""
    case = Case("", 10, 32, 12, 3, 2)
    routing = _routing(case)._replace(expert_offsets=torch.tensor(offsets, dtype=torch.int32))
    values = _inputs(case, torch.float32) | {"topk_weights": routing.topk_weights}
    if launch.INTERPRETED:
        with pytest.raises(ValueError, match=r"expert_offsets: expected values that rise from 0 to N = 20, got \["):
            _ours(values, routing, "swiglu", device)
    else:
        _ours(values, routing, "swiglu", device)
        torch.cuda.synchronize()


def test_offsets_are_clamped_where_they_are_not_checked(device, monkeypatch):
    """What a GPU does with offsets that are wrong; the watch on memory accesses of this folder is the judge."""
    monkeypatch.setattr("moe_engine.kernels.expert_mlp.check_offsets", lambda *_: None)
    case = Case("", 10, 32, 12, 3, 2)
    for offsets in ([-7, 5, 9, 400], [0, 2**30, -(2**30), 20], [20, 20, 20, 0]):
        routing = _routing(case)._replace(expert_offsets=torch.tensor(offsets, dtype=torch.int32))
        values = _inputs(case, torch.float32) | {"topk_weights": routing.topk_weights}
        _run(_ours, values, torch.ones(10, 32), routing, "swiglu", device)
