"""The operations that `moe-bench kernels` times: their inputs, who computes them, and what they cost at least.

Every operation is there as a Triton kernel (`triton`) and as what one has without it (`torch`): the PyTorch backend's
functions for gate, sort, experts and losses, plain expressions for the rest, a loop of `torch.mm` over experts for the
grouped products, whose row counts the host knows beforehand. The products are there a third time as `F.grouped_mm`.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k, N = T·K rows sorted by expert
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_engine import torch_backend
from moe_engine.bench.kernel_inputs import LAYERS, Inputs, invert
from moe_engine.bench.shapes import LayerShape
from moe_engine.router import RouterStats, balance_loss, z_loss

Results = Sequence[Tensor]
Run = Callable[[], Results]


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same memory, to be differentiated with respect to."""
    return [t if t is None else t.detach().requires_grad_() for t in tensors]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor | None], grads: Sequence[Tensor]) -> Run:
    """A run that computes the gradients of the inputs that there are, again and again."""
    wanted = [t for t in inputs if t is not None]
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


# -- gate, sort, permute, combine, losses: Triton is imported where it is used, a CPU may have none --


def gate(i: Inputs, implementation: str) -> Callable[[Tensor], Results]:
    """Logits → topk_idx, topk_weights, and the statistics."""
    if implementation == "triton":
        from moe_engine.kernels import gating

        return lambda logits: gating.gate(logits, i.top_k, i.problem.moe.gate)[:6]

    def by_torch(logits: Tensor) -> Results:
        topk_idx, topk_weights, stats = torch_backend.gate(logits, i.top_k, i.problem.moe.gate)
        return topk_idx, topk_weights, *stats

    return by_torch


def _gate(i: Inputs, implementation: str) -> Run:
    function, logits = gate(i, implementation), i.logits
    return lambda: function(logits)


def _gate_backward(i: Inputs, implementation: str) -> Run:
    logits = leaves(i.logits)
    _, topk_weights, _, prob_sum, lse_sq, _ = gate(i, implementation)(logits[0])
    return gradients([topk_weights, prob_sum, lse_sq], logits, i.grad_gate)


def _sort(i: Inputs, implementation: str) -> Run:
    topk_idx = i.topk_idx
    if implementation == "triton":
        from moe_engine.kernels import gating, permutation

        gated = gating.gate(i.logits, i.top_k, i.problem.moe.gate)
        return lambda: permutation.sort_by_expert(topk_idx, gated.expert_offsets, gated.block_offsets)
    counts = i.expert_offsets.diff()

    def by_torch() -> Results:
        _, order = torch_backend.sort_by_expert(topk_idx, counts)
        return order, invert(order)

    return by_torch


def _permute(i: Inputs, implementation: str) -> Run:
    x, order, inverse, token_of = i.x, i.permutation, i.inverse, i.token_of
    if implementation == "triton":
        from moe_engine.kernels import permutation

        return lambda: [permutation.permute(x, order, inverse)]
    return lambda: [x.index_select(0, token_of)]


def combine(i: Inputs, implementation: str) -> Callable[[Tensor, Tensor], Tensor]:
    """y and topk_weights → out."""
    inverse = i.inverse
    if implementation == "triton":
        from moe_engine.kernels import permutation

        return lambda y, topk_weights: permutation.combine(y, topk_weights, inverse)

    def by_torch(y: Tensor, topk_weights: Tensor) -> Tensor:
        rows = y.index_select(0, inverse).view(*topk_weights.shape, -1)
        return (rows * topk_weights.unsqueeze(-1)).sum(1).to(y.dtype)

    return by_torch


def _combine(i: Inputs, implementation: str) -> Run:
    function, y, topk_weights = combine(i, implementation), i.y, i.topk_weights
    return lambda: [function(y, topk_weights)]


def _combine_backward(i: Inputs, implementation: str) -> Run:
    inputs = leaves(i.y, i.topk_weights)
    return gradients([combine(i, implementation)(*inputs)], inputs, [i.grad_out])


def losses(i: Inputs, implementation: str) -> Callable[[Tensor, Tensor], Results]:
    """prob_sum and lse_sq of `LAYERS` layers → balance and z."""
    counts = i.stats.expert_counts
    if implementation == "triton":
        from moe_engine.kernels import aux_loss

        return lambda prob_sum, lse_sq: aux_loss.aux_losses(counts, prob_sum, lse_sq, i.top_k)

    def by_torch(prob_sum: Tensor, lse_sq: Tensor) -> Results:
        stats = RouterStats(counts, prob_sum, lse_sq, lse_sq)
        return balance_loss(stats, i.top_k), z_loss(stats, i.top_k)

    return by_torch


