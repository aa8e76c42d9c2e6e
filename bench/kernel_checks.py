"""What the operations of `kernel_ops` have to give: plain expressions in any dtype, fp64 included, and the verdict.

An operation is judged on the very inputs that it is then timed with, all of them. Whatever has to do with the experts'
weights is computed expert by expert, so that fp64 needs room for one of them. The error budget is that of
`moe_engine.testing.assert_close`, with the plain expression in the operation's own dtype as the reference.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k, N = T·K rows sorted by expert
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe_engine.bench.kernel_inputs import Inputs, Problem
from moe_engine.bench.kernel_ops import MLP_GRADS, Results, floor_bytes
from moe_engine.bench.shapes import LayerShape
from moe_engine.reference import gated_activation
from moe_engine.testing import assert_close

FP32_SUMS = 8.0
"""Roundings to grant an fp32 result: its sums are in another order. 16-bit ones are rounded last, and get one."""


class Part(NamedTuple):
    """A result, or what one expert has of it: `actual[at]`."""

    name: str
    value: Tensor
    expert: int | None = None
    at: int | slice = slice(None)


Parts = Iterator[Part]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What router mathematics and sums are done in."""
    return torch.promote_types(dtype, torch.float32)


def _gated(i: Inputs, logits: Tensor) -> list[Tensor]:
    """topk_idx, topk_weights, expert_counts, prob_sum, lse_sq, entropy."""
    experts, prob = i.problem.moe.num_experts, logits.softmax(-1)
    topk_idx = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[:, : i.top_k]
    chosen = logits.gather(1, topk_idx).softmax(-1)
    weights = chosen if i.problem.moe.gate == "softmax_over_topk" else prob.gather(1, topk_idx)
    counts = torch.stack([(topk_idx == e).sum() for e in range(experts)])
    return [
        topk_idx,
        weights,
        counts,
        prob.sum(0),
        logits.logsumexp(-1).square().sum(),
        -torch.special.xlogy(prob, prob).sum(),
    ]


def _gate(i: Inputs, dtype: torch.dtype) -> Parts:
    names = ("topk_idx", "topk_weights", "expert_counts", "prob_sum", "lse_sq", "entropy")
    yield from map(Part, names, _gated(i, i.logits.to(_wide(dtype))))


def _gate_backward(i: Inputs, dtype: torch.dtype) -> Parts:
    logits = i.logits.to(_wide(dtype), copy=True).requires_grad_()
    _, weights, _, prob_sum, lse_sq, _ = _gated(i, logits)
    grads = [g.to(logits.dtype) for g in i.grad_gate]
    yield Part("gradient of logits", *torch.autograd.grad([weights, prob_sum, lse_sq], logits, grads))


def _sort(i: Inputs, dtype: torch.dtype) -> Parts:
    order = i.topk_idx.flatten().sort(stable=True).indices
    yield Part("permutation", order)
    yield Part("inverse_permutation", order.argsort())


def _permute(i: Inputs, dtype: torch.dtype) -> Parts:
    yield Part("rows", i.x.to(dtype)[i.token_of])


def _combined(i: Inputs, y: Tensor, topk_weights: Tensor) -> Tensor:
    rows = y[i.inverse].view(*topk_weights.shape, -1)
    return (topk_weights.unsqueeze(-1) * rows).sum(1).to(y.dtype)


def _combine(i: Inputs, dtype: torch.dtype) -> Parts:
    yield Part("out", _combined(i, i.y.to(dtype), i.topk_weights.to(_wide(dtype))))


