"""What a training step has to compute and to move, counted on paper: FLOPs and bytes, operation by operation.

FLOPs are those of matrix products, 2 for a multiply-add; elementwise arithmetic has none, and is there for its bytes.
Bytes: every launch or operation touches each of its tensors once, as docs/kernels.md has it for the kernels. What a
cache saves between two operations is not known, nor what a launch reads twice for want of one.

The router's products are in fp32 and held against the 16-bit peak all the same; FSDP2's copies between a gathered
buffer and parameters are not counted. Both make the truth slower than the bound.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k, V = vocabulary, N = T·K routed rows
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from moe_engine.bench.gpus import Gpu
from moe_engine.config import ModelConfig, MoEConfig
from moe_engine.loss import CHUNK_LOGITS, CHUNK_WORDS
from moe_engine.train.config import TrainConfig
from moe_engine.train.device import DTYPES

PROJECTIONS, SCORES, ROUTER, EXPERTS = "attention projections", "attention scores", "router", "experts"
HEAD, ELEMENTWISE, OPTIMIZER = "head and loss", "norms, rotary, residuals", "optimizer"
PARTS = (PROJECTIONS, SCORES, ROUTER, EXPERTS, HEAD, ELEMENTWISE, OPTIMIZER)

FORWARD, BACKWARD, RECOMPUTED, UPDATE = "forward", "backward", "recomputed", "update"


@dataclass(frozen=True)
class Work:
    """An operation.

    Attributes:
        part: of a step, one of `PARTS`.
        name: what it is; those of the experts and the gate are launches of docs/kernels.md.
        phase: `forward`, `backward`, `recomputed` (forward once more, in backward) or `update`.
        flops: that it computes.
        bytes: that it reads and writes.
        again: of its FLOPs those that repeat earlier ones. They take time, and are not the model's.
    """

    part: str
    name: str
    phase: str
    flops: float
    bytes: float
    again: float = 0.0

    @property
    def model_flops(self) -> float:
        """FLOPs that an MFU counts."""
        return 0.0 if self.phase == RECOMPUTED else self.flops - self.again

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def times(self, count: float) -> Work:
        """The operation so many times over."""
        return replace(self, flops=count * self.flops, bytes=count * self.bytes, again=count * self.again)

    def bound(self, gpu: Gpu) -> str:
        """What limits it on a card at its peaks: `compute` or `memory`."""
        return "compute" if self.flops / gpu.peak > self.bytes / gpu.bandwidth else "memory"

    def seconds(self, gpu: Gpu, compute: float = 1.0, memory: float = 1.0) -> float:
        """Projected time, at these shares of the card's FLOP/s and of its bandwidth; both at once."""
        return max(self.flops / (compute * gpu.peak), self.bytes / (memory * gpu.bandwidth))


def total_seconds(works: Iterable[Work], gpu: Gpu, compute: float = 1.0, memory: float = 1.0) -> float:
    """Projected time of one after the other."""
    return sum(work.seconds(gpu, compute, memory) for work in works)


