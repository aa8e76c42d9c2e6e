"""The MoE layers that benchmarks speak of: their sizes, the routing they get, and the least memory traffic of a step.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_engine.config import MoEConfig
from moe_engine.presets import preset
from moe_engine.testing import normal, routing_logits

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

MIXTRAL_LAYER = {"activation": "swiglu", "expert_bias": False, "router_bias": False}
"""What a layer of Mixtral's manner is in ours: plain SwiGLU, no biases."""

SHAPES: dict[str, MoEConfig] = {
    "8b": preset("8b").moe,
    "gpt-oss-20b": MoEConfig(2880, 2880, 32, 4),
    "mixtral-8x7b": MoEConfig(4096, 14336, 8, 2, **MIXTRAL_LAYER),
    "olmoe": MoEConfig(2048, 1024, 64, 8, gate="softmax_then_topk", **MIXTRAL_LAYER),
    "qwen3-30b-a3b": MoEConfig(2048, 768, 128, 8, **MIXTRAL_LAYER),
    "cpu": MoEConfig(512, 1024, 8, 2),
}
"""Layers of models that people train, from their published configurations; `cpu` is one that a CPU does in a second."""

ROUTING = ("balanced", "skewed", "one_hot")
"""How tokens spread over the experts: evenly but for chance; each expert e^½ times fewer than the one before it; every
token to the same K."""


def routing(kind: str, tokens: int, experts: int, top_k: int, seed: int = 0) -> Tensor:
    """Router logits `(T, E)` in fp32 of a kind in `ROUTING`."""
    if kind != "one_hot":
        return routing_logits(kind, tokens, experts, seed)
    logits = normal(tokens, experts, seed=seed, dtype=torch.float32)
    logits[:, :top_k] += 30
    return logits


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer and of what goes through it."""

    tokens: int
    d_model: int
    d_ff: int
    experts: int
    top_k: int
    itemsize: int = 2

    def floors(self, save: str = "h") -> dict[str, int]:
        """Bytes that the expert MLP moves, forward and backward, when every launch touches each of its tensors once.

        forward     up-projection: x, w_up in; h, a out. Down-projection: a, w_down in; y out. Combine: y in; out out.
        backward    gradient of a: grad_out, w_down, h in; s·a, grad_h out. Gradients of the weights: s·a, grad_out in;
                    x, grad_h in; the gradients out. Gradient of x: grad_h, w_up in; its rows out and in; grad_x out.

        With save = `x` h is not written in forward, and computed again in backward: x, w_up in; h out.
        """
        t, d, f, e, k = self.tokens, self.d_model, self.d_ff, self.experts, self.top_k
        td, tkd, tkf, edf = t * d, t * k * d, t * k * f, e * d * f
        forward = 2 * td + 2 * tkd + 4 * tkf + 3 * edf
        backward = 4 * td + 2 * tkd + 10 * tkf + 6 * edf
        if save == "x":
            forward -= 2 * tkf
            backward += td + 2 * edf + 2 * tkf
        return {"forward": self.itemsize * forward, "backward": self.itemsize * backward}
