"""Activation checkpointing of a block: what is kept from forward to backward, and what backward computes again.

    none        what autograd saves, of every operation
    block       the block's input; backward runs the whole block again
    selective   the block's input and the results in `KEPT`; backward runs the rest again

Selective mode keeps the results of the large GEMMs, so that no product with a weight is done twice, and computes again
what is cheap beside them: norms, rotary turns, attention scores, the gate, sorting. (The activation of the experts is
computed again in every mode.) Of the experts' operation it keeps h, but not the output, which no gradient needs.

Computing again gives the same bits, since every operation here is deterministic and there is no dropout. Router
statistics leave a block once, with its forward; those of the second run are dropped.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "block", "selective")

KEPT = {
    "aten::mm": 0,  # linear layers without a bias: attention's qkv and output projections, the router
    "aten::addmm": 0,  # the same with one
    "moe_engine::expert_mlp": 1,
    "moe_engine::expert_mlp_torch": 1,
}
"""Operations of which selective mode keeps a result, and which of their results. By name: the kernels' operation exists
only where the kernels are imported. Attention's products are `aten::bmm` or a fused kernel: not among them."""


class _Mode(TorchDispatchMode):
    supports_higher_order_operators = True  # such as FlexAttention's

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A compiled function called in the region runs as compiled, and counts as no operation of `KEPT`."""
        return True


class _Keep(_Mode):
    """Appends the results named in `KEPT` to a queue. First run of a block."""

    def __init__(self, queue: deque[tuple[Any, Any]]) -> None:
        super().__init__()
        self.queue = queue

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (place := KEPT.get(func.name())) is not None:
            # Detached, since autograd will hang the graph on the tensors themselves. A result that is not kept leaves
            # its shape and a NaN: were a gradient to need it after all, nobody could overlook that.
            results = out if isinstance(out, tuple) else (out,)
            kept = [t.detach() if i == place else t.new_full((), math.nan).expand_as(t) for i, t in enumerate(results)]
            self.queue.append((func, tuple(kept) if isinstance(out, tuple) else kept[0]))
        return out


class _Replay(_Mode):
    """Answers operations named in `KEPT` from the queue, and lets it go. Second run of a block.

    PyTorch's own selective contexts, as of 2.14, want both runs to be the same in every operation; with FSDP2 they are
    not, since the hooks of a unit in the block (the router) do not do the same twice.
    """

    def __init__(self, queue: deque[tuple[Any, Any]]) -> None:
        super().__init__()
        self.queue = queue

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.name() not in KEPT:
            return func(*args, **(kwargs or {}))
        if not self.queue:
            raise RuntimeError("selective checkpointing: results are kept for one backward, this is another one")
        kept, out = self.queue.popleft()
        if kept is not func:
            raise RuntimeError(f"selective checkpointing: {kept} was kept where the second run of a block has {func}")
        return out


def _contexts() -> tuple[_Keep, _Replay]:
    queue: deque[tuple[Any, Any]] = deque()
    return _Keep(queue), _Replay(queue)


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def run(mode: str, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, keeping for backward what the mode keeps.

    To be called inside the module that a sharded model gathers as a unit: backward then runs the function again with
    the module's parameters in place.

    Args:
        mode: one of `MODES`.
        function: deterministic: the random numbers that it draws, if any, depend on its arguments alone.
    Raises:
        RuntimeError: in backward, of selective mode, if the function does not repeat itself, or at a second backward.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective" and torch.compiler.is_compiling():  # which knows PyTorch's own contexts and no others
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    elif mode == "selective":
        options["context_fn"] = _contexts
    return checkpoint(function, *args, **options)
