"""The MoE graph on the Triton kernels of `kernels/`, as `MoELayer` calls it."""

from __future__ import annotations

from torch import Tensor

from moe_engine.config import Activation
from moe_engine.kernels import expert_mlp as fused
from moe_engine.kernels import gating, launch, permutation
from moe_engine.router import RouterStats


def check_available() -> None:
    """Raise ValueError where no kernel could run, with Triton's reason."""
    try:
        launch.target()
    except RuntimeError as error:
        needs = "backend: 'triton' needs a GPU that Triton can use, or its interpreter (TRITON_INTERPRET=1)"
        raise ValueError(f"{needs}; Triton says: {error}") from error


def route(
    logits: Tensor, top_k: int, mode: str, select_bias: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], RouterStats]:
    """Softmax, top-k, statistics and the order of the rows, without a word to the host.

    Args:
        logits: `(T, E)` fp32.
        top_k: experts per token K.
        mode: `softmax_over_topk` or `softmax_then_topk`, see `MoEConfig.gate`.
        select_bias: `(E)` fp32, added to the logits to choose experts and for nothing else; None: no bias.
    Returns:
        (topk_weights `(T, K)`, expert_offsets `(E + 1)`, permutation `(N)`, inverse_permutation `(N)`), statistics.
    """
    gated = gating.gate(logits, top_k, mode, select_bias)
    order = permutation.sort_by_expert(gated.topk_idx, gated.expert_offsets, gated.block_offsets)
    stats = RouterStats(gated.expert_counts, gated.prob_sum, gated.lse_sq, gated.entropy)
    return (gated.topk_weights, gated.expert_offsets, *order), stats


def expert_mlp(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    topk_weights: Tensor,
    expert_offsets: Tensor,
    order: Tensor,
    inverse: Tensor,
    activation: Activation,
    save: str = "h",
    autotune: bool = False,
) -> Tensor:
    """See `moe_engine.kernels.expert_mlp.expert_mlp`; `order`, `inverse` are the permutation and its inverse."""
    routed = (topk_weights, expert_offsets, order, inverse)
    options = {"save": save, "autotune": autotune}
    return fused.expert_mlp(x.contiguous(), w_up, b_up, w_down, b_down, *routed, *activation, **options)