def _combine_backward(i: Inputs, dtype: torch.dtype) -> Parts:
    leaves = [i.y.to(dtype, copy=True), i.topk_weights.to(_wide(dtype), copy=True)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(_combined(i, *leaves), leaves, i.grad_out.to(dtype))
    yield from map(Part, ("gradient of y", "gradient of topk_weights"), grads)


def _lost(i: Inputs, prob_sum: Tensor, lse_sq: Tensor) -> list[Tensor]:
    rows = i.stats.expert_counts.sum(-1, keepdim=True).to(prob_sum.dtype)
    share, tokens = i.stats.expert_counts / rows, rows / i.top_k
    return [share.shape[-1] * (share * prob_sum / tokens).sum(-1), lse_sq / tokens[:, 0]]


def _losses(i: Inputs, dtype: torch.dtype) -> Parts:
    inputs = (i.stats.prob_sum, i.stats.lse_sq)
    yield from map(Part, ("balance", "z"), _lost(i, *(t.to(_wide(dtype)) for t in inputs)))


def _losses_backward(i: Inputs, dtype: torch.dtype) -> Parts:
    leaves = [t.to(_wide(dtype), copy=True).requires_grad_() for t in (i.stats.prob_sum, i.stats.lse_sq)]
    grads = torch.autograd.grad(_lost(i, *leaves), leaves, [g.to(_wide(dtype)) for g in i.grad_losses])
    yield from map(Part, ("gradient of prob_sum", "gradient of lse_sq"), grads)


def _gemm_up(i: Inputs, dtype: torch.dtype) -> Parts:
    for e, rows in enumerate(i.groups):
        yield Part("h", i.x[i.token_of[rows]].to(dtype) @ i.w_up[e].to(dtype), e, rows)


def _gemm_down(i: Inputs, dtype: torch.dtype) -> Parts:
    for e, rows in enumerate(i.groups):
        yield Part("y", i.a[rows].to(dtype) @ i.w_down[e].to(dtype), e, rows)


def _gemm_dx(i: Inputs, dtype: torch.dtype) -> Parts:
    for e, rows in enumerate(i.groups):
        yield Part("gradient of rows", i.grad_h[rows].to(dtype) @ i.w_up[e].to(dtype).t(), e, rows)


def _gemm_dw(i: Inputs, dtype: torch.dtype) -> Parts:
    for e, rows in enumerate(i.groups):
        x = i.x[i.token_of[rows]].to(dtype)
        yield Part("gradient of w_up", x.t() @ i.grad_h[rows].to(dtype), e, e)


def _mlp_parts(i: Inputs, dtype: torch.dtype, backward: bool) -> Parts:
    """The output, or the gradients of everything, expert by expert. Rows are added up in fp32 or better."""
    wide = _wide(dtype)
    out, grad_x = torch.zeros_like(i.x, dtype=wide), torch.zeros_like(i.x, dtype=wide)
    grad_weights = torch.zeros_like(i.topk_weights, dtype=wide)
    names = [name for name in MLP_GRADS[1:5] if getattr(i, name) is not None]
    for e, rows in enumerate(i.groups):
        tokens, slots = i.token_of[rows], i.permutation[rows]
        x = i.x[tokens].to(dtype).requires_grad_(backward)
        scale = i.topk_weights.flatten()[slots].to(wide).requires_grad_(backward)
        weights = {name: getattr(i, name)[e].to(dtype, copy=True).requires_grad_(backward) for name in names}
        h = x @ weights["w_up"] + weights.get("b_up", 0)
        y = gated_activation(h, i.act) @ weights["w_down"] + weights.get("b_down", 0)
        scaled = scale[:, None] * y
        out.index_add_(0, tokens, scaled.detach())
        if not backward:
            continue
        leaves = [x, scale, *weights.values()]
        grads = torch.autograd.grad(scaled, leaves, i.grad_out[tokens].to(wide))
        grad_x.index_add_(0, tokens, grads[0].to(wide))
        grad_weights.view(-1)[slots] = grads[1]
        for name, grad in zip(names, grads[2:], strict=True):
            yield Part(f"gradient of {name}", grad, e, e)
    if backward:
        yield Part("gradient of x", grad_x.to(dtype))
        yield Part("gradient of topk_weights", grad_weights)
    else:
        yield Part("out", out.to(dtype))


def _mlp(i: Inputs, dtype: torch.dtype) -> Parts:
    return _mlp_parts(i, dtype, backward=False)


def _mlp_backward(i: Inputs, dtype: torch.dtype) -> Parts:
    return _mlp_parts(i, dtype, backward=True)


PLAIN: dict[str, Callable[[Inputs, torch.dtype], Parts]] = {
    "gate": _gate,
    "gate_backward": _gate_backward,
    "sort": _sort,
    "permute": _permute,
    "combine": _combine,
    "combine_backward": _combine_backward,
    "gemm_up": _gemm_up,
    "gemm_down": _gemm_down,
    "gemm_dx": _gemm_dx,
    "gemm_dw": _gemm_dw,
    "mlp": _mlp,
    "mlp_backward": _mlp_backward,
    "mlp_save_x": _mlp,
    "mlp_backward_save_x": _mlp_backward,
    "losses": _losses,
    "losses_backward": _losses_backward,
}
"""Operation → its results in a dtype, in parts."""


def result_names(op: str, i: Inputs) -> list[str]:
    """The results of an operation in the order in which a run gives them."""
    if op in ("mlp_backward", "mlp_backward_save_x"):
        return [f"gradient of {name}" for name in MLP_GRADS if getattr(i, name) is not None]
    return {
        "gate": ["topk_idx", "topk_weights", "expert_counts", "prob_sum", "lse_sq", "entropy"],
        "gate_backward": ["gradient of logits"],
        "sort": ["permutation", "inverse_permutation"],
        "permute": ["rows"],
        "combine_backward": ["gradient of y", "gradient of topk_weights"],
        "gemm_up": ["h"],
        "gemm_down": ["y"],
        "gemm_dx": ["gradient of rows"],
        "gemm_dw": ["gradient of w_up"],
        "losses": ["balance", "z"],
        "losses_backward": ["gradient of prob_sum", "gradient of lse_sq"],
    }.get(op, ["out"])


def check(op: str, i: Inputs, results: Results) -> None:
    """Hold the results of a run against fp64.

    Raises:
        AssertionError: one of them is over the error budget, or missing.
    """
    names = result_names(op, i)
    if len(results) != len(names):
        raise AssertionError(f"expected {', '.join(names)}, got {len(results)} results")
    actual, compared = dict(zip(names, results, strict=True)), set()
    plain = PLAIN[op]
    for exact, same in zip(plain(i, torch.float64), plain(i, i.problem.dtype), strict=True):
        name, value = exact.name, actual[exact.name]
        where = name if exact.expert is None else f"{name}, expert {exact.expert}"
        compared.add(name)
        if not exact.value.is_floating_point():
            if not torch.equal(value.long(), exact.value):
                raise AssertionError(f"{where}: {int((value != exact.value).sum())} of {value.numel()} differ")
            continue
        if same.value.dtype != value.dtype:
            raise AssertionError(f"{where}: expected {same.value.dtype}, got {value.dtype}")
        roundings = FP32_SUMS if value.dtype == torch.float32 else 1
        assert_close(
            value[exact.at] if value.dim() else value, exact.value, same.value, roundings=roundings, name=where
        )
    if compared != set(names):
        raise AssertionError(f"expected {', '.join(names)}, compared {', '.join(sorted(compared))}")


def needed_bytes(op: str, problem: Problem) -> int:
    """About how much memory a run of an operation takes with its check, when one expert has all tokens."""
    s: LayerShape = problem.sizes
    moved = floor_bytes(op, s, s.experts)  # inputs and results are among what is moved
    if not op.startswith(("gemm", "mlp")):
        return moved + 5 * 8 * moved // s.itemsize
    one_weight, rows = 2 * s.d_model * s.d_ff, s.tokens * (4 * s.d_model + 10 * s.d_ff)
    return moved + 8 * (6 * one_weight + rows)
