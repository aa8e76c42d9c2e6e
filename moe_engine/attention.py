"""Grouped-query attention with rotary embedding (YaRN), sliding windows and attention sinks.

A sink is one learned logit per head that takes part in the softmax and adds no value. With o and lse the attention
without it, and lse' = log(e^lse + e^sink), the attention with it is `o·e^(lse − lse')`. Its backward is the ordinary
one, fed with the *rescaled* output and lse': the probabilities e^(s − lse') and δ = ⟨grad_o, o⟩ are then those of the
softmax with the extra column, and grad_sink = −Σ e^(sink − lse')·δ. So one pair of functions serves layers with and
without sinks, and no column is ever appended.

Memory is linear in T: scores exist for a block of queries at a time, and a sliding layer only ever multiplies the
keys that its window reaches. GPUs use `moe_engine.flex` wherever it serves; CPUs, and GPUs where it does not, what is
here.

B = batch, T = tokens, Hq / Hkv = query / key-value heads, d = head_dim
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_any_mode_without_ignore_compile_internals

from moe_engine import flex
from moe_engine.autograd import refuse_create_graph
from moe_engine.config import ModelConfig

_QUERY_BLOCK = 512  # queries whose scores exist at once, where there is no fused kernel


class RotaryEmbedding:
    """Cosines and sines of the rotary embedding, in fp32 and computed once for a length.

    Deliberately no module and no buffer: `.to(bfloat16)` on a model must not touch the angles.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._table: Tensor | None = None

    def _frequencies(self) -> tuple[Tensor, float]:
        """Angle per position of each pair `(d/2)`, fp64, and the scale of cos and sin (YaRN, arXiv 2309.00071)."""
        c = self.config
        half = c.head_dim // 2
        pair = torch.arange(half, dtype=torch.float64)
        frequency = c.rope_theta ** (-pair / half)
        if c.rope_factor == 1:
            return frequency, 1.0

        def pair_turning(rotations: float) -> float:
            return half * math.log(c.rope_original_context / (rotations * 2 * math.pi)) / math.log(c.rope_theta)

        # Clamped as transformers does: in a short context no pair turns so often.
        low, high = max(pair_turning(c.rope_beta_fast), 0), min(pair_turning(c.rope_beta_slow), c.head_dim - 1)
        ramp = ((pair - low) / (high - low)).clamp(0, 1)
        return frequency * (1 - ramp) + frequency / c.rope_factor * ramp, 0.1 * math.log(c.rope_factor) + 1.0

    def table(self, length: int, like: Tensor) -> Tensor:
        """cos and sin of positions 0 … length − 1: `(2, length, d/2)`, fp32 (fp64 if `like` is), on its device."""
        dtype, device = torch.promote_types(like.dtype, torch.float32), like.device
        cached = self._table
        if cached is None or cached.shape[1] < length or cached.device != device or cached.dtype != dtype:
            frequency, scale = self._frequencies()
            rows = -(-length // 512) * 512  # so that decoding does not compute a table for every token
            angle = torch.arange(rows, dtype=torch.float64)[:, None] * frequency
            cached = self._table = (scale * torch.stack((angle.cos(), angle.sin()))).to(device, dtype)
        return cached[:, :length]


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Turn dimension i with i + d/2 by the position's angle, in fp32.

    Args:
        x: `(B, T, H, d)`; table: `(2, T, d/2)` from `RotaryEmbedding.table`.
    """
    cos, sin = table.unsqueeze(2)
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _expand(x: Tensor, groups: int) -> Tensor:
    """`(B, Hkv, T, d)` → `(B, Hkv·groups, T, d)`, each head repeated."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _reduce(grad: Tensor, groups: int) -> Tensor:
    """Backward of `_expand`."""
    if groups == 1:
        return grad
    b, h, t, d = grad.shape
    return grad.reshape(b, h // groups, groups, t, d).sum(2)


def _hidden(queries: range, keys: range, window: int, device: torch.device) -> Tensor:
    """True where a query must not see a key: `(len(queries), len(keys))`."""
    position = torch.arange(queries.start, queries.stop, device=device)[:, None]
    distance = position - torch.arange(keys.start, keys.stop, device=device)
    return (distance < 0) | (distance >= window) if window else distance < 0


def _blocks(length: int, window: int, first: int = 0) -> list[tuple[range, range]]:
    """Blocks of the queries from `first` on, with the keys that any of them sees."""
    step = max(window, 128) if window else _QUERY_BLOCK
    blocks = []
    for begin in range(first, length, step):
        end = min(begin + step, length)
        blocks.append((range(begin, end), range(max(0, begin - window + 1) if window else 0, end)))
    return blocks


def _at(x: Tensor, positions: range) -> Tensor:
    return x[:, :, positions.start : positions.stop]


class _Plain:
    """Attention of a block of queries in plain operations: any device, any dtype."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        groups = q.shape[1] // k.shape[1]
        scores = (q @ _expand(k, groups).transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
        scores = scores.mul_(scale).masked_fill_(hidden, -math.inf)
        lse = scores.logsumexp(-1)
        return (scores - lse.unsqueeze(-1)).exp_().to(q.dtype) @ _expand(v, groups), lse

    @staticmethod
    def backward(grad, q, k, v, out, lse, hidden, scale) -> tuple[Tensor, Tensor, Tensor]:
        groups = q.shape[1] // k.shape[1]
        k, v = _expand(k, groups), _expand(v, groups)
        scores = (q @ k.transpose(-1, -2)).to(lse.dtype).mul_(scale).masked_fill_(hidden, -math.inf)
        prob = (scores - lse.unsqueeze(-1)).exp_()
        grad_v = prob.to(q.dtype).transpose(-1, -2) @ grad
        grad_prob = (grad @ v.transpose(-1, -2)).to(lse.dtype)
        # δ from these very numbers, not from the rounded output: where one key has it all, the two cancel to the bit.
        delta = torch.linalg.vecdot(prob, grad_prob).unsqueeze(-1)
        grad_scores = (grad_prob - delta).mul_(prob).mul_(scale).to(q.dtype)
        return grad_scores @ k, _reduce(grad_scores.transpose(-1, -2) @ q, groups), _reduce(grad_v, groups)


class _FusedCPU:
    """The same through PyTorch's flash kernel for CPUs, the one behind scaled_dot_product_attention there.

    It serves several query heads from one key-value head by itself.
    """

    @staticmethod
    def _mask(q: Tensor, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -math.inf)

    @classmethod
    def forward(cls, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        mask = None if hidden is None else cls._mask(q, hidden)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, hidden is None, attn_mask=mask, scale=scale
        )

    @classmethod
    def backward(cls, grad, q, k, v, out, lse, hidden, scale) -> tuple[Tensor, Tensor, Tensor]:
        mask = None if hidden is None else cls._mask(q, hidden)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, hidden is None, attn_mask=mask, scale=scale
        )


def _engine(q: Tensor, length: int, window: int) -> tuple[Any, list[tuple[range, range]]]:
    """The functions for a block, and the blocks. On a CPU the full triangle is one call, with no mask."""
    if q.device.type != "cpu":
        return _Plain, _blocks(length, window)
    if window == 0 or window >= length:
        return _FusedCPU, [(range(length), range(length))]
    return _FusedCPU, _blocks(length, window)


def _visible(engine: Any, queries: range, keys: range, window: int, device: torch.device) -> Tensor | None:
    """The block's mask, or None for the fused kernel's own causal one."""
    if engine is _FusedCPU and queries == keys and (window == 0 or window >= len(keys)):
        return None
    return _hidden(queries, keys, window, device)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int) -> Tensor:
        scale = q.shape[-1] ** -0.5
        engine, blocks = _engine(q, q.shape[2], window)
        outs, lses = [], []
        for queries, keys in blocks:
            hidden = _visible(engine, queries, keys, window, q.device)
            out, lse = engine.forward(_at(q, queries), _at(k, keys), _at(v, keys), hidden, scale)
            outs.append(out)
            lses.append(lse)
        out, lse = (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))
        if sinks is not None:
            with_sink = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
            # Neither in place, nor ending in a .to that may do nothing: torch.compile of 2.11 then returns zero
            # gradients.
            out = out * (lse - with_sink).exp_().unsqueeze(-1).to(out.dtype)
            lse = with_sink
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        refuse_create_graph("attention")
        q, k, v, sinks, out, lse = ctx.saved_tensors
        scale, window = q.shape[-1] ** -0.5, ctx.window
        engine, blocks = _engine(q, q.shape[2], window)
        if len(blocks) == 1:
            hidden = _visible(engine, *blocks[0], window, q.device)
            grad_q, grad_k, grad_v = engine.backward(grad, q, k, v, out, lse, hidden, scale)
        else:
            # Blocks overlap in their keys: their gradients add up, in the order of the blocks, in fp32 or better.
            wide = torch.promote_types(k.dtype, torch.float32)
            grad_q, grad_k, grad_v = torch.empty_like(q), *(torch.zeros_like(t, dtype=wide) for t in (k, v))
            for queries, keys in blocks:
                hidden = _visible(engine, queries, keys, window, q.device)
                at_queries = (_at(t, queries) for t in (out, lse))
                dq, dk, dv = engine.backward(
                    _at(grad, queries), _at(q, queries), _at(k, keys), _at(v, keys), *at_queries, hidden, scale
                )
                _at(grad_q, queries).copy_(dq)
                _at(grad_k, keys).add_(dk)
                _at(grad_v, keys).add_(dv)
        grad_sinks = None
        if sinks is not None:
            delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            prob_sink = (sinks.to(lse.dtype)[:, None] - lse).exp()
            grad_sinks = -(prob_sink * delta).sum((0, 2)).to(sinks.dtype)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_sinks, None


def _watched() -> bool:
    """Whether the caller looks at single operations, as FlopCounterMode does: PyTorch then compiles nothing."""
    return not torch.compiler.is_compiling() and is_in_any_mode_without_ignore_compile_internals()


def _through_flex(device_type: str, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether FlexAttention takes such inputs. PyTorch calls AMD's GPUs `cuda` too."""
    return device_type == "cuda" and flex.serves(head_dim, dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, window: int = 0) -> Tensor:
    """Causal attention.

    Args:
        q: `(B, Hq, T, d)`; k, v: `(B, Hkv, T, d)` with Hq a multiple of Hkv; one floating dtype.
        sinks: `(Hq)` logits, or None.
        window: keys that a query sees, itself included; 0 for all before it.
    Returns:
        `(B, Hq, T, d)` in q's dtype. Differentiable in q, k, v and sinks.
    """
    if q.numel() == 0:  # no query: PyTorch's CPU kernel would divide by zero
        return q
    if _through_flex(q.device.type, q.shape[-1], q.dtype) and not _watched():
        return flex.attend(q, k, v, sinks, window)
    return _Attention.apply(q, k, v, sinks, window)


class KVCache:
    """Keys and values of the positions seen so far, for decoding: one pair of `(B, Hkv, capacity, d)` a layer."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: Any) -> None:
        shape = (config.num_layers, 2, batch, config.num_kv_heads, capacity, config.head_dim)
        self.data = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions `(B, Hkv, T, d)`; the model advances `length` after its last layer."""
        end = self.length + k.shape[2]
        self.data[layer, 0, :, :, self.length : end] = k
        self.data[layer, 1, :, :, self.length : end] = v
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]


def _attend_cached(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int) -> Tensor:
    """Attention of the last T of S positions over a cache: q `(B, Hq, T, d)`, k, v `(B, Hkv, S, d)`. No gradient.

    Not through FlexAttention, which would compile for a prompt: that takes longer than the prompt does.
    """
    length, first = k.shape[2], k.shape[2] - q.shape[2]
    if q.numel() == 0:
        return q
    if first == 0:
        return _Attention.apply(q, k, v, sinks, window)
    outs = []
    for queries, keys in _blocks(length, window, first):
        hidden = _hidden(queries, keys, window, q.device)
        at_queries = _at(q, range(queries.start - first, queries.stop - first))
        out, lse = _Plain.forward(at_queries, _at(k, keys), _at(v, keys), hidden, q.shape[-1] ** -0.5)
        if sinks is not None:
            out = out * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None]).unsqueeze(-1).to(out.dtype)
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


