"""The router's losses against moe_engine.router in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_engine import torch_backend
from moe_engine.kernels.aux_loss import aux_losses
from moe_engine.router import RouterStats, balance_loss, z_loss
from moe_engine.testing import assert_budget_bites, assert_close, normal, routing_logits

ROUNDINGS = 8  # a handful of fp32 products, sums and quotients


def _statistics(leading, experts, top_k, tokens, seed=0):
    """expert_counts, prob_sum and lse_sq of layers with skewed routing, stacked into the leading dimensions."""
    layers = []
    for layer in range(int(torch.tensor(leading).prod())):
        logits = routing_logits("skewed", tokens, experts, seed=seed + layer)
        layers.append(torch_backend.gate(logits, top_k, "softmax_over_topk")[2][:3])
    return [torch.stack(values).view((*leading, *values[0].shape)) for values in zip(*layers, strict=True)]


def _twin(counts, prob_sum, lse_sq, top_k, global_counts=None):
    stats = RouterStats(counts, prob_sum, lse_sq, torch.zeros_like(lse_sq))
    return balance_loss(stats, top_k, global_counts), z_loss(stats, top_k)


def _run(function, dtype, counts, prob_sum, lse_sq, top_k, global_counts=None):
    """balance, z, and the gradients of prob_sum and lse_sq for given gradients of the losses."""
    leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (prob_sum, lse_sq)]
    losses = function(counts, *leaves, top_k, global_counts)
    grads = [normal(*loss.shape, seed=7 + i).to(loss) for i, loss in enumerate(losses)]
    return [t.detach().cpu() for t in (*losses, *torch.autograd.grad(losses, leaves, grads))]


def _check(device, counts, prob_sum, lse_sq, top_k, global_counts=None):
    arguments = counts, prob_sum, lse_sq, top_k, global_counts
    on_device = [t.to(device) if isinstance(t, torch.Tensor) else t for t in arguments]
    results = [
        _run(aux_losses, torch.float32, *on_device),
        _run(_twin, torch.float64, *arguments),
        _run(_twin, torch.float32, *arguments),
    ]
    for name, actual, exact, same in zip(("balance", "z", "grad_prob_sum", "grad_lse_sq"), *results, strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual, exact, same, roundings=ROUNDINGS, name=name)
    return results


@pytest.mark.parametrize("experts, top_k", [(1, 1), (2, 1), (5, 4), (8, 2), (60, 4), (256, 8)])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)  # one layer, a stack, a stack of stacks
def test_losses_and_gradients_match_fp64(device, experts, top_k, leading):
    results = _check(device, *_statistics(leading, experts, top_k, tokens=50), top_k)
    if leading and experts > 1:
        for exact, same in zip(*results[1:], strict=True):
            assert_budget_bites(exact.flatten(), same.flatten())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_global_counts_replace_the_counts_in_the_share_alone(device, dtype):
    counts, prob_sum, lse_sq = _statistics((3,), 8, 2, tokens=50)
    others = _statistics((3,), 8, 2, tokens=700, seed=10)[0].flip(-1)  # of other ranks, skewed the other way
    with_global = _check(device, counts, prob_sum, lse_sq, 2, (counts + others).to(dtype))
    without = _check(device, counts, prob_sum, lse_sq, 2)
    assert (with_global[0][0] < 0.8 * without[0][0]).all()
    assert torch.equal(with_global[0][1], without[0][1])


def test_counts_beyond_32_bits(device):
    counts, prob_sum, lse_sq = _statistics((2,), 8, 2, tokens=50)
    largest = torch.full((2, 8), 2**31 - 1, dtype=torch.int32)
    _check(device, largest, prob_sum, lse_sq, 2)
    _check(device, counts, prob_sum, lse_sq, 2, largest)
    _check(device, counts, prob_sum, lse_sq, 2, counts.long() << 33)


def test_values_with_a_name(device):
    # Balanced: 1. All tokens to the same 2 of 8 experts with all the probability: E/K = 4.
    counts = torch.tensor([[16] * 8, [64, 64, 0, 0, 0, 0, 0, 0]], dtype=torch.int32, device=device)
    prob_sum = torch.tensor([[8.0] * 8, [32.0, 32.0, 0, 0, 0, 0, 0, 0]], device=device)
    balance, z = aux_losses(counts, prob_sum, torch.tensor([128.0, 32.0], device=device), 2)
    assert balance.tolist() == [1.0, 4.0]
    assert z.tolist() == [2.0, 0.5]


def test_no_token_and_no_layer(device):
    counts = torch.zeros(2, 8, dtype=torch.int32, device=device)
    prob_sum = torch.zeros(2, 8, device=device, requires_grad=True)
    lse_sq = torch.zeros(2, device=device, requires_grad=True)
    balance, z = aux_losses(counts, prob_sum, lse_sq, 2)
    assert balance.tolist() == z.tolist() == [0.0, 0.0]
    (balance + z).sum().backward()
    assert (prob_sum.grad == 0).all() and lse_sq.grad.tolist() == [1.0, 1.0]
    empty = aux_losses(counts[:0], prob_sum.detach()[:0], lse_sq.detach()[:0], 2)
    assert [t.shape for t in empty] == [(0,), (0,)]


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_loss_alone(device, which):
    counts, prob_sum, lse_sq = _statistics((3,), 8, 2, tokens=50)
    gradients = []
    for function, dtype in ((aux_losses, torch.float32), (_twin, torch.float64)):
        leaves = [t.clone().to(device, dtype).detach().requires_grad_() for t in (prob_sum, lse_sq)]
        function(counts.to(device), *leaves, 2)[which].sum().backward()  # hands strides of 0 to the backward
        gradients.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
    for actual, exact in zip(*gradients, strict=True):
        assert_close(actual, exact, roundings=ROUNDINGS)
    assert gradients[0][which].any() and not gradients[0][1 - which].any()


@given(
    experts=st.integers(1, 256),
    top_k=st.integers(1, 8),
    layers=st.integers(1, 4),
    tokens=st.integers(1, 100),
    seed=st.integers(0, 1000),
    is_global=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_drawn_shapes(device, experts, top_k, layers, tokens, seed, is_global):
    top_k = min(top_k, experts)
    counts, prob_sum, lse_sq = _statistics((layers,), experts, top_k, tokens, seed)
    _check(device, counts, prob_sum, lse_sq, top_k, counts.flip(-1) if is_global else None)


def test_two_runs_agree_bit_for_bit(device):
    arguments = [t.to(device) for t in _statistics((5,), 60, 4, tokens=50)]
    first, second = (_run(aux_losses, torch.float32, *arguments, 4) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_one_launch_each_way(device, launches):
    if launches is None:
        pytest.skip("launches are counted in the interpreter")
    _run(aux_losses, torch.float32, *_statistics((5,), 8, 2, tokens=50), 2)
    assert [launch.kernel for launch in launches] == ["_aux_fwd_kernel", "_aux_bwd_kernel"]


@pytest.mark.parametrize("leading", [(), (3,), (0,)], ids=str)
@pytest.mark.parametrize("is_global", [True, False])
def test_opcheck(device, leading, is_global):
    counts = torch.ones(*leading, 8, dtype=torch.int32, device=device)
    prob_sum = torch.ones(*leading, 8, device=device, requires_grad=True)
    lse_sq = torch.ones(leading, device=device, requires_grad=True)
    global_counts = counts.long() if is_global else None
    ops = torch.ops.moe_engine
    torch.library.opcheck(ops.aux_losses.default, (counts, global_counts, prob_sum, lse_sq, 2))
    torch.library.opcheck(ops.aux_losses_backward.default, (counts, global_counts, lse_sq.detach(), None, 2))


def test_fake_tensors():
    with FakeTensorMode():
        prob_sum, lse_sq = torch.empty(24, 8, requires_grad=True), torch.empty(24, requires_grad=True)
        balance, z = aux_losses(torch.empty(24, 8, dtype=torch.int32), prob_sum, lse_sq, 2)
        (balance + z).sum().backward()
    assert balance.shape == z.shape == lse_sq.grad.shape == (24,) and prob_sum.grad.shape == (24, 8)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(device, dynamic):
    def losses(counts, prob_sum, lse_sq):
        balance, z = aux_losses(counts, prob_sum, lse_sq, 2)
        return balance, z + balance

    arguments = [t.to(device) for t in _statistics((3,), 8, 2, tokens=50)]
    compiled = torch.compile(losses, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    eager, traced = (
        _run(lambda c, p, q, k, g, f=f: f(c, p, q), torch.float32, *arguments, 2) for f in (losses, compiled)
    )
    for a, b in zip(eager, traced, strict=True):
        assert torch.equal(a, b)


def _arguments(**changes):
    good = {
        "expert_counts": torch.zeros(3, 8, dtype=torch.int32),
        "prob_sum": torch.zeros(3, 8),
        "lse_sq": torch.zeros(3),
        "top_k": 2,
        "global_counts": None,
    }
    return good | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"expert_counts": torch.zeros((), dtype=torch.int32)}, r"expert_counts: expected shape \(…, E\), got \(\)"),
        ({"expert_counts": torch.zeros(3, 0, dtype=torch.int32)}, r"expert_counts: expected shape \(…, E\)"),
        ({"expert_counts": torch.zeros(3, 8)}, "expert_counts: expected int32, got torch.float32"),
        ({"expert_counts": torch.zeros(8, 3, dtype=torch.int32).t()}, "expert_counts: expected a contiguous tensor"),
        ({"prob_sum": torch.zeros(3, 7)}, r"prob_sum: expected shape \(3, 8\), got \(3, 7\)"),
        ({"prob_sum": torch.zeros(3, 8).double()}, "prob_sum: expected float32"),
        ({"prob_sum": torch.zeros(3, 8, device="meta")}, "prob_sum: expected a tensor on cpu, got meta"),
        ({"lse_sq": torch.zeros(3, 1)}, r"lse_sq: expected shape \(3,\), got \(3, 1\)"),
        ({"lse_sq": torch.zeros(3).half()}, "lse_sq: expected float32"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"global_counts": torch.zeros(2, 8, dtype=torch.int32)}, r"global_counts: expected shape \(3, 8\)"),
        ({"global_counts": torch.zeros(3, 8)}, "global_counts: expected int32 or int64, got torch.float32"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        aux_losses(**_arguments(**changes))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no second device that holds data")
def test_wrong_device():
    with pytest.raises(ValueError, match="expert_counts: expected a cuda tensor"):
        aux_losses(**_arguments())