def layer_work(moe: MoEConfig, tokens: int, itemsize: int = 2) -> list[Work]:
    """One MoE layer, forward and backward, launch by launch as in docs/kernels.md; the router's products are PyTorch's.

    Args:
        itemsize: bytes of weights and activations; the router is in fp32.
    """
    t, d, f, e, k, s = tokens, moe.d_model, moe.d_ff, moe.num_experts, moe.top_k, itemsize
    td, tkd, tkf, edf = t * d, t * k * d, t * k * f, e * d * f
    gemm, route = 2 * tkd * f, 2 * td * e  # FLOPs: N rows by one (D, F) matrix; T rows by the router's
    wide = 8 * td if s < 4 else 0  # a copy in fp32, written and read
    linear = s * td + wide + 4 * (t * e + d * e)
    blocks = -(-t // max(32, min(128, 4096 >> (e - 1).bit_length())))  # of tokens: `gating.block_tokens`
    statistics, offsets = 4 * blocks * (2 * e + 2), 4 * blocks * e
    save_h = 2 * tkf if moe.save == "h" else 0
    works = [
        Work(ROUTER, "router", FORWARD, route, linear),
        Work(ROUTER, "gate", FORWARD, 0, 4 * t * e + 8 * t * k + statistics),
        Work(ROUTER, "gate statistics", FORWARD, 0, statistics + offsets),
        Work(ROUTER, "sort", FORWARD, 0, 12 * t * k + offsets),
        Work(EXPERTS, "up", FORWARD, 2 * gemm, s * (td + save_h + tkf + 2 * edf)),
        Work(EXPERTS, "down", FORWARD, gemm, s * (tkf + tkd + edf)),
        Work(EXPERTS, "combine", FORWARD, 0, s * (tkd + td)),
        Work(EXPERTS, "up again", RECOMPUTED, 2 * gemm, s * (td + 2 * tkf + 2 * edf)),
        Work(EXPERTS, "down backward", BACKWARD, gemm, s * (td + 5 * tkf + edf)),
        Work(EXPERTS, "row sums", BACKWARD, 0, s * td),
        Work(EXPERTS, "grad_w_down", BACKWARD, gemm, s * (tkf + td + edf)),
        Work(EXPERTS, "grad_x rows", BACKWARD, 2 * gemm, s * (2 * tkf + tkd + 2 * edf)),
        Work(EXPERTS, "combine backward", BACKWARD, 0, s * (tkd + td)),
        Work(EXPERTS, "grad_w_up", BACKWARD, 2 * gemm, s * (td + 2 * tkf + 2 * edf)),
        Work(ROUTER, "gate backward", BACKWARD, 0, 8 * t * e + 12 * t * k),
        Work(ROUTER, "router backward", BACKWARD, 2 * route, 2 * linear),
    ]
    absent = set() if moe.expert_bias else {"row sums"}
    absent |= set() if moe.save == "x" else {"up again"}
    return [work for work in works if work.name not in absent]


def _attention_work(model: ModelConfig, layer: int, tokens: int, length: int, s: int) -> list[Work]:
    """Projections and scores of a layer. Scores are those that a query sees; backward computes them once more."""
    t, d = tokens, model.d_model
    qkv, values = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim, model.num_heads * model.head_dim
    product = 2 * t * values * model.mean_keys(layer, length)  # of queries and keys, or of probabilities and values
    lse = 4 * t * model.num_heads
    works = []
    for name, inputs, outputs in (("qkv", d, qkv), ("out", values, d)):
        flops, touched = 2 * t * inputs * outputs, s * (t * (inputs + outputs) + inputs * outputs)
        works.append(Work(PROJECTIONS, name, FORWARD, flops, touched))
        works.append(Work(PROJECTIONS, f"{name} backward", BACKWARD, 2 * flops, 2 * touched))
    kind = "window" if model.window(layer) else "full"
    grads = 2 * s * t * (qkv + values) + lse  # q, k, v, out, grad_out in; the gradients of q, k, v out
    return [
        *works,
        Work(SCORES, f"scores, {kind}", FORWARD, 2 * product, s * t * (qkv + values) + lse),
        Work(SCORES, f"scores, {kind}, backward", BACKWARD, 5 * product, grads, again=product),
    ]


def _elementwise_work(model: ModelConfig, tokens: int, s: int) -> list[Work]:
    """What a block does beside products: two norms, rotary turns, the heads' outputs in a row again, two additions.

    Backward adds gradients where forward used a value twice: before each norm, and behind the second, of which router
    and experts read.
    """
    td = s * tokens * model.d_model
    turned = 2 * s * tokens * (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    turned += 2 * s * tokens * model.num_heads * model.head_dim
    return [
        Work(ELEMENTWISE, "norms, rotary, first residual", FORWARD, 0, 2 * 2 * td + turned + 3 * td),
        Work(ELEMENTWISE, "second residual", FORWARD, 0, 3 * td),
        Work(ELEMENTWISE, "norms, rotary, residuals backward", BACKWARD, 0, 2 * 3 * td + turned + 3 * 3 * td),
    ]


def _is_repeated(work: Work, mode: str) -> bool:
    """Whether a way of checkpointing computes a block's operation again in backward (`moe_engine.checkpointing`)."""
    if work.phase != FORWARD or mode == "none" or work.name == "second residual":  # it stops when all is there
        return False
    return mode == "block" or not (work.part in (PROJECTIONS, EXPERTS) or work.name == "router")


def _head_work(model: ModelConfig, tokens: int, s: int) -> list[Work]:
    """Final norm, output layer and loss in chunks of the vocabulary, and the embedding: see `moe_engine.loss`.

    The passes over a chunk's logits are those of `_chunk_statistics` and `_chunk_grad_logits`, each an operation of its
    own with fp32 between them.
    """
    td, dv, tv = tokens * model.d_model, model.d_model * model.vocab_size, tokens * model.vocab_size
    words = max(CHUNK_WORDS, CHUNK_LOGITS // tokens // 128 * 128)
    chunks = -(-model.vocab_size // words)
    product = 2 * tokens * dv
    forward = chunks * s * td + s * dv + s * tv
    # logits; then the gradient of x, which is added up in fp32, and of the weight.
    backward = forward + (s * tv + s * dv + chunks * (s * td + (8 + s) * td)) + (s * tv + s * dv + chunks * s * td)
    return [
        Work(HEAD, "logits", FORWARD, product, forward),
        Work(HEAD, "softmax statistics", FORWARD, 0, tv * (2 * s + 4 + 8 + 4)),
        Work(HEAD, "logits again, backward", BACKWARD, 3 * product, backward, again=product),
        Work(HEAD, "softmax backward", BACKWARD, 0, tv * (s + 4 + 8 + 4 + s)),
        Work(ELEMENTWISE, "embedding, final norm", FORWARD, 0, 4 * s * td),
        Work(ELEMENTWISE, "embedding, final norm, backward", BACKWARD, 0, s * (5 * td + dv)),
    ]


def _update_work(config: TrainConfig, parameters: float) -> list[Work]:
    """Accumulation, clipping by the global norm, and the optimizer's step, of a rank's part of the parameters."""
    p = DTYPES[config.param_dtype].itemsize
    moment = 1 + 4 / 256 if config.optimizer == "adamw8bit" else p
    clipping = p + (2 * p if config.grad_clip else 0)
    return [
        Work(OPTIMIZER, "accumulation", UPDATE, 0, (config.grad_accum_steps - 1) * 3 * p * parameters),
        Work(OPTIMIZER, "clipping", UPDATE, 0, clipping * parameters),
        Work(OPTIMIZER, "step", UPDATE, 0, (3 * p + 4 * moment) * parameters),
    ]


def step_work(config: TrainConfig, model: ModelConfig, parameters: float, itemsize: int = 2) -> list[Work]:
    """One optimizer step of one rank.

    Args:
        config: batch, accumulation, checkpointing, optimizer.
        parameters: that this rank updates: all of them, divided by the ranks that they are spread over.
        itemsize: bytes of the computation's dtype.
    """
    tokens, micro_step = config.batch_size * config.block_size, []
    for layer in range(model.num_layers):
        block = _attention_work(model, layer, tokens, config.block_size, itemsize)
        block += layer_work(model.moe, tokens, itemsize) + _elementwise_work(model, tokens, itemsize)
        mode = config.checkpointing if layer % config.checkpoint_every == 0 else "none"
        block += [replace(work, phase=RECOMPUTED) for work in block if _is_repeated(work, mode)]
        micro_step += block
    micro_step += _head_work(model, tokens, itemsize)
    repeated = [work.times(config.grad_accum_steps) for work in micro_step]
    return repeated + _update_work(config, parameters)