class Attention(nn.Module):
    """The attention of one block.

    Parameters: `qkv.weight ((Hq + 2·Hkv)·d, D)`, `out.weight (D, Hq·d)`, their biases, `sinks (Hq)`.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.window(layer)
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.d_model, width, bias=config.attention_bias)
        self.out = nn.Linear(self.heads * self.head_dim, config.d_model, bias=config.attention_bias)
        self.sinks = nn.Parameter(torch.empty(self.heads)) if config.attention_sinks else None

    def forward(self, x: Tensor, rotary: Tensor, cache: KVCache | None = None) -> Tensor:
        """`(B, T, D)` → `(B, T, D)`; rotary: the table of the T positions."""
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, -1, self.head_dim)
        turned = apply_rotary(qkv[:, :, : self.heads + self.kv_heads], rotary).transpose(1, 2)
        q, k = turned[:, : self.heads], turned[:, self.heads :]
        # A copy: v alone is kept for backward then, and not all of qkv.
        v = qkv[:, :, self.heads + self.kv_heads :].contiguous().transpose(1, 2)
        if cache is None:
            out = attend(q, k, v, self.sinks, self.window)
        else:
            out = _attend_cached(q, *cache.append(self.layer, k, v), self.sinks, self.window)
        return F.linear(out.transpose(1, 2).reshape(batch, length, -1), self.out.weight, self.out.bias)
