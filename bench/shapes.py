"""One MoE layer as the checks of kernels need it: its sizes, and the least memory traffic of its step.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


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


def versions() -> dict[str, str]:
    """Versions of what decides a result, for its row."""
    packages = ("moe-engine", "torch", "triton")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
