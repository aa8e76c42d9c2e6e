"""Layers from libraries of GPU kernels with our weights in them.

They need a GPU. Each adapter was written against the API that its docstring names and is tested with a stand-in of the
same signatures and layouts. Run by hand against the reference, outputs and gradients agreed too: the kernels of
ScatterMoE and Liger in Triton's interpreter, the modules of MegaBlocks and SonicMoE with torch in place of their
kernels. A library is imported when its layer is made.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_engine import MoELayer
from moe_engine.bench.plain_moe import TopKRouter, halves, interleaved, load, parameter


class ScatterMoE(nn.Module):
    """`scattermoe.mlp.GLUMLP` (0.3.0 of github.com/shawntan/scattermoe, 47b5e15) behind a router, which it has not.

    `GLUMLP(D, F, E, K)(x, weights, experts)`, SiLU by default. `experts.weight (E, 2F, D)` has ups first, then gates;
    `output_experts.weight (E, D, F)`. The weights have to be of x's dtype.
    """

    def __init__(self, layer: MoELayer) -> None:
        from scattermoe.mlp import GLUMLP

        super().__init__()
        c = layer.config
        self.router = TopKRouter(layer)
        ups_first = torch.cat((layer.w_up[..., 1::2], layer.w_up[..., 0::2]), -1)
        weights = {"experts.weight": ups_first.transpose(1, 2), "output_experts.weight": layer.w_down.transpose(1, 2)}
        self.mlp = load(GLUMLP(c.d_model, c.d_ff, c.num_experts, c.top_k), layer, weights)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        weights, experts = self.router(rows)
        return self.mlp(rows, weights.to(x.dtype), experts).view_as(x)


def from_scattermoe(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a `ScatterMoE`, under the names and in the layout of `MoELayer`'s."""
    up, gate = gradients["mlp.experts.weight"].transpose(1, 2).chunk(2, -1)
    return {
        "router.weight": gradients["router.weight"],
        "w_up": torch.stack((gate, up), -1).flatten(-2),
        "w_down": gradients["mlp.output_experts.weight"].transpose(1, 2),
    }


def megablocks(layer: MoELayer) -> nn.Module:
    """`megablocks.layers.dmoe.dMoE` (0.11.0.dev0 of github.com/databricks/megablocks, 78eea65), dropless, grouped GEMM.

    Its router divides the probabilities of the chosen by their sum, which is softmax over the chosen logits. `w1` and
    `v1 (E·F, D)` are gate and up, `w2 (E·F, D)` is down. The balance loss is off: it would be kept in a global list.
    """
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    c, dtype = layer.config, layer.w_up.dtype
    arguments = Arguments(
        hidden_size=c.d_model,
        ffn_hidden_size=c.d_ff,
        moe_num_experts=c.num_experts,
        moe_top_k=c.top_k,
        moe_normalize_expert_weights=1,
        moe_loss_weight=0,
        activation_fn=nn.functional.silu,
        mlp_type="glu",
        mlp_impl="grouped",
        bias=False,
        return_bias=False,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        device=layer.w_up.device,
    )
    weights = {
        "router.layer.weight": layer.router.weight,
        "experts.mlp.w1": layer.w_up[..., 0::2].transpose(1, 2).flatten(0, 1),
        "experts.mlp.v1": layer.w_up[..., 1::2].transpose(1, 2).flatten(0, 1),
        "experts.mlp.w2": layer.w_down.flatten(0, 1),
    }
    return load(dMoE(arguments), layer, weights)


def from_megablocks(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of what `megablocks` makes, under the names and in the layout of `MoELayer`'s."""
    router = gradients["router.layer.weight"]
    gate, up, down = (
        gradients[f"experts.mlp.{name}"].unflatten(0, (len(router), -1)) for name in ("w1", "v1", "w2")
    )  # (E, F, D)
    return {"router.weight": router, "w_up": torch.stack((gate, up), 2).flatten(1, 2).transpose(1, 2), "w_down": down}


def sonicmoe(layer: MoELayer) -> nn.Module:
    """`sonicmoe.MoE` (0.1.2.post1 of PyPI's sonic-moe), `(…, D)` → that and a balance loss.

    Its router takes softmax over the chosen logits. `c_fc.weight (E, 2F, D)` has gates and ups in turn, as ours, and
    `c_proj.weight (E, D, F)`.
    """
    from sonicmoe import MoE
    from sonicmoe.enums import ActivationType

    c = layer.config
    moe = MoE(
        num_experts=c.num_experts,
        num_experts_per_tok=c.top_k,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        activation_function=ActivationType.SWIGLU,
        add_bias=False,
        std=c.init_std,
    )
    weights = {
        "router.weight": layer.router.weight,
        "c_fc.weight": layer.w_up.transpose(1, 2),
        "c_proj.weight": layer.w_down.transpose(1, 2),
    }
    return load(moe, layer, weights)


def from_sonicmoe(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of what `sonicmoe` makes, under the names and in the layout of `MoELayer`'s."""
    return {
        "router.weight": gradients["router.weight"],
        "w_up": gradients["c_fc.weight"].transpose(1, 2),
        "w_down": gradients["c_proj.weight"].transpose(1, 2),
    }


class Liger(nn.Module):
    """`liger_kernel.ops.LigerFusedMoEFunction` (PyPI's liger-kernel 0.8.5) behind a router, which it has not.

    `apply(x (T, D), gate_up_proj (E, 2F, D), down_proj (E, D, F), experts (T, K) int32, weights (T, K))`, gates first.
    """

    def __init__(self, layer: MoELayer) -> None:
        from liger_kernel.ops import LigerFusedMoEFunction

        super().__init__()
        self.function = LigerFusedMoEFunction
        self.router = TopKRouter(layer)
        self.gate_up_proj = parameter(halves(layer.w_up).transpose(1, 2))
        self.down_proj = parameter(layer.w_down.transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        weights, experts = self.router(rows)
        return self.function.apply(rows, self.gate_up_proj, self.down_proj, experts.int(), weights).view_as(x)


def from_liger(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a `Liger`'s parameters under the names and in the layout of `MoELayer`'s."""
    return {
        "router.weight": gradients["router.weight"],
        "w_up": interleaved(gradients["gate_up_proj"].transpose(1, 2)),
        "w_down": gradients["down_proj"].transpose(1, 2),
    }
