"""Other people's models of the same shape, with our weights in them. Layers are in `layer_peers`."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_engine import ModelConfig, Transformer
from moe_engine.bench.layer_peers import mixtral_experts
from moe_engine.bench.shapes import MIXTRAL_LAYER

MIXTRAL_STYLE = {
    "attention_bias": False,
    "attention_sinks": False,
    "sliding_window": 0,
    "rope_factor": 1.0,
    **MIXTRAL_LAYER,
}


def mixtral_weights(model: Transformer) -> dict[str, Tensor]:
    """The state dict of transformers' Mixtral (5.x layout) that computes what a Mixtral-style `Transformer` does."""
    config, weights = model.config, {}
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    for name, value in model.state_dict().items():
        if not name.startswith("blocks."):
            continue
        _, layer, part = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        match part:
            case "attention_norm.weight":
                weights[prefix + "input_layernorm.weight"] = value
            case "moe_norm.weight":
                weights[prefix + "post_attention_layernorm.weight"] = value
            case "attention.qkv.weight":
                for letter, rows in zip("qkv", value.split([h * config.head_dim for h in heads]), strict=True):
                    weights[f"{prefix}self_attn.{letter}_proj.weight"] = rows
            case "attention.out.weight":
                weights[prefix + "self_attn.o_proj.weight"] = value
            case "moe.router.weight":
                weights[prefix + "mlp.gate.weight"] = value
            case "moe.w_up":
                experts = mixtral_experts(value, model.get_parameter(f"blocks.{layer}.moe.w_down").detach())
                weights.update({f"{prefix}mlp.experts.{key}": values for key, values in experts.items()})
            case "moe.w_down":
                pass  # with w_up
            case _:
                raise ValueError(f"{name}: Mixtral has no such parameter")
    weights["model.embed_tokens.weight"] = model.embedding.weight.detach()
    weights["model.norm.weight"] = model.head.norm.weight.detach()
    weights["lm_head.weight"] = model.head.weight.detach()
    return weights


def mixtral(model: Transformer, experts: str = "grouped_mm") -> torch.nn.Module:
    """transformers' Mixtral with the weights of a Mixtral-style `Transformer`.

    Args:
        model: made with `MIXTRAL_STYLE`.
        experts: transformers' `experts_implementation`.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    c: ModelConfig = model.config
    config = MixtralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        num_local_experts=c.num_experts,
        num_experts_per_tok=c.top_k,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        sliding_window=None,
        output_router_logits=True,
        use_cache=False,
        tie_word_embeddings=False,
    )
    peer = MixtralForCausalLM._from_config(config, experts_implementation=experts, attn_implementation="sdpa")
    peer.load_state_dict(mixtral_weights(model))
    return peer
