"""Other people's MoE layers with our weights in them, as one kind of thing; and the layer as plain PyTorch has it.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k, N = T·K
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from moe_engine import MoEConfig, MoELayer
from moe_engine.bench import kernel_libraries as libraries
from moe_engine.bench import plain_moe
from moe_engine.bench.plain_moe import ExpertLoop, GroupedMM, from_plain, halves, interleaved, load
from moe_engine.bench.shapes import MIXTRAL_LAYER

STYLES: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL_LAYER,
    "gpt-oss": {"activation": "swiglu_oai", "expert_bias": True, "router_bias": True},
}
"""Fields of `MoEConfig`."""


def _no_extra_bytes(tokens: int, config: MoEConfig, itemsize: int) -> int:
    return 0


def _no_limits(config: MoEConfig, dtype: torch.dtype) -> str:
    return ""


@dataclass(frozen=True)
class Peer:
    """A layer to measure beside ours.

    Attributes:
        name: what its rows are called; no two are the same.
        style: the key in `STYLES` of what it computes.
        package: what has to be importable; "" for torch alone.
        install: how to get it.
        gpu_only: whether it needs a GPU.
        make: from a layer to a module, `(1, T, D)` → `(1, T, D)` or a tuple that begins with it, with the layer's
            weights, on its device and of its dtype. What the package raises is passed on.
        ours: from the gradients of the module's parameters, by name, to those of `MoELayer`'s, in its layout.
        extra_bytes: `(tokens, config, itemsize)` → memory that it takes in a step beyond what such a layer needs.
        limits: `(config, dtype)` → "", or what of it the peer cannot do, style and gate aside.
    """

    name: str
    style: str
    package: str
    install: str
    gpu_only: bool
    make: Callable[[MoELayer], nn.Module]
    ours: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    extra_bytes: Callable[[int, MoEConfig, int], int] = _no_extra_bytes
    limits: Callable[[MoEConfig, torch.dtype], str] = _no_limits

    def missing(self) -> str:
        """ "" where the package can be imported; else why not, and how to install it."""
        if self.package:
            try:
                importlib.import_module(self.package)
            except ImportError as error:
                return f"not installed ({error}): {self.install}"
        return ""

    def supports(self, config: MoEConfig, dtype: torch.dtype) -> str:
        """ "" where it computes what a `MoELayer` of this configuration does; else why not."""
        if config.gate != "softmax_over_topk":
            return f"expected gate softmax_over_topk, got {config.gate}"
        if config.router_balance != "loss":
            return f"expected router_balance loss, got {config.router_balance}"
        for field, expected in STYLES[self.style].items():
            if getattr(config, field) != expected:
                return f"expected {field} {expected}, got {getattr(config, field)}"
        return self.limits(config, dtype)


def _dtypes(why: str, *dtypes: torch.dtype, multiple_of: int = 1) -> Callable[[MoEConfig, torch.dtype], str]:
    """Limits of a peer to some types, and to widths that are multiples of some bytes."""

    def limits(config: MoEConfig, dtype: torch.dtype) -> str:
        if dtype not in dtypes:
            return f"expected {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {dtype}: {why}"
        for field, width in (("d_model", config.d_model), ("d_ff", config.d_ff)):
            if width * dtype.itemsize % multiple_of:
                return f"expected {field} a multiple of {multiple_of // dtype.itemsize}, got {width}: {why}"
        return ""

    return limits


# torch


def _grouped_mm_limits(config: MoEConfig, dtype: torch.dtype) -> str:
    if plain_moe.grouped_mm is None:
        return f"torch {torch.__version__} has no grouped_mm"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return _dtypes("grouped_mm has no others, and wants rows at 16 bytes", *dtypes, multiple_of=16)(config, dtype)


# transformers


def mixtral_experts(w_up: Tensor, w_down: Tensor) -> dict[str, Tensor]:
    """Our expert weights in Mixtral's layout: `gate_up_proj (E, 2F, D)`, gates first, and `down_proj (E, D, F)`."""
    return {"gate_up_proj": halves(w_up).transpose(1, 2), "down_proj": w_down.transpose(1, 2)}


def mixtral_block(layer: MoELayer, experts: str) -> nn.Module:
    """transformers' Mixtral block (5.x), `(B, T, D)` → `(B, T, D)`, with the weights of a layer without biases.

    Args:
        layer: with plain SwiGLU, no bias anywhere, softmax over the chosen logits.
        experts: transformers' `experts_implementation`.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    block = MixtralSparseMoeBlock(_transformers_config(MixtralConfig, layer.config, experts))
    weights = {f"experts.{name}": value for name, value in mixtral_experts(layer.w_up, layer.w_down).items()}
    return load(block, layer, weights | {"gate.weight": layer.router.weight})


def from_mixtral_block(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a `mixtral_block`'s parameters under the names and in the layout of `MoELayer`'s."""
    return {
        "router.weight": gradients["gate.weight"],
        "w_up": interleaved(gradients["experts.gate_up_proj"].transpose(1, 2)),
        "w_down": gradients["experts.down_proj"].transpose(1, 2),
    }


_GPT_OSS = {
    "router.weight": "router.weight",
    "router.bias": "router.bias",
    "experts.gate_up_proj": "w_up",
    "experts.gate_up_proj_bias": "b_up",
    "experts.down_proj": "w_down",
    "experts.down_proj_bias": "b_down",
}


