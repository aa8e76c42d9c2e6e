"""The decoder: embedding, blocks of attention and experts, final norm, output layer."""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moe_engine import checkpointing
from moe_engine.attention import Attention, KVCache, RotaryEmbedding
from moe_engine.autograd import refuse_create_graph
from moe_engine.config import ModelConfig
from moe_engine.loss import linear_cross_entropy
from moe_engine.moe import MoELayer
from moe_engine.router import JitterKey, RouterStats


class _Normalise(torch.autograd.Function):
    """RMSNorm in fp32 or better, rounded once, that keeps x as it came, and 1/√(mean(x²) + eps).

    All as PyTorch's kernel for GPUs does. On a CPU autograd would keep wide copies of x, 8 bytes more an element in
    16-bit.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        out = wide * inverse * weight
        # No .to that does nothing: torch.compile of 2.11 returns zero gradients for what ends in one.
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        refuse_create_graph("RMSNorm")
        x, weight, inverse = ctx.saved_tensors
        grad_wide, normed = grad.to(inverse.dtype), x * inverse
        grad_weight = (grad_wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = grad_wide * weight
        mean = torch.linalg.vecdot(grad_normed, normed).unsqueeze(-1) / x.shape[-1]
        return torch.addcmul(grad_normed, normed, mean, value=-1).mul_(inverse).to(x.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """`x / √(mean(x²) + eps) · weight` over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _Normalise.apply(x, self.weight, self.eps)


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + experts(norm(x))`.

    Attributes:
        checkpointing: what forward keeps for backward, a mode of `moe_engine.checkpointing`.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.moe_norm = RMSNorm(config.d_model, config.norm_eps)
        self.moe = MoELayer(config.moe)
        self.checkpointing = "none"

    def forward(
        self, x: Tensor, rotary: Tensor, cache: KVCache | None = None, jitter_key: JitterKey | None = None
    ) -> tuple[Tensor, RouterStats]:
        """`(B, T, D)` → `(B, T, D)` and the router's statistics; rotary: the table of the T positions."""
        return checkpointing.run(self.checkpointing, self._run, x, rotary, cache, jitter_key)

    def _run(
        self, x: Tensor, rotary: Tensor, cache: KVCache | None, jitter_key: JitterKey | None
    ) -> tuple[Tensor, RouterStats]:
        x = x + self.attention(self.attention_norm(x), rotary, cache)
        out, stats = self.moe(self.moe_norm(x), jitter_key)
        return x + out, stats


class Head(nn.Module):
    """Final norm and output layer, one unit so that a sharded model gathers them together.

    With tied embeddings the weight is the embedding's and is passed in.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.weight = None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.d_model))

    def forward(self, x: Tensor, targets: Tensor | None, tied: Tensor | None, z_coef: float = 0.0) -> Tensor:
        """Logits `(B, T, V)`, or with targets `(B, T)` the summed cross-entropy (and z-loss)."""
        weight = self.weight if tied is None else tied
        x = self.norm(x)
        if targets is None:
            return F.linear(x, weight)
        return linear_cross_entropy(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), z_coef)


class ModelOutput(NamedTuple):
    """What `Transformer` returns.

    Attributes:
        logits: `(B, T, V)`; None when targets were given.
        loss: cross-entropy in nats, with the z-loss that was asked for, summed over the targets that count, fp32; None
            without targets.
        stats: router statistics, stacked: each field has a leading layer dimension.
    """

    logits: Tensor | None
    loss: Tensor | None
    stats: RouterStats


class Transformer(nn.Module):
    """A sparse mixture-of-experts decoder.

    Built under `torch.device("meta")` its parameters have no storage: `to_empty`, then `init_weights`.

    Args:
        config: sizes and choices.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.head = Head(config)
        self.rotary = RotaryEmbedding(config)
        if not self.embedding.weight.is_meta:
            self.init_weights()

    def set_checkpointing(self, mode: str, every: int = 1) -> None:
        """Choose what blocks keep from forward to backward; results stay the same to the last bit.

        May be called before or after the model is sharded or compiled, and again.

        Args:
            mode: `none`, `block` or `selective`, see `moe_engine.checkpointing`.
            every: of the blocks, 0, every, 2·every, … get the mode, the others `none`.
        Raises:
            ValueError: there is no such mode, or every is below 1.
        """
        if mode not in checkpointing.MODES:
            raise ValueError(f"mode: expected one of {', '.join(checkpointing.MODES)}, got {mode!r}")
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        for layer, block in enumerate(self.blocks):
            block.checkpointing = mode if layer % every == 0 else "none"

    def initial_std(self, name: str) -> float | None:
        """Standard deviation of a parameter at initialisation; None for a constant (`initial_constant`)."""
        kind = name.split(".")[-2:]
        if kind[-1] in ("bias", "b_up", "b_down", "sinks") or "norm" in name.split(".")[-2]:
            return None
        if kind[-1] == "w_down" or kind == ["out", "weight"]:
            return self.config.init_std / math.sqrt(2 * self.config.num_layers)
        return self.config.init_std

    @staticmethod
    def initial_constant(name: str) -> float:
        """Value of the parameters that start constant: 1 for norms, 0 for biases and sinks."""
        return 1.0 if name.endswith("norm.weight") else 0.0

    @torch.no_grad()
    def init_weights(self, seed: int = 1337) -> None:
        """Initialise every parameter from the seed and its name alone.

        A parameter's values depend neither on the order of parameters nor on how the model is sharded: each rank
        draws the whole parameter and keeps its shard, one parameter at a time.
        """
        for block in self.blocks:
            if block.moe.router.select_bias is not None:
                block.moe.router.select_bias.zero_()
        for name, parameter in self.named_parameters():
            std = self.initial_std(name)
            if std is None:
                parameter.fill_(self.initial_constant(name))
                continue
            # 32 bits, since the generator of a CPU drops all above them.
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            whole = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
            whole.normal_(std=std, generator=generator)
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(whole)

    def update_select_bias(self, expert_counts: Tensor, rate: float) -> None:
        """After an optimizer step with `router_balance="bias"`: see `Router.update_select_bias`.

        Args:
            expert_counts: `(layers, E)` integers, over all ranks and micro-steps of the optimizer step.
            rate: size of the move.
        """
        for block, counts in zip(self.blocks, expert_counts, strict=True):
            block.moe.router.update_select_bias(counts, rate)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        z_coef: float = 0.0,
        jitter: tuple[int, int] | None = None,
    ) -> ModelOutput:
        """Run the model.

        Args:
            tokens: `(B, T)` int64 ids below vocab_size.
            targets: `(B, T)` int64, the token after each; negative ones do not count. None for logits.
            cache: keys and values of earlier positions, for decoding; advanced by T.
            z_coef: coefficient of the z-loss on the logits (see `linear_cross_entropy`) that the loss is to contain.
            jitter: for training with `router_jitter`: a seed, and the number of the batch's first sequence in the run
                (see `JitterKey`); None: no noise.
        """
        begin = 0 if cache is None else cache.length
        x = self.embedding(tokens)
        rotary = self.rotary.table(begin + tokens.shape[1], like=x)[:, begin:]
        stats = []
        for layer, block in enumerate(self.blocks):
            key = None if jitter is None else JitterKey(jitter[0], layer, jitter[1])
            x, layer_stats = block(x, rotary, cache, key)
            stats.append(layer_stats)
        if cache is not None:
            cache.length += tokens.shape[1]
        tied = self.embedding.weight if self.config.tie_embeddings else None
        result = self.head(x, targets, tied, z_coef)
        stacked = RouterStats(*(torch.stack(field) for field in zip(*stats, strict=True)))
        return ModelOutput(*((result, None) if targets is None else (None, result)), stacked)
