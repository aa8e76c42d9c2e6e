"""Gating: choice, weights, statistics and their gradients against the PyTorch backend in fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_engine import torch_backend
from moe_engine.kernels.gating import MODES, Gating, block_tokens, gate
from moe_engine.testing import LOGITS, assert_budget_bites, assert_close, normal, routing_logits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CLEAN = [kind for kind in LOGITS if kind != "nan"]

# Budgets are those of a few fp32 roundings: exp and log are approximate on a GPU, and a sum of a handful of terms
# may be exact in the reference by luck.
ROUNDINGS = 8

pytestmark = [  # numpy's, on NaN in the interpreter
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning"),
]


def _exact(logits, top_k, mode, dtype=torch.float64, select_bias=None):
    """The same from the PyTorch backend, in Gating's order (without the offsets), on the CPU."""
    bias = None if select_bias is None else select_bias.cpu()
    idx, weights, stats = torch_backend.gate(logits.detach().cpu().to(dtype), top_k, mode, bias)
    return idx, weights, *stats


def _check_forward(logits, top_k, mode, select_bias=None):
    """Everything that `gate` returns, for logits without NaN."""
    got = gate(logits, top_k, mode, select_bias)
    exact = _exact(logits, top_k, mode, select_bias=select_bias)
    same = _exact(logits, top_k, mode, torch.float32, select_bias)
    for name, actual, e, s in zip(Gating._fields, got[:6], exact, same, strict=False):
        if name in ("topk_idx", "expert_counts"):
            assert actual.dtype == torch.int32 and torch.equal(actual.cpu(), e), name
        else:
            assert actual.dtype == torch.float32
            assert_close(actual, e, s, roundings=ROUNDINGS, name=name)
    _check_offsets(got, logits.shape[1])
    return got, exact, same


def _check_offsets(got, experts):
    """Counts, offsets and block offsets say the same about topk_idx."""
    idx = got.topk_idx.cpu().long()
    blocks = [torch.bincount(block.flatten(), minlength=experts) for block in idx.split(block_tokens(experts))]
    counts = torch.stack(blocks) if len(idx) else torch.zeros(0, experts, dtype=torch.long)
    assert torch.equal(got.expert_counts.cpu().long(), counts.sum(0))
    assert torch.equal(got.block_offsets.cpu().long(), counts.cumsum(0) - counts)
    offsets = got.expert_offsets.cpu().long()
    assert offsets[0] == 0 and torch.equal(offsets[1:], counts.sum(0).cumsum(0))


def _gradients(logits, top_k, mode, which, seed=3, function=gate, select_bias=None):
    """Gradient of logits from chosen outputs, given the same random gradients in any dtype."""
    logits = logits.detach().clone().requires_grad_()
    outputs = _named(function, logits, top_k, mode, None if select_bias is None else select_bias.to(logits.device))
    total = 0
    for number, name in enumerate(which):
        out = outputs[name]
        total = total + (out * normal(*out.shape, seed=seed + number).to(out)).sum()
    return torch.autograd.grad(total, logits)[0]


def _named(function, logits, top_k, mode, select_bias):
    if function is gate:
        return gate(logits, top_k, mode, select_bias)._asdict()
    _, weights, stats = torch_backend.gate(logits, top_k, mode, select_bias)
    return {"topk_weights": weights, **stats._asdict()}


def _check_gradients(logits, top_k, mode, which, select_bias=None):
    actual = _gradients(logits, top_k, mode, which, select_bias=select_bias)
    twin = {"function": torch_backend.gate, "select_bias": select_bias}
    exact = _gradients(logits.cpu().double(), top_k, mode, which, **twin)
    same = _gradients(logits.cpu().float(), top_k, mode, which, **twin).to(logits.dtype)
    assert actual.dtype == logits.dtype
    assert_close(actual, exact, same, roundings=ROUNDINGS if logits.dtype == torch.float32 else 0, name="grad_logits")
    return exact, same


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("experts, top_k", [(e, k) for e in (2, 5, 8, 60, 256) for k in (1, 2, 4) if k <= e])
def test_forward_matches_fp64(device, mode, experts, top_k):
    tokens = block_tokens(experts) + 1  # one past a block boundary
    for kind in CLEAN:
        logits = routing_logits(kind, tokens, experts, seed=experts).to(device)
        _, exact, same = _check_forward(logits, top_k, mode)
        if kind == "skewed" and top_k > 1:
            assert_budget_bites(exact[1], same[1])
            assert_budget_bites(exact[3], same[3])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "tokens, experts, top_k",
    [
        (1, 8, 2),  # a single token
        (7, 1, 1),  # a single expert
        (300, 3, 3),  # every expert chosen by every token; three blocks
        (41, 256, 8),  # the most experts and choices; two blocks of several tiles
        (128, 8, 2),  # a block exactly
    ],
)
def test_forward_of_hard_shapes(device, mode, tokens, experts, top_k):
    _check_forward(routing_logits("balanced", tokens, experts).to(device), top_k, mode)


