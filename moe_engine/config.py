"""Configurations of the MoE layer and of the whole model: plain frozen data, validated when made.

D = d_model, F = d_ff (expert hidden width), E = num_experts, K = top_k
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

BACKENDS = ("auto", "torch", "triton")
GATES = ("softmax_over_topk", "softmax_then_topk")
SAVE = ("h", "x")
ROUTER_BALANCE = ("loss", "bias")


class Activation(NamedTuple):
    """Constants of the gated activation `g·σ(alpha·g)·(u + offset)`, g = min(gate, limit), u = clamp(up, ±limit)."""

    alpha: float
    offset: float
    limit: float


ACTIVATIONS = {
    "swiglu": Activation(alpha=1.0, offset=0.0, limit=math.inf),  # Shazeer 2020, arXiv 2002.05202
    "swiglu_oai": Activation(alpha=1.702, offset=1.0, limit=7.0),  # gpt-oss
}


def _check(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _check_positive(config: object, *names: str, expected: str = "a positive integer") -> None:
    for name in names:
        value = getattr(config, name)
        _check(isinstance(value, int) and not isinstance(value, bool) and value > 0, name, expected, value)


@dataclass(frozen=True)
class MoEConfig:
    """One mixture-of-experts layer.

    Attributes:
        d_model: model width D.
        d_ff: hidden width F of one expert.
        num_experts: number of experts E, at most 256.
        top_k: experts per token K, at most min(E, 8).
        activation: `swiglu_oai` (gpt-oss) or `swiglu`.
        expert_bias: whether up- and down-projection have biases.
        router_bias: whether the router has a bias.
        gate: `softmax_over_topk` (gpt-oss, Mixtral: softmax of the chosen logits) or `softmax_then_topk` (OLMoE:
            probabilities of the chosen experts, not renormalised).
        router_balance: what keeps experts in equal use: `loss` (a term of the training loss) or `bias` (`select_bias`
            on the logits, for choosing experts only, moved after each optimizer step: DeepSeek-V3, arXiv 2412.19437).
        router_jitter: ε of the noise on the router's input in training, a factor from uniform(1 − ε, 1 + ε) for every
            element (Switch Transformer, arXiv 2101.03961, section 2.2); 0: none.
        backend: `torch`, `triton`, or `auto`: triton for tensors on a GPU that Triton can use, torch elsewhere.
        save: what backward finds of the experts, besides their input: `h` (the up-projection, 4·K·F bytes a token in
            16-bit) or `x` (nothing: it is computed again).
        autotune: whether the Triton backend times the candidate tiles of each GEMM, once for a bucket of shapes, in
            place of taking them from a table; the torch backend has no tiles.
        init_std: standard deviation of the weights; the down-projection is scaled further by the model.
    Raises:
        ValueError: a field is out of range; the message names it, what was expected and what came.
    """

    d_model: int
    d_ff: int
    num_experts: int = 8
    top_k: int = 2
    activation: str = "swiglu_oai"
    expert_bias: bool = True
    router_bias: bool = True
    gate: str = "softmax_over_topk"
    router_balance: str = "loss"
    router_jitter: float = 0.0
    backend: str = "auto"
    save: str = "h"
    autotune: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _check_positive(self, "d_model", "d_ff", "num_experts", "top_k")
        _check(self.num_experts <= 256, "num_experts", "at most 256", self.num_experts)
        limit = min(self.num_experts, 8)
        _check(self.top_k <= limit, "top_k", f"at most min(num_experts, 8) = {limit}", self.top_k)
        _check(self.activation in ACTIVATIONS, "activation", f"one of {', '.join(ACTIVATIONS)}", self.activation)
        _check(self.gate in GATES, "gate", f"one of {', '.join(GATES)}", self.gate)
        balance = f"one of {', '.join(ROUTER_BALANCE)}"
        _check(self.router_balance in ROUTER_BALANCE, "router_balance", balance, self.router_balance)
        _check(0 <= self.router_jitter < 1, "router_jitter", "a number in [0, 1)", self.router_jitter)
        _check(self.backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", self.backend)
        _check(self.save in SAVE, "save", f"one of {', '.join(SAVE)}", self.save)
        _check(self.init_std > 0, "init_std", "a positive number", self.init_std)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of pre-norm blocks, each attention then MoE. The defaults are gpt-oss's manner.

    A Mixtral-style model is `attention_bias=False, attention_sinks=False, sliding_window=0, rope_factor=1.0,
    activation="swiglu", expert_bias=False, router_bias=False`.

    Attributes:
        vocab_size: rows of the embedding and of the output layer.
        num_layers, d_model: depth and width.
        num_heads, num_kv_heads, head_dim: grouped-query attention; num_heads is a multiple of num_kv_heads.
        d_ff, num_experts, top_k, activation, expert_bias, router_bias, gate, router_balance, router_jitter, backend,
            save, autotune: see `MoEConfig`.
        attention_bias: biases on the query, key, value and output projections.
        attention_sinks: one learned logit per head that takes part in the softmax and adds no value.
        sliding_window: tokens that layers 0, 2, 4, … look back on, themselves included; the odd layers see
            everything. 0: every layer sees everything.
        rope_theta: base of the rotary frequencies.
        rope_factor: YaRN's context extension; 1 is plain RoPE.
        rope_original_context: context for which YaRN keeps the high frequencies.
        rope_beta_fast, rope_beta_slow: bounds, in rotations over that context, of YaRN's ramp.
        norm_eps: epsilon of RMSNorm.
        tie_embeddings: the output layer shares the embedding's weight.
        init_std: standard deviation of weights at initialisation; projections into the residual stream are scaled
            by 1/√(2·num_layers).
    Raises:
        ValueError: a field is out of range; the message names it, what was expected and what came.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    num_experts: int = 8
    top_k: int = 2
    activation: str = "swiglu_oai"
    expert_bias: bool = True
    router_bias: bool = True
    gate: str = "softmax_over_topk"
    router_balance: str = "loss"
    router_jitter: float = 0.0
    backend: str = "auto"
    save: str = "h"
    autotune: bool = False
    attention_bias: bool = True
    attention_sinks: bool = True
    sliding_window: int = 128
    rope_theta: float = 150_000.0
    rope_factor: float = 32.0
    rope_original_context: int = 4096
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _check_positive(self, "vocab_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        _check_positive(self, "rope_original_context")
        _check(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            f"a multiple of num_kv_heads = {self.num_kv_heads}",
            self.num_heads,
        )
        _check(self.head_dim % 2 == 0, "head_dim", "an even number (rotary embedding turns pairs)", self.head_dim)
        if self.sliding_window != 0:
            _check_positive(self, "sliding_window", expected="0 (off) or a positive integer")
        _check(self.rope_factor >= 1, "rope_factor", "at least 1", self.rope_factor)
        _check(self.rope_theta > 1, "rope_theta", "more than 1", self.rope_theta)
        _check(
            self.rope_beta_fast > self.rope_beta_slow > 0,
            "rope_beta_fast, rope_beta_slow",
            "beta_fast > beta_slow > 0",
            (self.rope_beta_fast, self.rope_beta_slow),
        )
        _check(self.norm_eps > 0, "norm_eps", "a positive number", self.norm_eps)
        _ = self.moe  # validates the expert fields

    @property
    def moe(self) -> MoEConfig:
        """The configuration of each layer's experts."""
        return MoEConfig(
            d_model=self.d_model,
            d_ff=self.d_ff,
            num_experts=self.num_experts,
            top_k=self.top_k,
            activation=self.activation,
            expert_bias=self.expert_bias,
            router_bias=self.router_bias,
            gate=self.gate,
            router_balance=self.router_balance,
            router_jitter=self.router_jitter,
            backend=self.backend,
            save=self.save,
            autotune=self.autotune,
            init_std=self.init_std,
        )

    def window(self, layer: int) -> int:
        """Tokens that a layer's queries look back on, themselves included; 0 for all of them."""
        return self.sliding_window if layer % 2 == 0 else 0

    def matrix_parameters(self) -> tuple[int, int]:
        """Parameters in matrices outside the embedding table, output layer included: all, and active per token."""
        attention = self.d_model * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        router, expert = self.d_model * self.num_experts, 3 * self.d_model * self.d_ff
        head = self.vocab_size * self.d_model
        total = self.num_layers * (attention + router + self.num_experts * expert) + head
        active = self.num_layers * (attention + router + self.top_k * expert) + head
        return total, active

    def mean_keys(self, layer: int, length: int) -> float:
        """Keys that a query of a layer sees on average over a sequence of `length` tokens, causality counted."""
        window = min(self.window(layer) or length, length)
        return window * (window + 1) / 2 / length + (length - window) * window / length

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a training step per token: 6 × active matrix parameters, and the attention scores.

        The scores are two GEMMs of `num_heads · head_dim` per visible key, 2 FLOPs a multiply-add, three times that
        with backward. Causality and windows are counted, recomputation is not.
        """
        width = self.num_heads * self.head_dim
        keys = sum(self.mean_keys(layer, length) for layer in range(self.num_layers))
        return 6 * self.matrix_parameters()[1] + 12 * width * keys
