"""The MoE graph in plain PyTorch: the CPU path for good, and any device that Triton does not reach.

    gate            z (T, E) → topk_idx, topk_weights (T, K), router statistics; one autograd function
    sort_by_expert  topk_idx → expert_offsets, permutation: a stable sort of the N = T·K slots
    expert_mlp      h = x[t] @ w_up + b_up;  a = act(h);  y = a @ w_down + b_down;  out[t] = Σ_k topk_weights · y

Backward of expert_mlp saves x, h (not with save="x"), topk_weights and indices; `a` is recomputed, y is never needed,
since the gradient of a gate weight is ⟨dO·w_downᵀ, a⟩ + ⟨dO, b_down⟩ (SonicMoE, arXiv 2512.14080). Everything goes
expert by expert, so that the rows an elementwise pass touches are still in cache from the GEMM before it. A token's
rows are added in the order of its slots: two runs agree bit for bit.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k, N = T·K rows sorted by expert
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moe_engine.config import Activation
from moe_engine.router import RouterStats, without_autocast


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for 16-bit types; the type itself for fp32 and fp64."""
    return torch.promote_types(dtype, torch.float32)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, top_k: int, renormalise: bool, select_bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        # A stable sort, not topk: equal logits go to the lower expert, and a NaN still gives valid indices.
        selected_by = logits if select_bias is None else logits + select_bias
        topk_idx = torch.sort(selected_by, dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
        log_prob = logits.log_softmax(-1)
        prob = log_prob.exp()
        topk_weights = logits.gather(1, topk_idx).softmax(-1) if renormalise else prob.gather(1, topk_idx)
        lse = logits.logsumexp(-1)
        experts = torch.arange(logits.shape[1], device=logits.device)
        counts = (topk_idx.reshape(-1, 1) == experts).sum(0, dtype=torch.int32)
        entropy = -(prob * log_prob.clamp(min=torch.finfo(logits.dtype).min)).sum()
        topk_idx = topk_idx.to(torch.int32)
        ctx.save_for_backward(logits, topk_idx, topk_weights)
        ctx.renormalise = renormalise
        ctx.mark_non_differentiable(topk_idx, counts, entropy)
        return topk_idx, topk_weights, counts, prob.sum(0), lse.square().sum(), entropy

    @staticmethod
    def backward(
        ctx: Any, _idx: None, grad_w: Tensor, _counts: None, grad_prob: Tensor, grad_lse_sq: Tensor, _ent: None
    ):
        logits, topk_idx, topk_weights = ctx.saved_tensors
        chosen = topk_idx.long()
        lse = logits.logsumexp(-1, keepdim=True)
        prob = (logits - lse).exp()
        # Gradient with respect to prob, from the statistics and, in the second mode, from the weights.
        grad_p = grad_prob.expand_as(prob)
        if not ctx.renormalise:
            grad_p = grad_p.scatter_add(1, chosen, grad_w)
        grad = prob * (grad_p - (prob * grad_p).sum(-1, keepdim=True) + 2 * grad_lse_sq * lse)
        if ctx.renormalise:
            grad_chosen = topk_weights * (grad_w - (topk_weights * grad_w).sum(-1, keepdim=True))
            grad.scatter_add_(1, chosen, grad_chosen)
        return grad, None, None, None


def gate(
    logits: Tensor, top_k: int, mode: str, select_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, RouterStats]:
    """Softmax, top-k and router statistics.

    Args:
        logits: `(T, E)` fp32 or fp64.
        top_k: experts per token K.
        mode: `softmax_over_topk` or `softmax_then_topk`, see `MoEConfig.gate`.
        select_bias: `(E)` fp32, added to the logits to choose experts and for nothing else; None: no bias.
    Returns:
        topk_idx `(T, K)` int32, by falling (biased) logit, ties to the lower expert; topk_weights `(T, K)`; statistics.
    """
    topk_idx, topk_weights, *stats = _Gate.apply(logits, top_k, mode == "softmax_over_topk", select_bias)
    return topk_idx, topk_weights, RouterStats(*stats)


def sort_by_expert(topk_idx: Tensor, expert_counts: Tensor) -> tuple[Tensor, Tensor]:
    """Order of the N = T·K routed rows, by expert and, within one, by token.

    Args:
        topk_idx: `(T, K)` int32.
        expert_counts: `(E)` int32.
    Returns:
        expert_offsets `(E + 1)` int32, exclusive; permutation `(N)` int32, sorted row → flat slot t·K + k.
    """
    permutation = torch.sort(topk_idx.reshape(-1), stable=True).indices.to(torch.int32)
    expert_offsets = torch.zeros(expert_counts.numel() + 1, dtype=torch.int32, device=topk_idx.device)
    torch.cumsum(expert_counts, 0, dtype=torch.int32, out=expert_offsets[1:])
    return expert_offsets, permutation


def route(
    logits: Tensor, top_k: int, mode: str, select_bias: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor, Tensor], RouterStats]:
    """`gate`, then `sort_by_expert`: (topk_weights, permutation, expert_offsets) for `expert_mlp`, and statistics."""
    topk_idx, topk_weights, stats = gate(logits, top_k, mode, select_bias)
    expert_offsets, permutation = sort_by_expert(topk_idx, stats.expert_counts)
    return (topk_weights, permutation, expert_offsets), stats


