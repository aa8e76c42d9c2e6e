"""The MoE layer in plain PyTorch, as it is written without kernels of one's own: a loop of GEMMs, or `F.grouped_mm`.

Both sort the rows by expert once, multiply, and add the results up by token, with ordinary autograd. They differ in how
the sorted rows meet the experts' weights. Gate and up columns are two halves here, as slices with a
stride cost time.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k, N = T·K
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_engine import MoELayer
from moe_engine.config import ACTIVATIONS

grouped_mm: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
"""PyTorch's grouped GEMM, public or not yet; None in a release without it."""


def halves(w: Tensor) -> Tensor:
    """`(…, 2F)` with even columns for gates and odd ones for ups → gates first, then ups."""
    return torch.cat((w[..., 0::2], w[..., 1::2]), -1)


def interleaved(w: Tensor) -> Tensor:
    """The inverse of `halves`."""
    return torch.stack(w.chunk(2, -1), -1).flatten(-2)


def parameter(values: Tensor | None) -> nn.Parameter | None:
    """A parameter of its own with these values; None stays None."""
    return None if values is None else nn.Parameter(values.detach().clone(memory_format=torch.contiguous_format))


def load(module: nn.Module, layer: MoELayer, weights: dict[str, Tensor]) -> nn.Module:
    """A module with these weights, on the device and of the dtype of a layer."""
    module.to(layer.w_up.device, layer.w_up.dtype)
    module.load_state_dict({name: value.detach() for name, value in weights.items()})
    return module


class TopKRouter(nn.Module):
    """The router of a layer, softmax over the chosen logits, in fp32 or better as `moe_engine.router` has it."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.top_k = layer.config.top_k
        self.weight, self.bias = parameter(layer.router.weight), parameter(layer.router.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(T, D)` → weights and experts `(T, K)`, the latter int64."""
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        logits, experts = F.linear(x.to(wide), self.weight.to(wide), bias).topk(self.top_k)
        return logits.softmax(-1), experts


class PlainMoE(nn.Module):
    """What the two have in common.

    Parameters: those of `MoELayer`, under its names, but `w_up` and `b_up` in halves.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.experts = layer.config.num_experts
        self.act = ACTIVATIONS[layer.config.activation]
        self.router = TopKRouter(layer)
        self.w_up, self.w_down = parameter(halves(layer.w_up)), parameter(layer.w_down)
        self.b_up = None if layer.b_up is None else parameter(halves(layer.b_up))
        self.b_down = parameter(layer.b_down)

    def forward(self, x: Tensor) -> Tensor:
        """`(…, D)` → the same."""
        rows = x.reshape(-1, x.shape[-1])
        weights, experts = self.router(rows)
        order = experts.flatten().argsort(stable=True)  # N, sorted row → flat slot
        token = order // weights.shape[1]
        groups = self.groups(torch.bincount(experts.flatten(), minlength=self.experts))
        h = self.product(rows.index_select(0, token), self.w_up, self.b_up, groups)  # (N, 2F)
        y = self.product(self.activate(h), self.w_down, self.b_down, groups)  # (N, D)
        y = y * weights.flatten().index_select(0, order)[:, None].to(y.dtype)
        return torch.zeros_like(rows).index_add(0, token, y).view_as(x)

    def activate(self, h: Tensor) -> Tensor:
        """`(N, 2F)` → `(N, F)`."""
        gate, up = h.chunk(2, -1)
        if self.act == ACTIVATIONS["swiglu"]:
            return F.silu(gate) * up
        gate, up = gate.clamp(max=self.act.limit), up.clamp(-self.act.limit, self.act.limit)
        return gate * torch.sigmoid(self.act.alpha * gate) * (up + self.act.offset)

    def groups(self, counts: Tensor) -> Any:
        """What `product` takes for the rows of each expert."""
        raise NotImplementedError

    def product(self, rows: Tensor, w: Tensor, bias: Tensor | None, groups: Any) -> Tensor:
        """Sorted rows `(N, in)` times their experts' `(E, in, out)`, plus `(E, out)`."""
        raise NotImplementedError


class ExpertLoop(PlainMoE):
    """One BLAS call per expert and projection. The host waits for the counts."""

    def groups(self, counts: Tensor) -> list[int]:
        return counts.tolist()

    def product(self, rows: Tensor, w: Tensor, bias: Tensor | None, groups: list[int]) -> Tensor:
        # unbind, for indexing makes a gradient of the size of all experts' weights for every expert.
        parts = zip(rows.split(groups), w.unbind(), strict=True)
        if bias is None:
            return torch.cat([torch.mm(part, m) for part, m in parts])
        return torch.cat([torch.addmm(b, part, m) for b, (part, m) in zip(bias.unbind(), parts, strict=True)])


class GroupedMM(PlainMoE):
    """`F.grouped_mm` for each projection: fp32, bf16 or fp16, rows of weights and of activations at 16 bytes."""

    def groups(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        return counts, counts.cumsum(0, dtype=torch.int32)

    def product(self, rows: Tensor, w: Tensor, bias: Tensor | None, groups: tuple[Tensor, Tensor]) -> Tensor:
        counts, offsets = groups
        out = grouped_mm(rows, w, offs=offsets)
        return out if bias is None else out + bias.repeat_interleave(counts, 0, output_size=len(rows))


def from_plain(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a `PlainMoE`'s parameters in the layout of `MoELayer`'s."""
    return {name: interleaved(value) if name in ("w_up", "b_up") else value for name, value in gradients.items()}