def _losses(i: Inputs, implementation: str) -> Run:
    function, prob_sum, lse_sq = losses(i, implementation), i.stats.prob_sum, i.stats.lse_sq
    return lambda: function(prob_sum, lse_sq)


def _losses_backward(i: Inputs, implementation: str) -> Run:
    inputs = leaves(i.stats.prob_sum, i.stats.lse_sq)
    return gradients(losses(i, implementation)(*inputs), inputs, i.grad_losses)


# -- products and the expert MLP --


def _multiply(x: Tensor, w: Tensor, i: Inputs, implementation: str) -> Tensor:
    """`y[r] = x[r] @ w[e(r)]` by PyTorch."""
    if implementation == "grouped_mm":
        return F.grouped_mm(x, w, offs=i.expert_offsets[1:])
    y = x.new_empty(x.shape[0], w.shape[2])
    for e, rows in enumerate(i.groups):
        if rows.stop > rows.start:
            torch.mm(x[rows], w[e], out=y[rows])
    return y


def _gemm_up(i: Inputs, implementation: str) -> Run:
    x, w, order, inverse, token_of = i.x, i.w_up, i.permutation, i.inverse, i.token_of
    if implementation == "triton":
        from moe_engine.kernels import grouped_gemm

        return lambda: [grouped_gemm.grouped_gemm(x, w, i.expert_offsets, None, order, inverse)]
    return lambda: [_multiply(x.index_select(0, token_of), w, i, implementation)]


def _gemm_down(i: Inputs, implementation: str) -> Run:
    a, w = i.a, i.w_down
    if implementation == "triton":
        from moe_engine.kernels import grouped_gemm

        return lambda: [grouped_gemm.grouped_gemm(a, w, i.expert_offsets)]
    return lambda: [_multiply(a, w, i, implementation)]


def _gemm_dx(i: Inputs, implementation: str) -> Run:
    grad_h, w = i.grad_h, i.w_up
    if implementation == "triton":
        from moe_engine.kernels import grouped_gemm

        return lambda: [grouped_gemm.multiply_rows(grad_h, w, i.expert_offsets, transposed=True)]
    return lambda: [_multiply(grad_h, w.transpose(1, 2), i, implementation)]


def _gemm_dw(i: Inputs, implementation: str) -> Run:
    x, grad_h, w, order, token_of = i.x, i.grad_h, i.w_up, i.permutation, i.token_of
    if implementation == "triton":
        from moe_engine.kernels import grouped_gemm

        rows = len(order)
        return lambda: grouped_gemm.weight_grad(x, grad_h, rows, i.expert_offsets, order, i.top_k, "x")[:1]
    if implementation == "grouped_mm":
        return lambda: [F.grouped_mm(x.index_select(0, token_of).t(), grad_h, offs=i.expert_offsets[1:])]

    def by_torch() -> Results:
        columns, dw = x.index_select(0, token_of).t(), torch.empty_like(w)
        for e, rows in enumerate(i.groups):
            torch.mm(columns[:, rows], grad_h[rows], out=dw[e])  # zeros where there are no rows
        return [dw]

    return by_torch


MLP_GRADS = ("x", "w_up", "b_up", "w_down", "b_down", "topk_weights")


def mlp(i: Inputs, implementation: str, save: str) -> tuple[Callable[[], Tensor], list[Tensor | None]]:
    """A run of the expert MLP's forward, and what it can be differentiated with respect to, as in `MLP_GRADS`."""
    inputs = leaves(*(getattr(i, name) for name in MLP_GRADS))
    offsets, order, inverse = i.expert_offsets, i.permutation, i.inverse
    if implementation == "triton":
        from moe_engine.kernels import expert_mlp

        return lambda: expert_mlp.expert_mlp(*inputs, offsets, order, inverse, *i.act, save=save), inputs
    return lambda: torch_backend.expert_mlp(*inputs, order, offsets, i.act, save), inputs


def mlp_forward(save: str) -> Callable[[Inputs, str], Run]:
    """The expert MLP, keeping for backward what `save` says."""

    def make(i: Inputs, implementation: str) -> Run:
        forward, _ = mlp(i, implementation, save)
        return lambda: [forward().detach()]

    return make