def gpt_oss_block(layer: MoELayer, experts: str) -> nn.Module:
    """transformers' gpt-oss block (5.x), `(B, T, D)` → that and its gate weights. Its layout is ours.

    Args:
        layer: with the bounded activation, all biases, softmax over the chosen logits.
        experts: transformers' `experts_implementation`.
    """
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    block = GptOssMLP(_transformers_config(GptOssConfig, layer.config, experts))
    return load(block, layer, {theirs: layer.get_parameter(name) for theirs, name in _GPT_OSS.items()})


def from_gpt_oss_block(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a `gpt_oss_block`'s parameters under the names of `MoELayer`'s."""
    return {_GPT_OSS[theirs]: value for theirs, value in gradients.items()}


def _transformers_config(kind: Callable[..., Any], config: MoEConfig, experts: str) -> Any:
    return kind(
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        experts_implementation=experts,
    )


def _transformers_limits(experts_class: str, experts: str, config: MoEConfig, dtype: torch.dtype) -> str:
    """Whether this transformers can be told how to compute its experts; one that cannot would say nothing."""
    if importlib.util.find_spec("transformers") is None:
        return ""  # `missing` says so
    module, _, name = experts_class.rpartition(".")
    try:
        known = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
        decorated = getattr(importlib.import_module(module), name).forward
    except (ImportError, AttributeError):
        known, decorated = (), None
    if not hasattr(decorated, "__wrapped__") or (experts != "eager" and experts not in known):
        found = metadata.version("transformers")
        return f"expected transformers with experts_implementation {experts} for {name} (5.x has it), got {found}"
    return _grouped_mm_limits(config, dtype) if experts == "grouped_mm" else ""


def _batched_mm_bytes(tokens: int, config: MoEConfig, itemsize: int) -> int:
    """Copies of its expert's weights for each routed row: 3·D·F for backward, and D·F more while gradients are made."""
    return 4 * tokens * config.top_k * config.d_model * config.d_ff * itemsize


def _transformers_peers() -> tuple[Peer, ...]:
    peers = []
    for style, label, make, ours, experts_class in (
        ("mixtral", "Mixtral", mixtral_block, from_mixtral_block, "mixtral.modeling_mixtral.MixtralExperts"),
        ("gpt-oss", "gpt-oss", gpt_oss_block, from_gpt_oss_block, "gpt_oss.modeling_gpt_oss.GptOssExperts"),
    ):
        for experts in ("eager", "grouped_mm", "batched_mm"):
            peer = Peer(
                f"transformers {label}, {experts}",
                style,
                "transformers",
                "pip install 'transformers>=5'",
                gpu_only=False,
                make=functools.partial(make, experts=experts),
                ours=ours,
                extra_bytes=_batched_mm_bytes if experts == "batched_mm" else _no_extra_bytes,
                limits=functools.partial(_transformers_limits, f"transformers.models.{experts_class}", experts),
            )
            peers.append(peer)
    return tuple(peers)


def _megablocks_limits(config: MoEConfig, dtype: torch.dtype) -> str:
    if config.num_experts * config.d_ff < 128:
        return f"expected num_experts·d_ff of at least 128, got {config.num_experts * config.d_ff}"
    why = "its grouped GEMM has no others, and wants rows at 16 bytes"
    return _dtypes(why, torch.bfloat16, multiple_of=16)(config, dtype)


_TF32 = "its kernels round fp32 to TF32"
_HALF = (torch.bfloat16, torch.float16)

PEERS: tuple[Peer, ...] = (
    *_transformers_peers(),
    *(Peer(f"expert loop, {style}", style, "", "", False, ExpertLoop, from_plain) for style in STYLES),
    *(
        Peer(f"torch grouped_mm, {style}", style, "", "", False, GroupedMM, from_plain, limits=_grouped_mm_limits)
        for style in STYLES
    ),
    Peer(
        "ScatterMoE",
        "mixtral",
        "scattermoe",
        "pip install git+https://github.com/shawntan/scattermoe",
        gpu_only=True,
        make=libraries.ScatterMoE,
        ours=libraries.from_scattermoe,
        limits=_dtypes(_TF32, *_HALF),
    ),
    Peer(
        "MegaBlocks",
        "mixtral",
        "megablocks",
        "pip install 'megablocks[gg]'",
        gpu_only=True,
        make=libraries.megablocks,
        ours=libraries.from_megablocks,
        limits=_megablocks_limits,
    ),
    Peer(
        "SonicMoE",
        "mixtral",
        "sonicmoe",
        "pip install sonic-moe (Python 3.12 or newer; Hopper or Blackwell)",
        gpu_only=True,
        make=libraries.sonicmoe,
        ours=libraries.from_sonicmoe,
        limits=_dtypes("its GEMMs have no others, and want rows at 16 bytes", *_HALF, multiple_of=16),
    ),
    Peer(
        "Liger fused MoE",
        "mixtral",
        "liger_kernel",
        "pip install liger-kernel",
        gpu_only=True,
        make=libraries.Liger,
        ours=libraries.from_liger,
        limits=_dtypes(_TF32, *_HALF),
    ),
)
