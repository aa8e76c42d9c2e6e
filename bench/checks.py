"""What has to be right before a training step is timed: ours against fp64, a peer against ours.

T = tokens
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from moe_engine import ModelConfig, Transformer, reference
from moe_engine.router import balance_loss
from moe_engine.testing import parameters, relative_error
from moe_engine.train import parallel
from moe_engine.train.config import TrainConfig

CHECKED_TOKENS, MOST_TOKENS, CHECKED_LAYERS, CHECKED_VOCABULARY = 64, 2048, 2, 1024
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.002}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Relative errors; of a gradient the root mean square over a parameter. In fp32 some 1e-6, in bf16 1e-2 are found."""
AUX_COEF, CLEAR = 0.05, 8.0
WRONG = "wrong result: "
"""What the message begins with that a command prints of a WrongResult."""


class WrongResult(Exception):
    """What was to be timed computes something else."""


def _exact_gradients(tokens: Tensor, targets: Tensor, model: Transformer) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a model's own parameters in fp64, by the loop over experts."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    config = model.config
    found = reference.model(tokens, leaves, config)
    loss = torch.nn.functional.cross_entropy(found.logits, targets)
    for layer in found.moe:
        share = layer.expert_counts.double() / layer.expert_counts.sum()
        loss = loss + AUX_COEF * config.num_experts * (share * layer.prob_sum / len(tokens)).sum()
    return float(loss.detach()), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def _clear_choices(model: Transformer, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters with which every token has top_k experts, drawn for it, whose logits are far above the others'.

    Else roundings to 16 bits would choose another expert for one token or another, and no tolerance tells that from a
    fault. The rows of a token's experts in each router are added to its embedding, CLEAR times their own length.
    """
    config, embedding = model.config, values["embedding.weight"]
    generator, shape = torch.Generator().manual_seed(0), (config.vocab_size, config.num_experts)
    for layer in range(config.num_layers):
        rows = torch.nn.functional.normalize(values[f"blocks.{layer}.moe.router.weight"], dim=1)
        chosen = torch.rand(shape, generator=generator, device="cpu").topk(config.top_k).indices
        embedding += CLEAR * rows[chosen].sum(1)
    return values


def checked_tokens(config: ModelConfig, timed: int) -> int:
    """Length of the sequence that is checked before a micro-step of `timed` tokens is.

    At least `CHECKED_TOKENS`; and as far as that is timed, so many that windows end within it and that experts get 128
    rows, which the kernels' usual tiles compute and not those for a few rows. fp64 has no room for over `MOST_TOKENS`.
    """
    enough = max(2 * config.sliding_window, -(-128 * config.num_experts // config.top_k))
    return max(CHECKED_TOKENS, min(timed, enough, MOST_TOKENS))


def check_exact(config: ModelConfig, train: TrainConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Hold our loss and the gradient of every parameter against fp64, in the dtype that is going to be timed.

    The model has the widths, experts and backend of the one to be timed, at most `CHECKED_LAYERS` of its layers and
    `CHECKED_VOCABULARY` rows of its vocabulary, and `checked_tokens`: of 8 B parameters fp64 would take 65 GB.

    Returns:
        The largest relative error of a gradient.
    Raises:
        WrongResult: it is more than `GRADIENT_TOLERANCE`, or the loss's than `LOSS_TOLERANCE`.
    """
    layers, vocabulary = min(config.num_layers, CHECKED_LAYERS), min(config.vocab_size, CHECKED_VOCABULARY)
    with device:
        model = Transformer(replace(config, num_layers=layers, vocab_size=vocabulary))
        model.set_checkpointing(train.checkpointing, train.checkpoint_every)
        parallel.cast_weights(model, dtype)
        with torch.no_grad():
            for name, value in _clear_choices(model, parameters(model)).items():
                model.get_parameter(name).copy_(value)
        length = checked_tokens(config, train.batch_size * train.block_size)
        tokens, targets = (ids.to(device) for ids in _tokens(vocabulary, length))
        out = model(tokens, targets)
        loss = out.loss / targets.numel() + AUX_COEF * balance_loss(out.stats, config.top_k).sum()
        loss.backward()
        exact, gradients = _exact_gradients(tokens[0], targets[0], model)
    errors = {name: relative_error(model.get_parameter(name).grad, g).typical for name, g in gradients.items()}
    worst = max(errors, key=lambda name: float(np.nan_to_num(errors[name], nan=np.inf)))
    error = abs(float(loss.detach()) / exact - 1)
    if not (error <= LOSS_TOLERANCE[dtype] and errors[worst] <= GRADIENT_TOLERANCE[dtype]):
        raise WrongResult(
            f"our loss is off by {error:.1e}, the gradient of {worst} by {errors[worst]:.1e} against fp64: no time"
        )
    return errors[worst]


def _tokens(vocabulary: int, length: int = CHECKED_TOKENS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, length + 1), generator=generator, device="cpu")
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def check_same(name: str, ours: Transformer, peer: nn.Module) -> None:
    """Hold a peer's cross-entropy and the gradient of its embedding against ours, in fp32.

    Raises:
        WrongResult: they differ, so a time would compare different things.
    """
    tokens, targets = _tokens(ours.config.vocab_size)
    results = []
    for model in (ours, peer):
        if isinstance(model, Transformer):
            loss, embedding = model(tokens, targets).loss / targets.numel(), model.embedding.weight
        else:
            logits = model(input_ids=tokens).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
            embedding = model.get_parameter("model.embed_tokens.weight")
        results.append((float(loss.detach()), torch.autograd.grad(loss, embedding)[0]))
    (loss, gradient), (peer_loss, peer_gradient) = results
    error = float((gradient - peer_gradient).norm() / gradient.norm())
    close = abs(loss - peer_loss) <= LOSS_TOLERANCE[torch.float32] * abs(loss)
    if not (close and error <= GRADIENT_TOLERANCE[torch.float32]):
        raise WrongResult(f"{name}: loss {peer_loss} against {loss}, gradient apart by {error:.1e}: not the same model")
