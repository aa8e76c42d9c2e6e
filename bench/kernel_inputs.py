"""The inputs of the operations that `moe-bench kernels` times.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k, N = T·K rows sorted by expert
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from moe_engine import torch_backend
from moe_engine.bench.shapes import LayerShape, routing
from moe_engine.config import ACTIVATIONS, MoEConfig
from moe_engine.router import RouterStats

LAYERS = 24
"""Layers whose losses are made in one launch: the 8b model's."""


@dataclass(frozen=True)
class Problem:
    """A layer, what is routed through it, and where."""

    shape: str
    moe: MoEConfig
    routing: str
    tokens: int
    dtype: torch.dtype
    device: torch.device

    @property
    def sizes(self) -> LayerShape:
        """The numbers in it."""
        moe = self.moe
        return LayerShape(self.tokens, moe.d_model, moe.d_ff, moe.num_experts, moe.top_k, self.dtype.itemsize)

    @property
    def settings(self) -> dict[str, str | int]:
        """As a row has them."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"shape": self.shape, "tokens": self.tokens, "routing": self.routing, "dtype": dtype}


class Inputs:
    """The tensors of a problem, each made on the device when it is first asked for."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.top_k = problem, problem.moe.top_k
        self.act = ACTIVATIONS[problem.moe.activation]

    def normal(self, seed: int, *shape: int, dtype: torch.dtype | None = None, std: float = 1.0) -> Tensor:
        """Normal values on the device; of the problem's dtype unless another is given."""
        generator = torch.Generator(self.problem.device).manual_seed(seed)
        dtype = dtype or self.problem.dtype
        return torch.randn(shape, generator=generator, dtype=dtype, device=self.problem.device).mul_(std)

    def _expert_parameter(self, seed: int, *shape: int, std: float) -> Tensor:
        return self.normal(seed, self.problem.moe.num_experts, *shape, std=std)

    @cached_property
    def logits(self) -> Tensor:
        """`(T, E)` fp32."""
        p = self.problem
        return routing(p.routing, p.tokens, p.moe.num_experts, p.moe.top_k).to(p.device)

    @cached_property
    def _gated(self) -> tuple[Tensor, Tensor, RouterStats]:
        return torch_backend.gate(self.logits, self.top_k, self.problem.moe.gate)

    @cached_property
    def topk_idx(self) -> Tensor:
        """`(T, K)` int32."""
        return self._gated[0]

    @cached_property
    def topk_weights(self) -> Tensor:
        """`(T, K)` fp32."""
        return self._gated[1]

    @cached_property
    def stats(self) -> RouterStats:
        """Of `LAYERS` layers, each with 1 % more probability and log-sum-exp than the one before."""
        one = self._gated[2]
        grow = 1 + 0.01 * torch.arange(LAYERS, device=self.problem.device)
        counts = one.expert_counts.repeat(LAYERS, 1)
        return RouterStats(counts, grow[:, None] * one.prob_sum, grow * one.lse_sq, grow * one.entropy)

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor]:
        return torch_backend.sort_by_expert(self.topk_idx, self._gated[2].expert_counts)

    @cached_property
    def expert_offsets(self) -> Tensor:
        """`(E + 1)` int32."""
        return self._order[0]

    @cached_property
    def groups(self) -> list[slice]:
        """The rows of each expert, as the host has them."""
        return [slice(*bounds) for bounds in pairwise(self.expert_offsets.tolist())]

    @cached_property
    def permutation(self) -> Tensor:
        """`(N)` int32."""
        return self._order[1]

    @cached_property
    def inverse(self) -> Tensor:
        """`(N)` int32."""
        return invert(self.permutation)

    @cached_property
    def token_of(self) -> Tensor:
        """`(N)` int32, the token of a sorted row."""
        return self.permutation // self.top_k

    @cached_property
    def x(self) -> Tensor:
        """`(T, D)`."""
        return self.normal(1, self.problem.tokens, self.problem.moe.d_model)

    @cached_property
    def grad_out(self) -> Tensor:
        """`(T, D)`."""
        return self.normal(2, self.problem.tokens, self.problem.moe.d_model)

    @cached_property
    def y(self) -> Tensor:
        """`(N, D)`."""
        return self.normal(3, self.problem.tokens * self.top_k, self.problem.moe.d_model)

    @cached_property
    def a(self) -> Tensor:
        """`(N, F)`."""
        return self.normal(4, self.problem.tokens * self.top_k, self.problem.moe.d_ff)

    @cached_property
    def grad_h(self) -> Tensor:
        """`(N, 2F)`."""
        return self.normal(5, self.problem.tokens * self.top_k, 2 * self.problem.moe.d_ff)

    @cached_property
    def w_up(self) -> Tensor:
        """`(E, D, 2F)`."""
        moe = self.problem.moe
        return self._expert_parameter(6, moe.d_model, 2 * moe.d_ff, std=moe.d_model**-0.5)

    @cached_property
    def w_down(self) -> Tensor:
        """`(E, F, D)`."""
        moe = self.problem.moe
        return self._expert_parameter(7, moe.d_ff, moe.d_model, std=moe.d_ff**-0.5)

    @cached_property
    def b_up(self) -> Tensor | None:
        """`(E, 2F)`, or None."""
        moe = self.problem.moe
        return self._expert_parameter(8, 2 * moe.d_ff, std=0.3) if moe.expert_bias else None

    @cached_property
    def b_down(self) -> Tensor | None:
        """`(E, D)`, or None."""
        moe = self.problem.moe
        return self._expert_parameter(9, moe.d_model, std=0.3) if moe.expert_bias else None

    @cached_property
    def grad_gate(self) -> list[Tensor]:
        """Gradients of topk_weights `(T, K)`, prob_sum `(E)` and lse_sq, all fp32."""
        p, fp32 = self.problem, torch.float32
        return [
            self.normal(10, p.tokens, self.top_k, dtype=fp32),
            self.normal(11, p.moe.num_experts, dtype=fp32),
            torch.tensor(0.1, device=p.device),
        ]

    @cached_property
    def grad_losses(self) -> list[Tensor]:
        """Gradients of the two losses, `(LAYERS)` fp32 each."""
        return [self.normal(seed, LAYERS, dtype=torch.float32) for seed in (12, 13)]


def invert(permutation: Tensor) -> Tensor:
    """The permutation that undoes another one."""
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), dtype=permutation.dtype, device=permutation.device)
    return inverse
