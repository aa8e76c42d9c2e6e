"""The readable oracle: the whole model with a loop over experts, in any dtype, fp64 included.

Nothing here is shared with the fast path. Tests hold kernels, layer and model against it.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moe_engine.config import ACTIVATIONS, Activation, ModelConfig, MoEConfig


class MoEReference(NamedTuple):
    """Output of `moe`: `out (T, D)`, routing, and the statistics of `RouterStats`."""

    out: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    expert_counts: Tensor
    prob_sum: Tensor
    lse_sq: Tensor
    entropy: Tensor


def gated_activation(h: Tensor, act: Activation) -> Tensor:
    """`g·σ(alpha·g)·(u + offset)` of interleaved rows `(…, 2F)` → `(…, F)`.

    The bounds are written with where, because the gradient passes at the bound itself, which torch.clamp does in
    some releases and not in others.
    """
    gate, up = h[..., 0::2], h[..., 1::2]
    gate = torch.where(gate > act.limit, act.limit, gate)
    up = torch.where(up > act.limit, act.limit, torch.where(up < -act.limit, -act.limit, up))
    return gate * torch.sigmoid(act.alpha * gate) * (up + act.offset)


def moe(x: Tensor, params: Mapping[str, Tensor], config: MoEConfig) -> MoEReference:
    """One MoE layer.

    Args:
        x: `(T, D)`.
        params: `router.weight (E, D)`, `router.bias (E)`, `w_up (E, D, 2F)`, `b_up (E, 2F)`, `w_down (E, F, D)`,
            `b_down (E, D)`; the biases may be missing. `router.select_bias (E)`, if given, is added to the logits to
            choose experts and for nothing else.
        config: sizes and choices; the backend is ignored.
    """
    logits = x @ params["router.weight"].T
    if "router.bias" in params:
        logits = logits + params["router.bias"]
    prob = logits.softmax(-1)
    # By falling logit; among equals the lower expert first.
    selected_by = logits.detach()
    if "router.select_bias" in params:
        selected_by = selected_by + params["router.select_bias"]
    order = torch.sort(selected_by, dim=-1, descending=True, stable=True).indices
    topk_idx = order[:, : config.top_k]
    if config.gate == "softmax_over_topk":
        topk_weights = logits.gather(1, topk_idx).softmax(-1)
    else:
        topk_weights = prob.gather(1, topk_idx)

    out = torch.zeros_like(x)
    for e in range(config.num_experts):
        token, slot = torch.where(topk_idx == e)
        h = x[token] @ params["w_up"][e]
        if "b_up" in params:
            h = h + params["b_up"][e]
        y = gated_activation(h, ACTIVATIONS[config.activation]) @ params["w_down"][e]
        if "b_down" in params:
            y = y + params["b_down"][e]
        out = out.index_add(0, token, topk_weights[token, slot, None] * y)

    counts = torch.stack([(topk_idx == e).sum() for e in range(config.num_experts)])
    return MoEReference(
        out=out,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        expert_counts=counts,
        prob_sum=prob.sum(0),
        lse_sq=logits.logsumexp(-1).square().sum(),
        entropy=-torch.special.xlogy(prob, prob).sum().detach(),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / √(mean(x²) + eps) · weight`."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope_frequencies(config: ModelConfig) -> tuple[list[float], float]:
    """Rotary angles per position, one for each pair of dimensions, and the scale of cos and sin.

    YaRN (Peng et al., arXiv 2309.00071) as gpt-oss has it: dimensions that turn more than beta_fast times over the
    original context keep their frequency, those that turn less than beta_slow times have it divided by the factor,
    a linear ramp over the dimension index lies between; the scale is 0.1·ln(factor) + 1.
    """
    half = config.head_dim // 2
    frequencies = [config.rope_theta ** (-i / half) for i in range(half)]
    if config.rope_factor == 1:
        return frequencies, 1.0

    def dimension(rotations: float) -> float:  # the (fractional) pair that turns so often over the original context
        return half * math.log(config.rope_original_context / (rotations * 2 * math.pi)) / math.log(config.rope_theta)

    low = max(dimension(config.rope_beta_fast), 0)
    high = min(dimension(config.rope_beta_slow), config.head_dim - 1)
    blended = []
    for i, frequency in enumerate(frequencies):
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        blended.append(frequency * (1 - interpolated) + frequency / config.rope_factor * interpolated)
    return blended, 0.1 * math.log(config.rope_factor) + 1.0


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int) -> Tensor:
    """Causal attention with a sliding window and sinks, one query head at a time.

    Args:
        q: `(T, Hq, d)`; k, v: `(T, Hkv, d)`; sinks: `(Hq)` or None.
        window: a query sees this many tokens, itself included; 0: all before it.
    Returns:
        `(T, Hq, d)`.
    """
    tokens, heads, dim = q.shape
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    hidden = distance < 0
    if window:
        hidden = hidden | (distance >= window)
    out = []
    for head in range(heads):
        kv = head * k.shape[1] // heads
        scores = (q[:, head] @ k[:, kv].T / math.sqrt(dim)).masked_fill(hidden, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].expand(tokens, 1)], dim=1)
        out.append(scores.softmax(-1)[:, :tokens] @ v[:, kv])
    return torch.stack(out, dim=1)


def rotate(x: Tensor, frequencies: list[float], scale: float) -> Tensor:
    """Rotary embedding of `(T, H, d)` at positions 0 … T − 1; dimension i pairs with i + d/2."""
    angle = torch.arange(x.shape[0], dtype=x.dtype)[:, None] * torch.tensor(frequencies, dtype=x.dtype)
    cos, sin = (scale * angle.cos())[:, None], (scale * angle.sin())[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class ModelReference(NamedTuple):
    """Output of `model`: `logits (T, V)`, the residual stream after each block, each layer's routing."""

    logits: Tensor
    hidden: list[Tensor]
    moe: list[MoEReference]


def model(tokens: Tensor, params: Mapping[str, Tensor], config: ModelConfig) -> ModelReference:
    """The whole decoder on one sequence.

    Args:
        tokens: `(T)` ids.
        params: the state dict of `Transformer`, in any dtype.
        config: the model's configuration.
    """
    frequencies, scale = rope_frequencies(config)
    x = params["embedding.weight"][tokens]
    hidden, routing = [], []
    for layer in range(config.num_layers):
        prefix = f"blocks.{layer}."
        block = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
        normed = rms_norm(x, block["attention_norm.weight"], config.norm_eps)
        qkv = normed @ block["attention.qkv.weight"].T
        if "attention.qkv.bias" in block:
            qkv = qkv + block["attention.qkv.bias"]
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = qkv.view(len(tokens), -1, config.head_dim).split(sizes, dim=1)
        q, k = rotate(q, frequencies, scale), rotate(k, frequencies, scale)
        attended = attention(q, k, v, block.get("attention.sinks"), config.window(layer)).flatten(1)
        attended = attended @ block["attention.out.weight"].T
        if "attention.out.bias" in block:
            attended = attended + block["attention.out.bias"]
        x = x + attended
        normed = rms_norm(x, block["moe_norm.weight"], config.norm_eps)
        experts = {name.removeprefix("moe."): value for name, value in block.items() if name.startswith("moe.")}
        result = moe(normed, experts, config.moe)
        x = x + result.out
        hidden.append(x)
        routing.append(result)
    x = rms_norm(x, params["head.norm.weight"], config.norm_eps)
    head = params["embedding.weight"] if config.tie_embeddings else params["head.weight"]
    return ModelReference(logits=x @ head.T, hidden=hidden, moe=routing)
