"""The counting sort against a general one, permute and combine against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_engine import torch_backend
from moe_engine.kernels.gating import MODES, block_tokens, gate
from moe_engine.kernels.permutation import combine, combine_rows, permute, sort_by_expert
from moe_engine.testing import LOGITS, assert_budget_bites, assert_close, normal, routing_logits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, on NaN in the interpreter


def _counted(topk_idx, experts):
    """expert_offsets and block_offsets of any `(T, K)` indices, not only the gate's; no expert, no count."""
    hits = (topk_idx.unsqueeze(-1) == torch.arange(experts)).sum(1)
    blocks = [block.sum(0) for block in hits.split(block_tokens(experts))] if len(hits) else []
    counts = torch.stack(blocks) if blocks else torch.zeros(0, experts, dtype=torch.long)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.sum(0).cumsum(0)])
    return offsets.int(), (counts.cumsum(0) - counts).int()


def _check_sort(topk_idx, experts, expert_offsets, block_offsets):
    """Equal to a stable general sort."""
    permutation, inverse = (t.cpu() for t in sort_by_expert(topk_idx, expert_offsets, block_offsets))
    counts = torch.bincount(topk_idx.cpu().flatten().long(), minlength=experts).int()
    offsets, exact = torch_backend.sort_by_expert(topk_idx.cpu(), counts)
    assert torch.equal(expert_offsets.cpu(), offsets)
    assert torch.equal(permutation, exact)
    assert torch.equal(inverse[exact.long()], torch.arange(exact.numel(), dtype=torch.int32))


def _routing(tokens, top_k, device, experts=8, seed=0):
    """topk_weights, permutation and inverse of skewed logits."""
    logits = routing_logits("skewed", tokens, experts, seed=seed).to(device)
    got = gate(logits, top_k, MODES[1])
    return got.topk_weights, *sort_by_expert(got.topk_idx, got.expert_offsets, got.block_offsets)


def _combine_twin(y, weights, inverse):
    rows = y[inverse.long()].view(*weights.shape, y.shape[1])
    return (weights.unsqueeze(-1) * rows.to(weights.dtype)).sum(1).to(y.dtype)


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize(
    "tokens, experts, top_k",
    [
        (0, 8, 2),  # nothing to sort
        (1, 8, 2),  # a single token
        (129, 8, 2),  # one past a block boundary
        (300, 2, 1),  # three blocks
        (140, 5, 4),  # every expert but one
        (70, 60, 4),  # experts that are not a power of two
        (33, 256, 8),  # the most experts and choices, two blocks
    ],
)
def test_sort_matches_a_stable_sort(device, kind, tokens, experts, top_k):
    got = gate(routing_logits(kind, tokens, experts).to(device), top_k, MODES[0])
    _check_sort(got.topk_idx, experts, got.expert_offsets, got.block_offsets)