def test_forward_of_many_blocks(device):
    # 17 blocks: one more than the reduction takes at once.
    _check_forward(routing_logits("skewed", 16 * block_tokens(256) + 1, 256).to(device), 1, MODES[0])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("mode", MODES)
def test_forward_of_16_bit_logits(device, dtype, mode):
    for kind in CLEAN:  # rounded to 16 bits, so that many logits are equal
        _check_forward(routing_logits(kind, 150, 24, dtype=dtype).to(device), 2, mode)


@pytest.mark.parametrize("mode", MODES)
def test_no_token(device, mode):
    logits = torch.zeros(0, 8, device=device, requires_grad=True)
    got = gate(logits, 2, mode)
    assert [tuple(t.shape) for t in got] == [(0, 2), (0, 2), (8,), (8,), (), (), (9,), (0, 8)]
    assert all((t == 0).all() for t in got)
    (got.topk_weights.sum() + got.prob_sum.sum() + got.lse_sq).backward()
    assert logits.grad.shape == (0, 8)


@given(
    tokens=st.integers(0, 200),
    experts=st.integers(1, 40),
    top_k=st.integers(1, 8),
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(CLEAN),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_drawn_shapes(device, tokens, experts, top_k, mode, kind, seed):
    top_k = min(top_k, experts)
    logits = routing_logits(kind, tokens, experts, seed=seed).to(device)
    _check_forward(logits, top_k, mode)
    # Without other experts, or with all of them chosen, gradients vanish in exact arithmetic: nothing to measure by.
    if top_k < experts and kind in ("balanced", "skewed"):
        _check_gradients(logits, top_k, mode, ["topk_weights", "prob_sum", "lse_sq"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens, experts, top_k", [(129, 8, 2), (1, 8, 2), (140, 5, 4), (33, 256, 4), (70, 60, 8)])
def test_gradients_match_fp64(device, dtype, mode, tokens, experts, top_k):
    for kind in ("balanced", "skewed", "duplicates"):
        logits = routing_logits(kind, tokens, experts, dtype=dtype).to(device)
        exact, same = _check_gradients(logits, top_k, mode, ["topk_weights", "prob_sum", "lse_sq"])
        if tokens > 1 and kind != "duplicates":
            assert_budget_bites(exact, same)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["topk_weights", "prob_sum", "lse_sq"])
def test_gradient_of_one_output_alone(device, mode, which):
    logits = routing_logits("balanced", 130, 8).to(device)
    assert_budget_bites(*_check_gradients(logits, 2, mode, [which]))


def test_gradients_of_a_hot_and_of_an_empty_expert(device):
    for kind in ("one_expert", "empty_expert"):
        logits = routing_logits(kind, 60, 8).to(device)
        for mode in MODES:
            _check_gradients(logits, 2, mode, ["topk_weights", "prob_sum", "lse_sq"])


def test_integers_and_entropy_have_no_gradient(device):
    got = gate(normal(5, 4, dtype=torch.float32).to(device).requires_grad_(), 2, MODES[0])
    assert [name for name, t in got._asdict().items() if t.requires_grad] == ["topk_weights", "prob_sum", "lse_sq"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_nan_tokens(device, dtype, mode):
    logits = routing_logits("nan", 140, 12, dtype=dtype)
    got, (idx, weights, *_) = gate(logits.to(device), 4, mode), _exact(logits, 4, mode)
    assert torch.equal(got.topk_idx.cpu(), idx)  # NaN comes first, as in torch.sort
    _check_offsets(got, 12)
    broken = logits.isnan().any(1)
    assert torch.equal(got.topk_weights.cpu().isnan(), weights.isnan())
    assert got.topk_weights.cpu()[broken].isnan().all()
    clean = ~broken
    exact, same = (_exact(logits[clean], 4, mode, d) for d in (torch.float64, torch.float32))
    assert_close(got.topk_weights.cpu()[clean], exact[1], same[1], roundings=ROUNDINGS)
    for name in ("prob_sum", "lse_sq", "entropy"):  # sums over all tokens: the training loop sees it
        assert getattr(got, name).isnan().all()
    gradient = _gradients(logits.to(device), 4, mode, ["topk_weights", "prob_sum", "lse_sq"]).cpu()
    assert gradient[clean].isfinite().all() and gradient[broken].isnan().any(1).all()


def test_order_of_special_values(device):
    nan, inf = math.nan, math.inf
    rows = [
        [0.0, -0.0, 0.0, -0.0],  # equal
        [-0.0, 0.0, 1e-45, -1e-45],  # the smallest there are
        [inf, nan, inf, nan],
        [-inf, -inf, -inf, -inf],
        [-inf, 3e38, inf, -3e38],
        [-nan, 1.0, nan, inf],
        [-1.0, -2.0, -1.0, -3.0],
    ]
    logits = torch.tensor(rows)
    logits[5, 0] = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32)  # a NaN with its sign bit set
    got = gate(logits.to(device), 4, MODES[0])
    assert torch.equal(got.topk_idx.cpu(), _exact(logits, 4, MODES[0])[0])
    # An infinite maximum leaves no number to subtract; a NaN is one.
    assert got.topk_weights.cpu().isfinite().all(1).tolist() == [True, True, False, False, False, False, True]


@pytest.mark.parametrize("mode", MODES)
def test_masked_experts(device, mode):
    logits = normal(40, 8, seed=4, dtype=torch.float32)
    logits[:, 5:] = -math.inf
    got, exact, _ = _check_forward(logits.to(device), 2, mode)
    assert exact[5].isfinite() and (got.prob_sum[5:] == 0).all()  # 0·log 0 = 0


@pytest.mark.parametrize("mode", MODES)
def test_logits_whose_exponentials_overflow(device, mode):
    logits = (200 * normal(40, 8, seed=5)).float().to(device)
    _check_forward(logits, 4, mode)
    _check_gradients(logits, 4, mode, ["topk_weights", "prob_sum", "lse_sq"])


def test_equal_logits_go_to_the_lower_expert(device):
    got = gate(torch.zeros(5, 60, device=device), 3, MODES[0])
    assert (got.topk_idx == torch.arange(3, dtype=torch.int32, device=device)).all()


def test_two_runs_agree_bit_for_bit(device):
    logits = routing_logits("skewed", 290, 8).to(device)
    for mode in MODES:
        for first, second in zip(gate(logits, 2, mode), gate(logits, 2, mode), strict=True):
            assert torch.equal(first, second)
        which = ["topk_weights", "prob_sum", "lse_sq"]
        assert torch.equal(_gradients(logits, 2, mode, which), _gradients(logits, 2, mode, which))


def test_launches_and_saved_tensors(device, launches):
    logits = normal(140, 8, dtype=torch.bfloat16).to(device).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        got = gate(logits, 2, MODES[0])
    assert sorted(saved) == [140 * 2 * 4, 140 * 2 * 4, 140 * 8 * 2]  # topk_idx, topk_weights, logits
    (got.topk_weights.sum() + got.prob_sum[0]).backward()
    if launches is not None:
        assert [launch.kernel for launch in launches] == ["_gate_fwd_kernel", "_gate_reduce_kernel", "_gate_bwd_kernel"]


# -- a bias for choosing


def _on_grid(values, step):
    """Multiples of the step: logits and biases on a grid are added exactly, so that every dtype has the same ties."""
    return torch.round(values / step) * step


def _biased(kind, tokens, experts, seed=0, dtype=torch.float32, spread=2.0):
    logits = _on_grid(routing_logits(kind, tokens, experts, seed=seed), 2**-10).to(dtype)
    return logits, _on_grid(spread * normal(experts, seed=seed + 1, dtype=torch.float32), 2**-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "tokens, experts, top_k",
    [
        (129, 8, 2),  # one past a block
        (1, 8, 2),  # a single token
        (7, 1, 1),  # a single expert
        (70, 3, 3),  # every expert chosen: the bias orders them
        (41, 256, 8),  # the most experts and choices; two blocks of several tiles
        (70, 60, 4),  # no power of two
        (0, 8, 2),
    ],
)
def test_forward_with_a_bias(device, mode, tokens, experts, top_k):
    for kind in CLEAN if experts < 256 else ("balanced", "duplicates"):
        for dtype in DTYPES if experts <= 8 else DTYPES[:1]:
            logits, bias = _biased(kind, tokens, experts, dtype=dtype)
            _check_forward(logits.to(device), top_k, mode, bias.to(device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_with_a_bias(device, dtype, mode):
    for tokens, experts, top_k in ((129, 8, 2), (40, 60, 4), (33, 256, 8)):
        logits, bias = _biased("balanced", tokens, experts, dtype=dtype)
        which = ["topk_weights", "prob_sum", "lse_sq"]
        assert_budget_bites(*_check_gradients(logits.to(device), top_k, mode, which, bias.to(device)))


@given(
    tokens=st.integers(0, 150),
    experts=st.integers(1, 40),
    top_k=st.integers(1, 8),
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(CLEAN),
    spread=st.sampled_from([0.0, 0.05, 2.0, 50.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_drawn_biases(device, tokens, experts, top_k, mode, kind, spread, seed):
    logits, bias = _biased(kind, tokens, experts, seed=seed, spread=spread)
    _check_forward(logits.to(device), min(top_k, experts), mode, bias.to(device))


@pytest.mark.parametrize("mode", MODES)
def test_a_bias_chooses_and_does_nothing_else(device, mode):
    logits, bias = _biased("balanced", 140, 8)
    plain, biased = gate(logits.to(device), 2, mode), gate(logits.to(device), 2, mode, bias.to(device))
    assert (plain.topk_idx != biased.topk_idx).any(1).float().mean() > 0.3
    for name in ("prob_sum", "lse_sq", "entropy"):
        same = _exact(logits, 2, mode, torch.float32)[Gating._fields.index(name)]
        exact = _exact(logits, 2, mode)[Gating._fields.index(name)]  # of the logits alone
        assert_close(getattr(biased, name), exact, same, roundings=ROUNDINGS, name=name)
    # What a bias that took part in the weights would give is told apart.
    shifted = gate((logits + bias).to(device), 2, mode)
    assert torch.equal(shifted.topk_idx, biased.topk_idx)
    assert (shifted.topk_weights - biased.topk_weights).abs().max() > 0.1
    # None and zeros choose alike, and a shift of all experts alters nothing.
    for constant in (0.0, 3.0):
        same_choice = gate(logits.to(device), 2, mode, torch.full((8,), constant, device=device))
        assert torch.equal(same_choice.topk_idx, plain.topk_idx)
        _check_forward(logits.to(device), 2, mode, torch.full((8,), constant, device=device))


def test_equal_biased_logits_go_to_the_lower_expert(device):
    logits, bias = torch.zeros(5, 60), torch.zeros(60)
    logits[:, 7], bias[7], bias[3] = 1.5, -1.5, 0.25  # 7 ties with all but 3
    got = gate(logits.to(device), 4, MODES[0], bias.to(device))
    assert (got.topk_idx.cpu() == torch.tensor([3, 0, 1, 2])).all()
    bias[7] = -1.25
    assert (gate(logits.to(device), 4, MODES[0], bias.to(device)).topk_idx.cpu() == torch.tensor([3, 7, 0, 1])).all()


@pytest.mark.parametrize("mode", MODES)
def test_nan_tokens_and_infinite_logits_with_a_bias(device, mode):
    logits, bias = _biased("nan", 140, 12)
    logits[5] = torch.tensor([-math.inf] * 10 + [0.0, 1.0])
    logits[6, 3] = math.inf
    got = gate(logits.to(device), 4, mode, bias.to(device))
    idx, weights, *_ = _exact(logits, 4, mode, select_bias=bias)
    assert torch.equal(got.topk_idx.cpu(), idx)
    _check_offsets(got, 12)
    assert torch.equal(got.topk_weights.cpu().isnan(), weights.isnan())
    assert weights[logits.isnan().any(1)].isnan().all() and weights[5].isfinite().all()
    clean = ~weights.isnan().any(1)
    same = _exact(logits, 4, mode, torch.float32, bias)[1]
    assert_close(got.topk_weights.cpu()[clean], weights[clean], same[clean], roundings=ROUNDINGS)


def test_a_bias_that_outweighs_every_logit_leaves_finite_weights(device):
    """The chosen logits lie 200 below the largest, where the exponential of the difference is 0 in fp32."""
    logits = torch.tensor([[200.0, 0.0, 1.0, -1.0]], device=device)
    bias = torch.tensor([-1000.0, 0.0, 0.0, 0.0], device=device)
    got, _, _ = _check_forward(logits, 2, MODES[0], bias)
    assert got.topk_idx.tolist() == [[2, 1]] and got.topk_weights.sum().item() == pytest.approx(1)
    assert (gate(logits, 2, MODES[1], bias).topk_weights == 0).all()


def test_a_bias_takes_no_launch_and_is_not_saved(device, launches):
    logits, bias = _biased("balanced", 140, 8)
    logits, saved = logits.to(device).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        got = gate(logits, 2, MODES[0], bias.to(device))
    assert sorted(saved) == [140 * 2 * 4, 140 * 2 * 4, 140 * 8 * 4]
    (got.topk_weights.sum() + got.prob_sum[0]).backward()
    if launches is not None:
        assert [launch.kernel for launch in launches] == ["_gate_fwd_kernel", "_gate_reduce_kernel", "_gate_bwd_kernel"]


def test_opcheck_with_a_bias(device):
    logits, bias = _biased("balanced", 130, 8)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    arguments = logits.to(device).requires_grad_(), 2, True, bias.to(device)
    torch.library.opcheck(torch.ops.moe_engine.gate.default, arguments, test_utils=checks)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("tokens", [0, 130])
def test_opcheck(device, renormalise, tokens):
    logits = normal(tokens, 8, dtype=torch.float32).to(device)
    # Without test_aot_dispatch_dynamic, which cannot add up outputs of which the first is an integer;
    # test_compiles_whole is in its place.
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    arguments = logits.clone().requires_grad_(), 2, renormalise
    torch.library.opcheck(torch.ops.moe_engine.gate.default, arguments, test_utils=checks)
    got = gate(logits, 2, MODES[0])
    grads = torch.ones_like(got.topk_weights), None, torch.ones_like(got.lse_sq)
    args = (logits, got.topk_idx, got.topk_weights, *grads, renormalise)
    torch.library.opcheck(torch.ops.moe_engine.gate_backward.default, args)


def test_fake_tensors():
    with FakeTensorMode():
        logits = torch.empty(300, 60, dtype=torch.bfloat16, requires_grad=True)
        got = gate(logits, 4, MODES[1])
        (got.topk_weights.sum() + got.lse_sq).backward()
    assert got.block_offsets.shape == (-(-300 // block_tokens(60)), 60)
    assert logits.grad.shape == (300, 60) and logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_compiles_whole(device, mode, dynamic):
    def loss(logits):
        got = gate(logits, 2, mode)
        return (got.topk_weights * got.topk_idx).sum() + got.prob_sum.square().sum() + got.lse_sq

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    gradients = []
    for function in (loss, compiled):
        logits = routing_logits("balanced", 140, 8).to(device).requires_grad_()
        value = function(logits)
        gradients.append((value.detach(), *torch.autograd.grad(value, logits)))
    for eager, traced in zip(*gradients, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(8), 2, MODES[0]), r"logits: expected shape \(T, E\), got \(8,\)"),
        ((torch.zeros(4, 8, dtype=torch.float64), 2, MODES[0]), "logits: expected float32 or float16 or bfloat16"),
        ((torch.zeros(8, 4).t(), 2, MODES[0]), "logits: expected a contiguous tensor"),
        ((torch.zeros(4, 257), 2, MODES[0]), "logits: expected 1 to 256 experts, got 257"),
        ((torch.zeros(4, 0), 1, MODES[0]), "logits: expected 1 to 256 experts, got 0"),
        ((torch.zeros(4, 3), 4, MODES[0]), "top_k: expected 1 to 3, got 4"),
        ((torch.zeros(4, 16), 9, MODES[0]), "top_k: expected 1 to 8, got 9"),
        ((torch.zeros(4, 16), 0, MODES[0]), "top_k: expected 1 to 8, got 0"),
        ((torch.zeros(4, 16), 2, "softmax"), "mode: expected softmax_over_topk or softmax_then_topk, got 'softmax'"),
        ((torch.zeros(4, 16), 2, MODES[0], torch.zeros(8)), r"select_bias: expected shape \(16,\), got \(8,\)"),
        ((torch.zeros(4, 16), 2, MODES[0], torch.zeros(16).half()), "select_bias: expected float32, got torch.float16"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        gate(*arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no second device that holds data")
def test_wrong_device():
    with pytest.raises(ValueError, match="logits: expected a cuda tensor"):
        gate(torch.zeros(4, 8), 2, MODES[0])
