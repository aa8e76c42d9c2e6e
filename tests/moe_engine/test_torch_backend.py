"""The expert operator by itself: the activation's limits, biases one at a time, what torch.library asks of it."""

import dataclasses

import pytest
import torch
from torch import Tensor

from moe_engine import MoEConfig, MoELayer, reference, torch_backend
from moe_engine.config import ACTIVATIONS, GATES
from moe_engine.testing import FP64_SUMS, assert_close, normal, parameters

CONFIG = MoEConfig(d_model=24, d_ff=20)


def _inputs(config: MoEConfig, tokens: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    values = {name: value.to(dtype) for name, value in parameters(MoELayer(config)).items()}
    return normal(tokens, config.d_model, seed=1, dtype=dtype), values


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
    x, values = _inputs(CONFIG, 37, torch.float64)
    grad_out = normal(37, 24, seed=2)
    routing = reference.moe(x, values, CONFIG)
    offsets, permutation = torch_backend.sort_by_expert(routing.topk_idx.int(), routing.expert_counts.int())
    given, results = {name: values[name] for name in ("w_up", "w_down", bias)}, []
    for run in ("expert_mlp", "reference"):
        leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
        if run == "reference":
            routers = {name: value for name, value in values.items() if "router" in name}
            out = reference.moe(x, routers | leaves, CONFIG).out
        else:
            weights = [leaves.get(name) for name in ("w_up", "b_up", "w_down", "b_down")]
            routed = (routing.topk_weights, permutation, offsets)
            out = torch_backend.expert_mlp(x, *weights, *routed, ACTIVATIONS["swiglu_oai"])
        results.append([out, *torch.autograd.grad(out, list(leaves.values()), grad_out)])
    for actual, exact in zip(*results, strict=True):
        assert_close(actual.detach(), exact.detach(), roundings=FP64_SUMS)


def _op_inputs(biases: bool, activation: str = "swiglu_oai", save: str = "h") -> tuple:
    config = dataclasses.replace(CONFIG, expert_bias=biases, activation=activation)
    x, values = _inputs(config, 9, torch.float32)
    idx, weights, stats = torch_backend.gate(x @ values["router.weight"].T, 2, GATES[0])
    offsets, permutation = torch_backend.sort_by_expert(idx, stats.expert_counts)
    floats = [x, values["w_up"], values.get("b_up"), values["w_down"], values.get("b_down"), weights.detach()]
    floats = [None if t is None else t.clone().requires_grad_() for t in floats]
    return (*floats, permutation, offsets, *ACTIVATIONS[activation], save)


@pytest.mark.parametrize("save", ["h", "x"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_opcheck_of_forward(biases, save):
    inputs = _op_inputs(biases, save=save)
    torch.library.opcheck(torch.ops.moe_engine.expert_mlp_torch.default, inputs)
    strided = inputs[0].detach().t().contiguous().t().requires_grad_()  # the fake outputs must not copy its strides
    torch.library.opcheck(torch.ops.moe_engine.expert_mlp_torch.default, (strided, *inputs[1:]))


@pytest.mark.parametrize("save", ["h", "x"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_opcheck_of_backward(biases, save):
    x, *others = (t.detach() if isinstance(t, Tensor) else t for t in _op_inputs(biases, save=save))
    h = normal(18 if save == "h" else 0, 40, dtype=torch.float32)
    args = (torch.ones_like(x), x, h, *others)
    torch.library.opcheck(torch.ops.moe_engine.expert_mlp_torch_backward.default, args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activation_in_blocks(activation, dtype, monkeypatch):
    act, h, grad_a = ACTIVATIONS[activation], 5 * normal(7, 40, dtype=dtype), normal(7, 20, seed=1, dtype=dtype)
    monkeypatch.setattr(torch_backend, "_blocks", lambda rows: [slice(0, 3), slice(3, 6), slice(6, 7)])
    a, grad_h, grad_scale = torch_backend._activation_backward(h, grad_a.clone(), act)
    assert torch.equal(a, torch_backend._activation(h, act))
    exact_h = h.double().requires_grad_()
    exact = reference.gated_activation(exact_h, act)
    (exact_grad,) = torch.autograd.grad(exact, exact_h, grad_a.double())
    roundings = FP64_SUMS if dtype == torch.float64 else 8
    assert_close(a, exact.detach(), roundings=roundings)
    assert_close(grad_h, exact_grad, roundings=roundings)
    assert_close(grad_scale, (grad_a.double() * exact.detach()).sum(1), roundings=roundings)


@pytest.mark.parametrize("rows, width", [(0, 8), (1, 8), (5, 1 << 18), (1000, 1 << 10), (1024, 1 << 10)])
def test_blocks_are_all_rows_once(rows, width):
    blocks = torch_backend._blocks(torch.empty(1, 1).expand(rows, width))
    assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))
    assert all((block.stop - block.start) * width <= max(width, 1 << 17) for block in blocks)
    assert len(torch_backend._blocks(torch.empty(max(rows, 1), width, device="meta"))) == 1


def test_a_thread_of_experts_computes_on_one_core():
    """At its first parallel operation a thread would take the process's number of threads, and each have a team."""
    torch.set_num_threads(3)
    numbers: set[int] = set()

    def look(_: int) -> None:
        torch.ones(1 << 17).add_(1)  # enough to be shared
        numbers.add(torch.get_num_threads())

    torch_backend.side_by_side(look, range(6), 3)
    assert numbers == {1} and torch.get_num_threads() == 3
