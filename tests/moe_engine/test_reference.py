"""The reference against itself: numbers done by hand, and its autograd against finite differences.

Whether its understanding of gpt-oss and Mixtral is right is a question for transformers, see test_model.py.
"""

import functools
import math

import pytest
import torch

from moe_engine import ModelConfig, MoEConfig, MoELayer, reference
from moe_engine.config import ACTIVATIONS
from moe_engine.testing import normal, parameters

gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)  # along random directions, not every one


@pytest.mark.parametrize("gate", ["softmax_over_topk", "softmax_then_topk"])
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_moe_gradients_against_finite_differences(gate, activation, biases):
    config = MoEConfig(3, 2, 4, 2, activation, biases, biases, gate)
    params = parameters(MoELayer(config))
    params["w_up"] *= 6
    names, x = list(params), normal(6, 3)
    assert 0.02 < ((x @ params["w_up"]).abs() > 7).double().mean() < 0.5  # swiglu_oai's limit matters, not everywhere

    def outputs(x, *values):
        result = reference.moe(x, dict(zip(names, values, strict=True)), config)
        return result.out, result.topk_weights, result.prob_sum, result.lse_sq

    assert gradcheck(outputs, (x.requires_grad_(), *(v.requires_grad_() for v in params.values())))


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no sinks"])
@pytest.mark.parametrize("window", [0, 3, 1, 20])
def test_attention_gradients_against_finite_differences(window, sinks):
    inputs = [normal(6, heads, 4, seed=heads).requires_grad_() for heads in (4, 2, 1)]
    q, k, v = inputs[0], inputs[1], normal(6, 2, 4, seed=9).requires_grad_()
    sink = normal(4, seed=5).requires_grad_() if sinks else None
    assert gradcheck(reference.attention, (q, k, v, sink, window))


def test_attention_by_hand():
    # Two tokens, one head, d = 1. Scores are 0·k and 1·k; values 1 and 3.
    q, k, v = (torch.tensor(t, dtype=torch.float64).view(2, 1, 1) for t in ([0.0, 1.0], [5.0, math.log(3)], [1.0, 3.0]))
    e5 = math.exp(5)
    out = reference.attention(q, k, v, None, 0).flatten()
    torch.testing.assert_close(out, torch.tensor([1.0, (e5 + 3 * 3) / (e5 + 3)], dtype=torch.float64))
    # A sink of ln 2 adds 2 to every denominator and nothing above it.
    sinks = torch.tensor([math.log(2)], dtype=torch.float64)
    out = reference.attention(q, k, v, sinks, 0).flatten()
    torch.testing.assert_close(out, torch.tensor([1 / 3, (e5 + 9) / (e5 + 3 + 2)], dtype=torch.float64))
    # A window of one sees itself alone.
    out = reference.attention(q, k, v, sinks, 1).flatten()
    torch.testing.assert_close(out, torch.tensor([1 / 3, 9 / 5], dtype=torch.float64))


def test_query_heads_share_consecutive_key_heads():
    q, k = normal(3, 4, 2, seed=1), normal(3, 2, 2, seed=2)
    v = torch.tensor([10.0, 20.0], dtype=torch.float64)[None, :, None].expand(3, 2, 2)
    out = reference.attention(q, k, v, None, 0)
    torch.testing.assert_close(out[..., 0], torch.tensor([10.0, 10.0, 20.0, 20.0], dtype=torch.float64).expand(3, 4))