def mlp_backward(save: str) -> Callable[[Inputs, str], Run]:
    """All gradients of the expert MLP."""

    def make(i: Inputs, implementation: str) -> Run:
        forward, inputs = mlp(i, implementation, save)
        return gradients([forward()], inputs, [i.grad_out])

    return make


PRODUCTS = ("triton", "torch", "grouped_mm")
BOTH = PRODUCTS[:2]

MAKERS: dict[str, tuple[Callable[[Inputs, str], Run], tuple[str, ...]]] = {
    "gate": (_gate, BOTH),
    "gate_backward": (_gate_backward, BOTH),
    "sort": (_sort, BOTH),
    "permute": (_permute, BOTH),
    "combine": (_combine, BOTH),
    "combine_backward": (_combine_backward, BOTH),
    "gemm_up": (_gemm_up, PRODUCTS),
    "gemm_down": (_gemm_down, PRODUCTS),
    "gemm_dx": (_gemm_dx, PRODUCTS),
    "gemm_dw": (_gemm_dw, PRODUCTS),
    "mlp": (mlp_forward("h"), BOTH),
    "mlp_backward": (mlp_backward("h"), BOTH),
    "mlp_save_x": (mlp_forward("x"), BOTH),
    "mlp_backward_save_x": (mlp_backward("x"), BOTH),
    "losses": (_losses, BOTH),
    "losses_backward": (_losses_backward, BOTH),
}
"""Operation → what makes a run of it, and the implementations that there are."""


def flops(op: str, s: LayerShape) -> int:
    """Multiplications and additions of the products; 0 for what has none."""
    product = 2 * s.tokens * s.top_k * s.d_model * s.d_ff  # of a down-projection; an up-projection has two
    number = {"gemm_up": 2, "gemm_down": 1, "gemm_dx": 2, "gemm_dw": 2}
    number |= {"mlp": 3, "mlp_save_x": 3, "mlp_backward": 6, "mlp_backward_save_x": 8}
    return number.get(op, 0) * product


def floor_bytes(op: str, s: LayerShape, active: int) -> int:
    """Bytes that an operation moves when it touches each tensor once, the MLP once in each of its launches.

    As `LayerShape.floors`: of an operation on rows, neither indices nor gate weights nor biases count. The weights of
    experts without rows are not read; their gradients are written nevertheless.

    Args:
        op: one of `MAKERS`.
        s: sizes.
        active: experts that have rows.
    """
    t, d, f, e, k = s.tokens, s.d_model, s.d_ff, s.experts, s.top_k
    n, edf, idle = t * k, e * d * f, (e - active) * d * f
    in_words = {  # fp32 and int32
        "gate": t * e + 2 * n + 2 * e + 2,  # logits; topk_idx, topk_weights, expert_counts, prob_sum, two scalars
        "gate_backward": 2 * t * e + 3 * n + e + 1,  # logits in and out; topk_idx, the weights and their gradients
        "sort": 3 * n + e + 1,  # topk_idx, expert_offsets in; permutation and inverse out
        "losses": LAYERS * (2 * e + 3),  # expert_counts, prob_sum, lse_sq in; two losses out
        "losses_backward": LAYERS * (2 * e + 3),  # expert_counts, two gradients in; those of prob_sum, lse_sq out
    }
    if op in in_words:
        return 4 * in_words[op]
    floor = {save: s.floors(save) for save in ("h", "x")}
    return {
        "permute": s.itemsize * (t + n) * d,
        "combine": s.itemsize * (t + n) * d,
        "combine_backward": s.itemsize * (t + 2 * n) * d,
        "gemm_up": s.itemsize * (t * d + n * 2 * f + 2 * (edf - idle)),
        "gemm_down": s.itemsize * (n * f + n * d + edf - idle),
        "gemm_dx": s.itemsize * (n * 2 * f + n * d + 2 * (edf - idle)),
        "gemm_dw": s.itemsize * (t * d + n * 2 * f + 2 * edf),
        "mlp": floor["h"]["forward"] - s.itemsize * 3 * idle,
        "mlp_save_x": floor["x"]["forward"] - s.itemsize * 3 * idle,
        "mlp_backward": floor["h"]["backward"] - s.itemsize * 3 * idle,
        "mlp_backward_save_x": floor["x"]["backward"] - s.itemsize * 5 * idle,
    }[op]
