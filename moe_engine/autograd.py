"""What this package's autograd functions have in common."""

from __future__ import annotations

import torch


def refuse_create_graph(function: str) -> None:
    """Called in a backward whose results would silently count as constants. Compiled, it is PyTorch that refuses.

    Raises:
        RuntimeError: gradients of the gradients are asked for.
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise RuntimeError(f"{function} is differentiable once: create_graph=True cannot be had")