@given(tokens=st.integers(0, 200), experts=st.integers(1, 40), top_k=st.integers(1, 8), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_sort_of_drawn_indices(device, tokens, experts, top_k, seed):
    # An expert may come twice in a token here: the sort does not need the gate's promise that it does not.
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(experts, (tokens, min(top_k, experts)), generator=generator, dtype=torch.int32)
    _check_sort(idx.to(device), experts, *(t.to(device) for t in _counted(idx, experts)))


def test_sort_of_indices_that_are_no_experts(device):
    idx = torch.randint(5, (150, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    idx[::7, 0], idx[3::11, 1], idx[5, 0], idx[6, 1] = -1, 5, 2**31 - 1, -(2**31)
    offsets, block_offsets = _counted(idx, 5)
    permutation, inverse = (t.cpu() for t in sort_by_expert(*(t.to(device) for t in (idx, offsets, block_offsets))))
    flat = idx.flatten()
    valid = (flat >= 0) & (flat < 5)
    slots = torch.arange(300, dtype=torch.int32)[valid]
    exact = slots[flat[valid].sort(stable=True).indices]
    assert torch.equal(permutation[: len(exact)], exact)
    assert (permutation[len(exact) :] == torch.iinfo(torch.int32).max).all()  # not written: what conftest left there
    assert torch.equal(inverse[exact.long()], torch.arange(len(exact), dtype=torch.int32))
    assert (inverse[~valid] == 0).all()


def test_sort_with_offsets_beyond_the_end(device):
    idx = torch.zeros(40, 1, dtype=torch.int32, device=device)
    offsets = torch.full((3,), 30, dtype=torch.int32, device=device)
    permutation, inverse = sort_by_expert(idx, offsets, torch.zeros(1, 2, dtype=torch.int32, device=device))
    assert permutation[30:].tolist() == list(range(10))  # and conftest sees that nothing went behind it
    assert inverse.tolist() == [*range(30, 40), *[0] * 30]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, columns, top_k",
    [
        (1, 1, 1),  # the least
        (37, 24, 2),  # tiles of many tokens
        (70, 130, 4),  # two columns past a power of two
        (5, 1100, 2),  # two blocks of columns, the second ragged
        (33, 64, 8),  # the most choices
    ],
)
def test_permute_and_its_gradient(device, dtype, tokens, columns, top_k):
    _, permutation, inverse = _routing(tokens, top_k, device)
    x = normal(tokens, columns, dtype=dtype).to(device).requires_grad_()
    rows = permute(x, permutation, inverse)
    token_of = permutation.long() // top_k
    assert torch.equal(rows, x[token_of])  # copied, so equal
    grad_rows = normal(*rows.shape, seed=1, dtype=dtype).to(device)
    (grad_x,) = torch.autograd.grad(rows, x, grad_rows)
    exact, same = (
        torch.zeros(tokens, columns, dtype=d, device=device).index_add(0, token_of, grad_rows.to(d))
        for d in (torch.float64, torch.float32)
    )
    assert_close(grad_x, exact, same.to(dtype), roundings=top_k)
    if tokens > 1:
        assert_budget_bites(exact.cpu(), same.to(dtype).cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, columns, top_k", [(1, 1, 1), (37, 24, 2), (70, 300, 4), (5, 1100, 2), (33, 64, 8)])
def test_combine_and_its_gradients(device, dtype, tokens, columns, top_k):
    weights, _, inverse = _routing(tokens, top_k, device)
    y = normal(tokens * top_k, columns, seed=1, dtype=dtype).to(device)
    grad_out = normal(tokens, columns, seed=2, dtype=dtype).to(device)
    results = []
    for function, y_dtype, weight_dtype in (
        (combine, dtype, torch.float32),
        (_combine_twin, torch.float64, torch.float64),
        (_combine_twin, dtype, torch.float32),
    ):
        leaves = y.to(y_dtype).requires_grad_(), weights.detach().to(weight_dtype).requires_grad_()
        out = function(*leaves, inverse)
        results.append((out, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))))
    for name, actual, exact, same in zip(("out", "grad_y", "grad_weights"), *results, strict=True):
        assert actual.dtype == (torch.float32 if name == "grad_weights" else dtype)
        # Sums of at most 8 products, and one of D of them, each in another order than the reference's.
        assert_close(actual, exact, same, roundings=8, name=name)
        if tokens > 1:
            assert_budget_bites(exact.detach().cpu(), same.detach().cpu())


@given(
    tokens=st.integers(0, 40),
    columns=st.integers(1, 300),
    top_k=st.integers(1, 5),
    parts=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_drawn_shapes(device, tokens, columns, top_k, parts, dtype, seed):
    weights, permutation, inverse = _routing(tokens, top_k, device, seed=seed)
    x = normal(tokens, columns, seed=seed, dtype=dtype).to(device)
    rows = permute(x, permutation, inverse)
    assert torch.equal(rows, x[permutation.long() // top_k])
    partials = normal(parts, tokens * top_k, seed=seed, dtype=torch.float32).to(device)
    out, sums = combine_rows(rows, weights, inverse, top_k, partials)
    exact, same = (
        _combine_twin(rows.to(d), weights.to(w), inverse) for d, w in ((torch.float64,) * 2, (dtype, torch.float32))
    )
    assert_close(out, exact, same, roundings=8)
    assert_close(sums, partials.double().sum(0)[inverse.long()].view(tokens, top_k), roundings=parts, name="sums")


@pytest.mark.parametrize(
    "parts",
    [
        1,
        32,  # what is loaded at once
        33,  # one more
    ],
)
@pytest.mark.parametrize("tokens, columns", [(70, 8), (5, 1100)])  # more blocks of tokens than one; of columns
def test_sums_of_partials(device, parts, tokens, columns):
    _, _, inverse = _routing(tokens, 2, device)
    partials = normal(parts, 2 * tokens, dtype=torch.float32).to(device)
    rows = normal(2 * tokens, columns, dtype=torch.float32).to(device)
    out, sums = combine_rows(rows, None, inverse, 2, partials)
    exact, same = (partials.to(d).sum(0)[inverse.long()].view(tokens, 2) for d in (torch.float64, torch.float32))
    assert_close(sums, exact, same, roundings=2)
    assert_budget_bites(exact.cpu(), same.cpu())
    ones = torch.ones(tokens, 2, device=device)
    assert torch.equal(out, combine_rows(rows, ones, inverse, 2)[0])
    assert combine_rows(rows, ones, inverse, 2)[1] is None


def test_no_token(device):
    weights, permutation, inverse = _routing(0, 2, device)
    x = torch.zeros(0, 16, device=device, requires_grad=True)
    out = combine(permute(x, permutation, inverse), weights, inverse)
    assert out.shape == (0, 16)
    out.sum().backward()
    assert x.grad.shape == (0, 16)
    out, sums = combine_rows(x.detach(), None, inverse, 2, torch.zeros(3, 0, device=device))
    assert out.shape == (0, 16) and sums.shape == (0, 2)


def test_nan_stays_in_its_token(device):
    weights, permutation, inverse = _routing(20, 2, device)
    x = normal(20, 8, dtype=torch.float32).to(device)
    x[3] = float("nan")
    out = combine(permute(x, permutation, inverse), weights, inverse)
    assert out[3].isnan().all() and out.isnan().any(1).sum() == 1


def test_slots_are_added_in_their_order(device):
    # (1e8 + 1) - 1e8 is 0 in fp32, (1e8 - 1e8) + 1 is 1.
    rows = torch.tensor([[1e8], [1.0], [-1e8], [1e8], [-1e8], [1.0]], device=device)
    inverse = torch.arange(6, dtype=torch.int32, device=device)
    assert combine_rows(rows, None, inverse, 3)[0].flatten().tolist() == [0.0, 1.0]


def test_two_runs_agree_bit_for_bit(device):
    results = []
    for _ in range(2):
        weights, permutation, inverse = _routing(140, 4, device)
        leaves = normal(140, 40, dtype=torch.bfloat16).to(device), weights.detach()
        x, w = (t.clone().requires_grad_() for t in leaves)
        out = combine(permute(x, permutation, inverse), w, inverse)
        results.append((permutation, inverse, out, *torch.autograd.grad(out.float().square().sum(), (x, w))))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_one_launch_each(device, launches):
    if launches is None:
        pytest.skip("launches are counted in the interpreter")
    weights, permutation, inverse = _routing(37, 2, device)
    x = normal(37, 24, dtype=torch.float32).requires_grad_()
    combine(permute(x, permutation, inverse), weights.detach().requires_grad_(), inverse).sum().backward()
    assert [launch.kernel for launch in launches][2:] == [
        "_sort_kernel",
        "_permute_kernel",
        "_combine_fwd_kernel",
        "_combine_bwd_kernel",
        "_combine_fwd_kernel",  # the gradient of permute
    ]


@pytest.mark.parametrize("tokens", [0, 37])
def test_opcheck(device, tokens):
    ops = torch.ops.moe_engine
    got = gate(routing_logits("balanced", tokens, 8).to(device), 2, MODES[0])
    arguments = got.topk_idx, got.expert_offsets, got.block_offsets
    torch.library.opcheck(ops.sort_by_expert.default, arguments)
    _, inverse = sort_by_expert(*arguments)
    x, y = (normal(n, 24, dtype=torch.float32).to(device).requires_grad_() for n in (tokens, 2 * tokens))
    weights = got.topk_weights.detach().requires_grad_()
    torch.library.opcheck(ops.permute.default, (x, inverse, 2))
    torch.library.opcheck(ops.permute_backward.default, (y.detach(), inverse, 2))
    torch.library.opcheck(ops.combine.default, (y, weights, inverse))
    torch.library.opcheck(ops.combine_backward.default, (x.detach(), y.detach(), weights.detach(), inverse))


def _layer(x, logits):
    """A whole layer's rows there and back."""
    got = gate(logits, 2, MODES[0])
    permutation, inverse = sort_by_expert(got.topk_idx, got.expert_offsets, got.block_offsets)
    return combine(permute(x, permutation, inverse).tanh(), got.topk_weights, inverse)


def test_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(300, 24, dtype=torch.bfloat16, requires_grad=True)
        logits = torch.empty(300, 60, requires_grad=True)
        out = _layer(x, logits)
        out.sum().backward()
    assert out.shape == x.grad.shape == (300, 24) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(device, dynamic):
    compiled = torch.compile(_layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for function in (_layer, compiled):
        x = normal(140, 24, dtype=torch.float32).to(device).requires_grad_()
        logits = routing_logits("balanced", 140, 8).to(device).requires_grad_()
        out = function(x, logits)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (x, logits))))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def _zeros(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((_zeros(4), _zeros(9), _zeros(1, 8)), r"topk_idx: expected shape \(T, K\)"),
        ((_zeros(4, 2, dtype=torch.int64), _zeros(9), _zeros(1, 8)), "topk_idx: expected int32, got torch.int64"),
        ((_zeros(2, 4).t(), _zeros(9), _zeros(1, 8)), "topk_idx: expected a contiguous tensor"),
        ((_zeros(4, 0), _zeros(9), _zeros(1, 8)), "topk_idx: expected 1 to 8 columns, got 0"),
        ((_zeros(4, 9), _zeros(17), _zeros(1, 16)), "topk_idx: expected 1 to 8 columns, got 9"),
        ((_zeros(4, 3), _zeros(3), _zeros(1, 2)), "topk_idx: expected 1 to 2 columns, got 3"),
        ((_zeros(4, 2), _zeros(9, 1), _zeros(1, 8)), r"expert_offsets: expected shape \(E \+ 1,\)"),
        ((_zeros(4, 2), _zeros(1), _zeros(1, 0)), "expert_offsets: expected 2 to 257 offsets, got 1"),
        ((_zeros(4, 2), _zeros(258), _zeros(1, 257)), "expert_offsets: expected 2 to 257 offsets, got 258"),
        ((_zeros(4, 2), _zeros(9).to("meta"), _zeros(1, 8)), "expert_offsets: expected a tensor on cpu, got meta"),
        ((_zeros(4, 2), _zeros(9), _zeros(1, 7)), r"block_offsets: expected shape \(1, 8\), got \(1, 7\)"),
        ((_zeros(129, 2), _zeros(9), _zeros(1, 8)), r"block_offsets: expected shape \(2, 8\), got \(1, 8\)"),
        ((_zeros(4, 2), _zeros(9), _zeros(1, 8).long()), "block_offsets: expected int32"),
    ],
)
def test_wrong_arguments_of_sort(arguments, message):
    with pytest.raises(ValueError, match=message):
        sort_by_expert(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(4), _zeros(8), _zeros(8)), r"x: expected shape \(T, D\)"),
        ((torch.zeros(4, 6).double(), _zeros(8), _zeros(8)), "x: expected float32 or float16 or bfloat16"),
        ((torch.zeros(6, 4).t(), _zeros(8), _zeros(8)), "x: expected a contiguous tensor"),
        ((torch.zeros(4, 0), _zeros(8), _zeros(8)), "x: expected at least one column, got 0"),
        ((torch.zeros(4, 6), _zeros(8).float(), _zeros(8)), "permutation: expected int32"),
        ((torch.zeros(4, 6), _zeros(4, 2), _zeros(8)), r"permutation: expected shape \(N,\)"),
        ((torch.zeros(4, 6), _zeros(7), _zeros(7)), "permutation: expected 1 to 8 times 4 rows, got 7"),
        ((torch.zeros(4, 6), _zeros(0), _zeros(0)), "permutation: expected 1 to 8 times 4 rows, got 0"),
        ((torch.zeros(0, 6), _zeros(2), _zeros(2)), "permutation: expected 1 to 8 times 0 rows, got 2"),
        ((torch.zeros(4, 6), _zeros(8), _zeros(4)), r"inverse_permutation: expected shape \(8,\), got \(4,\)"),
        ((torch.zeros(4, 6), _zeros(8), _zeros(8).to("meta")), "inverse_permutation: expected a tensor on cpu"),
    ],
)
def test_wrong_arguments_of_permute(arguments, message):
    with pytest.raises(ValueError, match=message):
        permute(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(8, 6), torch.zeros(8), _zeros(8)), r"topk_weights: expected shape \(T, K\)"),
        ((torch.zeros(8, 6), torch.zeros(4, 2).half(), _zeros(8)), "topk_weights: expected float32, got torch.float16"),
        ((torch.zeros(8, 6), torch.zeros(4, 9), _zeros(8)), "topk_weights: expected 1 to 8 columns, got 9"),
        ((torch.zeros(7, 6), torch.zeros(4, 2), _zeros(8)), r"y: expected shape \(8, D\), got \(7, 6\)"),
        ((torch.zeros(8, 6).double(), torch.zeros(4, 2), _zeros(8)), "y: expected float32 or float16 or bfloat16"),
        ((torch.zeros(8, 0), torch.zeros(4, 2), _zeros(8)), "y: expected at least one column, got 0"),
        ((torch.zeros(6, 8).t(), torch.zeros(4, 2), _zeros(8)), "y: expected a contiguous tensor"),
        ((torch.zeros(8, 6), torch.zeros(4, 2), _zeros(4, 2)), r"inverse_permutation: expected shape \(8,\)"),
        ((torch.zeros(8, 6), torch.zeros(4, 2), _zeros(8).long()), "inverse_permutation: expected int32"),
    ],
)
def test_wrong_arguments_of_combine(arguments, message):
    with pytest.raises(ValueError, match=message):
        combine(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None, _zeros(7), 2), r"inverse_permutation: expected shape \(8,\), got \(7,\)"),
        ((None, _zeros(8), 3), "rows: expected a multiple of top_k = 3 rows, got 8"),
        ((torch.zeros(2, 4), _zeros(8), 2), r"topk_weights: expected shape \(4, 2\), got \(2, 4\)"),
        ((None, _zeros(8), 2, torch.zeros(3, 7)), r"partials: expected shape \(P, 8\), got \(3, 7\)"),
    ],
)
def test_wrong_arguments_of_combine_rows(device, arguments, message):
    rows, *rest = (t.to(device) if isinstance(t, torch.Tensor) else t for t in (torch.zeros(8, 6), *arguments))
    with pytest.raises(ValueError, match=message):
        combine_rows(rows, *rest)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no second device that holds data")
def test_wrong_device():
    with pytest.raises(ValueError, match="topk_idx: expected a cuda tensor"):
        sort_by_expert(_zeros(4, 2), _zeros(9), _zeros(1, 8))
    with pytest.raises(ValueError, match="x: expected a cuda tensor"):
        permute(torch.zeros(4, 6), _zeros(8), _zeros(8))
    with pytest.raises(ValueError, match="rows: expected a cuda tensor"):
        combine(torch.zeros(8, 6), torch.zeros(4, 2), _zeros(8))
