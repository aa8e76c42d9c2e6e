"""Gate, sorting by expert and auxiliary losses: the choice and its gradients against the reference, ties, NaN."""

import pytest
import torch
from torch import Tensor

from moe_engine import MoEConfig, reference, torch_backend
from moe_engine.config import GATES
from moe_engine.router import RouterStats, balance_loss, z_loss
from moe_engine.testing import FP64_SUMS, LOGITS, assert_close, normal, routing_logits


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


@pytest.mark.parametrize("kind", [kind for kind in LOGITS if kind != "nan"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(50, 8, 2), (1, 8, 1), (0, 8, 2), (9, 256, 8)])
def test_sort_by_expert(kind, tokens, experts, top_k):
    idx, _, stats = torch_backend.gate(routing_logits(kind, tokens, experts), top_k, GATES[0])
    offsets, permutation = torch_backend.sort_by_expert(idx, stats.expert_counts)
    flat = idx.flatten().tolist()
    assert permutation.tolist() == sorted(range(len(flat)), key=lambda slot: (flat[slot], slot))
    assert offsets.tolist() == [sum(expert < e for expert in flat) for e in range(experts + 1)]
    assert permutation.dtype == offsets.dtype == torch.int32


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
