"""Sampling text from a model, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_engine.attention import KVCache
from moe_engine.model import Transformer


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One id per row of `(B, V)` logits."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        least = torch.topk(logits, min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 200,
    vocab_size: int | None = None,
    stop: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[int]:
    """Continue a prompt.

    Every rank of a sharded model must call this with the same arguments: all draw the same tokens.

    Args:
        model: the model, or its sharded form.
        prompt: ids to continue; at least one.
        max_new_tokens: tokens to draw at most.
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest; 0 among all.
        vocab_size: ids at or above it are never drawn (the padding of a model's vocabulary); None: no limit.
        stop: an id that ends the text; it is not returned.
        seed: of the draws.
        device: where the model computes.
        dtype: of its keys and values; None: of its parameters.
        should_stop: polled before every token; True ends the text early.
    Returns:
        The new ids.
    Raises:
        ValueError: empty prompt, an id outside the model's vocabulary, a negative number.
    """
    if not prompt:
        raise ValueError("prompt: expected at least one token, got none")
    if not all(0 <= token < model.config.vocab_size for token in prompt):
        raise ValueError(f"prompt: expected ids from 0 to {model.config.vocab_size - 1}, got {list(prompt)}")
    for name, value in (("max_new_tokens", max_new_tokens), ("temperature", temperature), ("top_k", top_k)):
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    dtype = dtype or model.embedding.weight.dtype
    cache = KVCache(model.config, 1, len(prompt) + max_new_tokens, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
    new: list[int] = []
    # Compiled blocks run as they are written: to the compiler the number of cached tokens is another one every time.
    with torch.compiler.set_stance("force_eager"):
        while len(new) < max_new_tokens and not should_stop():
            logits = model(tokens, cache=cache).logits[:, -1, :vocab_size]
            token = int(_choose(logits, temperature, top_k, generator))
            if token == stop:
                break
            new.append(token)
            tokens = torch.tensor([[token]], dtype=torch.int64, device=device)
    return new