def check_available() -> None:
    """This backend runs wherever PyTorch does."""


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that each compute on one core; `process` keys it, since threads do not survive a fork."""

    def start() -> None:
        torch.get_num_threads()  # at its first look a thread takes the process's number; only then can it have its own
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, "experts", initializer=start)
    started = threading.Barrier(threads)
    list(pool.map(lambda _: started.wait(), range(threads)))  # the initializer has run in every one of them
    torch.set_num_threads(threads)  # set_num_threads is a thread's own, but it is also what later threads start from
    return pool


@contextmanager
def _one_thread() -> Iterator[None]:
    """A context for small operations between the experts': PyTorch's threads, once woken, spin for milliseconds.

    They would be in the way of the experts' threads. (A thread's number is its own: those are not concerned.)
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def host_offsets(expert_offsets: Tensor, num_rows: int) -> list[int]:
    """The offsets as numbers: waits for the device. `moe_engine.memory`, which has no values, divides rows evenly."""
    return expert_offsets.tolist()


def side_by_side(work: Callable[[Any], None], parts: Iterable[Any], threads: int) -> None:
    """Call `work` with every part, on as many threads of one core each; what a part gives does not depend on where."""
    # Autocast is each thread's own, and off in a new one.
    inference = torch.is_inference_mode_enabled()

    def detached(part: Any) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # a thread has modes of its own
            work(part)

    list(_pool(threads, os.getpid()).map(detached, parts))


def _for_each_expert(
    expert_offsets: Tensor, num_rows: int, width: int, work: Callable[[int, slice], None]
) -> list[int]:
    """Call `work(expert, rows)` for every expert that owns rows; returns the others.

    On a CPU, experts are computed side by side, one thread each, when there is enough work and no expert holds most of
    it: single-threaded GEMMs waste less than shared ones, and everything between them runs in parallel too.

    Args:
        num_rows, width: of h, whose size is the measure of the work.
    """
    offsets = host_offsets(expert_offsets, num_rows)
    groups = [(e, slice(begin, end)) for e, (begin, end) in enumerate(pairwise(offsets)) if end > begin]
    idle = [e for e, (begin, end) in enumerate(pairwise(offsets)) if end == begin]
    threads = torch.get_num_threads()
    largest = max((rows.stop - rows.start for _, rows in groups), default=0)
    if _worth_threads(expert_offsets, num_rows * width) and largest * threads <= 2 * offsets[-1]:
        groups.sort(key=lambda group: group[1].start - group[1].stop)  # the largest first: threads end together
        side_by_side(lambda group: work(*group), groups, threads)
    else:
        with without_autocast(expert_offsets):
            for group in groups:
                work(*group)
    return idle


def _worth_threads(tensor: Tensor, size: int) -> bool:
    """Whether work on so many values of a tensor's device is worth handing to threads."""
    return tensor.device.type == "cpu" and torch.get_num_threads() > 1 and size >= 1 << 18