def test_moe_by_hand():
    # D = F = 1, three experts, the two likeliest of logits (0, ln 2, ln 4): weights 1/3 and 2/3.
    config = MoEConfig(1, 1, 3, 2, "swiglu")
    one = torch.ones(3, 1, 1, dtype=torch.float64)
    params = {
        "router.weight": torch.tensor([[0.0], [math.log(2)], [math.log(4)]], dtype=torch.float64),
        "w_up": torch.tensor([[[1.0, 2.0]]] * 3, dtype=torch.float64),  # gate = x, up = 2x
        "w_down": one * torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)[:, None, None],
        "b_down": torch.tensor([[7.0], [0.5], [0.25]], dtype=torch.float64),
    }
    result = reference.moe(torch.ones(1, 1, dtype=torch.float64), params, config)
    a = 2 / (1 + math.exp(-1))
    assert result.topk_idx.tolist() == [[2, 1]]
    assert result.topk_weights[0].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert result.out.item() == pytest.approx(2 / 3 * (a + 0.25) + 1 / 3 * (10 * a + 0.5))
    assert result.expert_counts.tolist() == [0, 1, 1]
    assert result.prob_sum.tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert result.lse_sq.item() == pytest.approx(math.log(7) ** 2)
    assert result.entropy.item() == pytest.approx(-sum(p * math.log(p) for p in (1 / 7, 2 / 7, 4 / 7)))
    # The other gate keeps the probabilities of all.
    config = MoEConfig(1, 1, 3, 2, "swiglu", gate="softmax_then_topk")
    result = reference.moe(torch.ones(1, 1, dtype=torch.float64), params, config)
    assert result.topk_weights[0].tolist() == pytest.approx([4 / 7, 2 / 7])


def test_clipped_activation_by_hand_and_its_gradient_at_the_limits():
    act = ACTIVATIONS["swiglu_oai"]
    sigmoid = 1 / (1 + math.exp(-1.702 * 7))
    gate_up = [(7.0, 2.0), (8.0, 2.0), (-9.0, 7.0), (1.0, -7.0), (1.0, 7.5), (1.0, -7.5)]
    h = torch.tensor(gate_up, dtype=torch.float64).requires_grad_()
    out = reference.gated_activation(h, act).squeeze(1)
    assert out[0].item() == out[1].item() == pytest.approx(7 * sigmoid * 3)
    assert out[2].item() == pytest.approx(-9 / (1 + math.exp(1.702 * 9)) * 8)  # a low gate is not clipped
    assert out[3].item() == out[5].item() == pytest.approx(1 / (1 + math.exp(-1.702)) * -6)
    (grad,) = torch.autograd.grad(out.sum(), h)
    assert (grad != 0).tolist() == [
        [True, True],  # at the limit the gradient passes
        [False, True],
        [True, True],
        [True, True],
        [True, False],
        [True, False],
    ]


def test_plain_swiglu_has_no_limit():
    h = torch.tensor([[20.0, -30.0]], dtype=torch.float64).requires_grad_()
    out = reference.gated_activation(h, ACTIVATIONS["swiglu"])
    assert out.item() == pytest.approx(-600, rel=1e-8)
    assert (torch.autograd.grad(out, h)[0] != 0).all()


def test_norm_and_rotation_gradients_against_finite_differences():
    x, weight = normal(3, 4).requires_grad_(), normal(4, seed=1).requires_grad_()
    assert gradcheck(lambda x, w: reference.rms_norm(x, w, 1e-2), (x, weight))
    frequencies, scale = reference.rope_frequencies(ModelConfig(8, 1, 8, 2, 1, 4, 8))
    assert gradcheck(lambda x: reference.rotate(x, frequencies, scale), (normal(5, 2, 4).requires_grad_(),))


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    config = ModelConfig(8, 1, 8, 2, 1, 8, 8, rope_factor=1.0)
    frequencies, scale = reference.rope_frequencies(config)
    assert scale == 1 and frequencies[0] == 1
    x = normal(1, 1, 8).expand(9, 1, 8)
    y = normal(1, 1, 8, seed=1).expand(9, 1, 8)
    turned_x, turned_y = reference.rotate(x, frequencies, scale), reference.rotate(y, frequencies, scale)
    torch.testing.assert_close(turned_x.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned_x[0], x[0])
    scores = turned_x[:, 0] @ turned_y[:, 0].T
    for offset in range(-4, 5):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert (scores[0, 1] - scores[0, 2]).abs() > 1e-3