def _sum_over_slots(rows: Tensor, topk_weights: Tensor, permutation: Tensor) -> Tensor:
    """Sorted rows back to their tokens: `(N, D)` → `(T, D)`, weighted and added in the order of a token's slots.

    The sum is taken in the accumulation dtype, and rounded to that of the rows once.
    """
    inverse = torch.empty_like(permutation)
    with _one_thread():
        inverse[permutation] = torch.arange(permutation.numel(), dtype=permutation.dtype, device=permutation.device)
        slots = inverse.view(topk_weights.shape).t().contiguous()
    out = rows.new_empty(topk_weights.shape[0], rows.shape[1])

    def add(tokens: slice) -> None:
        weights = topk_weights[tokens].to(_accumulate_dtype(rows.dtype))
        total = rows.index_select(0, slots[0, tokens]) * weights[:, :1]
        for k in range(1, len(slots)):
            total.addcmul_(rows.index_select(0, slots[k, tokens]), weights[:, k : k + 1])
        out[tokens] = total

    if _worth_threads(rows, rows.numel()):  # on the experts' threads: PyTorch's would spin for a while, in their way
        side_by_side(add, _blocks(out), torch.get_num_threads())
    else:
        add(slice(None))
    return out


def _blocks(tensor: Tensor) -> list[slice]:
    """Rows of a matrix by the 128 Ki values, so that a few passes over as many find them in a core's L2 cache.

    On another device all of them: it has other caches, and a launch costs more there.
    """
    rows, width = tensor.shape
    step = max(1, (1 << 17) // width) if tensor.device.type == "cpu" else max(1, rows)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _split(h: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up halves of interleaved rows, `(n, 2F)` → two contiguous `(n, F)`, in the accumulation dtype."""
    planes = h.view(h.shape[0], -1, 2).permute(2, 0, 1)
    gate, up = planes.to(_accumulate_dtype(h.dtype), memory_format=torch.contiguous_format, copy=True)
    return gate, up


def _interleave(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """The inverse of `_split`, into out: complex numbers lie in memory as pairs do, and are written in one pass."""
    if out.dtype == gate.dtype:
        torch.complex(gate, up, out=torch.view_as_complex(out.view(*gate.shape, 2)))
    else:
        out.copy_(torch.view_as_real(torch.complex(gate, up)).flatten(1))


def _reaches(h: Tensor, limit: float) -> bool:
    """Whether a value lies beyond ±limit or is NaN: only then does a gradient stop at the bounds."""
    if limit == math.inf:
        return False
    low, high = torch.aminmax(h)
    return not (float(low) >= -limit and float(high) <= limit)


def _factors(h: Tensor, act: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """`g·σ(alpha·g)`, `σ(alpha·g)` and `u + offset`, each `(n, F)`."""
    gate, up = _split(h)
    if act.limit != math.inf:
        gate.clamp_(max=act.limit)
        up.clamp_(-act.limit, act.limit)
    if act.offset:
        up.add_(act.offset)
    s = torch.sigmoid(gate) if act.alpha == 1 else (gate * act.alpha).sigmoid_()
    return gate.mul_(s), s, up


def _activation(h: Tensor, act: Activation) -> Tensor:
    """a = g·σ(alpha·g)·(u + offset), `(n, 2F)` → `(n, F)`."""
    a = h.new_empty(h.shape[0], h.shape[1] // 2)
    for rows in _blocks(a):
        gated, _, up = _factors(h[rows], act)
        torch.mul(gated, up, out=a[rows])
    return a


def _activation_backward(h: Tensor, grad_a: Tensor, act: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """What backward needs of the activation.

    Args:
        h: `(n, 2F)`; grad_a: `(n, F)`, whose memory `a` takes over.
    Returns:
        a `(n, F)`, grad_h `(n, 2F)`, and ⟨grad_a, a⟩ `(n)` in the accumulation dtype.
    """
    a, grad_h = grad_a, torch.empty_like(h)
    grad_scale = h.new_empty(h.shape[0], dtype=_accumulate_dtype(h.dtype))
    for rows in _blocks(grad_a):
        gated, s, up = _factors(h[rows], act)
        grad = grad_a[rows].to(gated.dtype)
        grad_gated = up * grad
        torch.linalg.vecdot(gated, grad_gated, out=grad_scale[rows])
        # d(g·σ(αg))/dg = σ + α·g·σ·(1 − σ) = σ + α·gated − α·gated·σ
        grad_gate = torch.addcmul(s, gated, s, value=-act.alpha).add_(gated, alpha=act.alpha).mul_(grad_gated)
        grad_up = torch.mul(gated, grad, out=grad_gated)
        torch.mul(gated, up, out=a[rows])
        if _reaches(h[rows], act.limit):  # no gradient beyond the bounds; at a bound itself it passes
            values = h[rows].view(*gated.shape, 2)
            grad_gate.masked_fill_(values[..., 0] > act.limit, 0)
            grad_up.masked_fill_(values[..., 1].abs() > act.limit, 0)
        _interleave(grad_gate, grad_up, grad_h[rows])
    return a, grad_h, grad_scale


def _up_projection(x: Tensor, w_up: Tensor, b_up: Tensor | None, expert: int, out: Tensor | None) -> Tensor:
    h = torch.mm(x, w_up[expert], out=out)
    if b_up is not None:
        h += b_up[expert]
    return h


@torch.library.custom_op("moe_engine::expert_mlp_torch", mutates_args=())
def _forward(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    topk_weights: Tensor,
    permutation: Tensor,
    expert_offsets: Tensor,
    alpha: float,
    offset: float,
    limit: float,
    save: str,
) -> tuple[Tensor, Tensor]:
    act, top_k = Activation(alpha, offset, limit), topk_weights.shape[1]
    with _one_thread():
        token_of = permutation // top_k  # of a sorted row
    h = x.new_empty(permutation.numel() if save == "h" else 0, w_up.shape[2])
    y = x.new_empty(permutation.numel(), x.shape[1])

    def work(e: int, rows: slice) -> None:
        h_e = _up_projection(x.index_select(0, token_of[rows]), w_up, b_up, e, h[rows] if save == "h" else None)
        y_e = torch.mm(_activation(h_e, act), w_down[e], out=y[rows])
        if b_down is not None:
            y_e += b_down[e]

    _for_each_expert(expert_offsets, permutation.numel(), w_up.shape[2], work)
    return _sum_over_slots(y, topk_weights, permutation), h


@_forward.register_fake
def _(x, w_up, b_up, w_down, b_down, topk_weights, permutation, expert_offsets, alpha, offset, limit, save):
    return x.new_empty(x.shape), x.new_empty(permutation.numel() if save == "h" else 0, w_up.shape[2])


@torch.library.custom_op("moe_engine::expert_mlp_torch_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    x: Tensor,
    h: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    topk_weights: Tensor,
    permutation: Tensor,
    expert_offsets: Tensor,
    alpha: float,
    offset: float,
    limit: float,
    save: str,
) -> list[Tensor]:
    act, top_k = Activation(alpha, offset, limit), topk_weights.shape[1]
    with _one_thread():
        token_of = permutation // top_k
        scale_of = topk_weights.reshape(-1)[permutation].unsqueeze(1)
    grad_rows = x.new_empty(permutation.numel(), x.shape[1])
    grad_scale = torch.empty(permutation.numel(), dtype=topk_weights.dtype, device=x.device)
    grad_w_up, grad_w_down = torch.empty_like(w_up), torch.empty_like(w_down)
    grad_b_up = torch.empty_like(b_up) if b_up is not None else w_up.new_empty(0)
    grad_b_down = torch.empty_like(b_down) if b_down is not None else w_up.new_empty(0)

    def work(e: int, rows: slice) -> None:
        x_e, grad_e = x.index_select(0, token_of[rows]), grad_out.index_select(0, token_of[rows])
        # The gate weight of a row multiplies whatever is narrow, D wide, and never the rows of width F or 2F.
        h_e = h[rows] if save == "h" else _up_projection(x_e, w_up, b_up, e, None)
        a, grad_h, grad_scale_e = _activation_backward(h_e, torch.mm(grad_e, w_down[e].t()), act)
        if b_down is not None:
            grad_scale_e += torch.mv(grad_e, b_down[e])
        grad_scale[rows] = grad_scale_e
        torch.mm(grad_h, w_up[e].t(), out=grad_rows[rows])
        scale = scale_of[rows].to(x.dtype)
        torch.mm(a.t(), grad_e.mul_(scale), out=grad_w_down[e])
        torch.mm(x_e.mul_(scale).t(), grad_h, out=grad_w_up[e])
        if b_down is not None:
            torch.sum(grad_e, 0, out=grad_b_down[e])
        if b_up is not None:
            torch.mv(grad_h.t(), scale.squeeze(1), out=grad_b_up[e])

    for e in _for_each_expert(expert_offsets, permutation.numel(), w_up.shape[2], work):  # experts without a token
        for grad in (grad_w_up, grad_b_up, grad_w_down, grad_b_down):
            if grad.numel():
                grad[e] = 0
    grad_x = _sum_over_slots(grad_rows, topk_weights, permutation)
    grad_topk_weights = torch.empty_like(topk_weights)
    with _one_thread():
        grad_topk_weights.view(-1)[permutation] = grad_scale
    return [grad_x, grad_w_up, grad_b_up, grad_w_down, grad_b_down, grad_topk_weights]


@_backward.register_fake
def _(grad_out, x, h, w_up, b_up, w_down, b_down, topk_weights, *rest):
    return [
        x.new_empty(x.shape),
        torch.empty_like(w_up),
        torch.empty_like(b_up) if b_up is not None else w_up.new_empty(0),
        torch.empty_like(w_down),
        torch.empty_like(b_down) if b_down is not None else w_up.new_empty(0),
        torch.empty_like(topk_weights),
    ]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, w_up, b_up, w_down, b_down, topk_weights, permutation, expert_offsets, *ctx.constants = inputs
    ctx.save_for_backward(x, output[1], w_up, b_up, w_down, b_down, topk_weights, permutation, expert_offsets)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or h would get a gradient of zeros


def _autograd(ctx: Any, grad_out: Tensor, _grad_h: None) -> tuple:
    x, h, w_up, b_up, w_down, b_down, *routing = ctx.saved_tensors
    grads = _backward(grad_out.contiguous(), x, h, w_up, b_up, w_down, b_down, *routing, *ctx.constants)
    grad_x, grad_w_up, grad_b_up, grad_w_down, grad_b_down, grad_weights = grads
    if b_up is None:
        grad_b_up = None
    if b_down is None:
        grad_b_down = None
    return grad_x, grad_w_up, grad_b_up, grad_w_down, grad_b_down, grad_weights, *(None,) * 6


_forward.register_autograd(_autograd, setup_context=_save)


def expert_mlp(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    topk_weights: Tensor,
    permutation: Tensor,
    expert_offsets: Tensor,
    activation: Activation,
    save: str = "h",
    autotune: bool = False,
) -> Tensor:
    """The experts' MLPs, weighted and summed into each token's row.

    Args:
        x: `(T, D)`, fp32, fp64, bf16 or fp16.
        w_up: `(E, D, 2F)`, gate and up columns interleaved; b_up: `(E, 2F)` or None; of x's dtype.
        w_down: `(E, F, D)`; b_down: `(E, D)` or None.
        topk_weights: `(T, K)` fp32 (fp64 for fp64 inputs).
        permutation, expert_offsets: from `sort_by_expert`.
        activation: constants of the gated activation.
        save: `h` keeps the up-projection for backward, `x` computes it again there; the same results to the bit.
        autotune: nothing here; the Triton backend times its tiles.
    Returns:
        `(T, D)` in x's dtype. Differentiable in x, the weights, the biases and topk_weights.
    """
    if not torch.is_grad_enabled():
        save = "x"  # nobody will need h
    out, _ = _forward(x, w_up, b_up, w_down, b_down, topk_weights, permutation, expert_offsets, *activation, save)
    return out
