"""Where the time of a training step goes: attention, router, experts, head and loss, optimizer, communication, data.

A `Timeline` is a clock that is in one part at any moment. Hooks on the model tell it when another part begins, and the
time up to the next such mark belongs to the part that was entered: the parts tile the step, and their sum is the step.

    attention, experts   those modules in forward, in backward, and where checkpointing runs them again; the gate and
                         the order of the rows are with the experts
    router               its linear layer
    head + loss          final norm, output layer, cross-entropy, the sum of the losses
    optimizer            norm, clipping and update. With optimizer_in_backward the updates, made in the midst of
                         backward; norms and clipping are then in the part whose gradient it is
    communication        with several ranks: from the end of a block to the first of the next one's own work, in which
                         weights are waited for and gradients handed over, and the sums over ranks. What overlaps with
                         computation does not show. The embedding's gradient, last in backward, is in it
    data wait            the loader's next batch
    other                embedding, norms, sums, and in one process what would be communication

On a CPU a mark is the clock's time: backward runs in the thread that called it. On a GPU it is an event on the current
stream, so that a part has the time of its kernels and not that of their launch.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from moe_engine.model import Transformer
from moe_engine.train import parallel
from moe_engine.train import step as train_step
from moe_engine.train.loop import Trainer

ATTENTION, ROUTER, EXPERTS, HEAD = "attention", "router", "experts", "head + loss"
OPTIMIZER, COMMUNICATION, DATA, OTHER = "optimizer", "communication", "data wait", "other"
PARTS = (ATTENTION, ROUTER, EXPERTS, HEAD, OPTIMIZER, COMMUNICATION, DATA, OTHER)


class Timeline:
    """Seconds of a step by part.

    Args:
        device: where the step computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[Any, str]] = []  # (time or event, the part that begins)

    def enter(self, part: str) -> None:
        """What follows belongs to a part."""
        if self._device.type == "cuda":
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((mark, part))

    def within(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted to a part; then the part before goes on."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self._marks[-1][1]
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before)

        return timed

    def measure(self, step: Callable[[], Any]) -> dict[str, float]:
        """Run a step; returns seconds by part, of each in `PARTS`."""
        self._marks.clear()
        self.enter(OTHER)
        step()
        self.enter(OTHER)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            first = self._marks[0][0]
            times = [first.elapsed_time(event) / 1e3 for event, _ in self._marks]
        else:
            times = [mark for mark, _ in self._marks]
        seconds = dict.fromkeys(PARTS, 0.0)
        for (_, part), begin, end in zip(self._marks[:-1], times[:-1], times[1:], strict=True):
            seconds[part] += end - begin
        return seconds


def _hook(timeline: Timeline, model: Transformer, between: str) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Hooks that enter a part when a module begins, and the one around it when it ends, in forward and in backward.

    Which part is around a module is fixed, and is not looked up on a stack: recomputation stops early, by an exception,
    and then the module that it is in does not end.

    Args:
        between: the part from the end of a sharded module to the beginning of the next one. FSDP2's hooks are in it:
            they come before those registered later, and after one that is prepended.
    """

    def to(part: str) -> Callable[..., None]:
        return lambda *_: timeline.enter(part)

    def forward(module: nn.Module, begin: str, end: str) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield module.register_forward_pre_hook(to(begin))
        yield module.register_forward_hook(to(end), prepend=True)

    def backward(module: nn.Module, begin: str, end: str) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield module.register_full_backward_pre_hook(to(begin))
        yield module.register_full_backward_hook(to(end))

    yield model.register_forward_pre_hook(to(between), prepend=True)
    yield from forward(model.embedding, OTHER, between)
    for block in model.blocks:
        yield from forward(block, OTHER, between)
        yield from backward(block, between, between)
        for module, part, around in (
            (block.attention, ATTENTION, OTHER),
            (block.moe, EXPERTS, OTHER),
            (block.moe.router, ROUTER, EXPERTS),
        ):
            yield from forward(module, part, around)
            yield from backward(module, part, around)
    yield model.head.register_forward_pre_hook(to(HEAD))  # until backward is through it: the loss is between
    yield from backward(model.head, HEAD, between)


@contextmanager
def watched(trainer: Trainer) -> Iterator[Timeline]:
    """A `Timeline` of the steps that a trainer takes in this context."""
    timeline, engine = Timeline(trainer.device), trainer.engine
    several = trainer.world.size > 1
    calls: list[tuple[Any, str, str]] = [
        (trainer.loader, "next_batch", DATA),
        (engine, "_update", OPTIMIZER),
        (engine.optimizer, "step", OPTIMIZER),
    ]
    if several:
        calls += [(train_step, "all_sum", COMMUNICATION), (parallel, "whole", COMMUNICATION)]
    with ExitStack() as stack:
        # The hook of the head's backward makes the loss a view; FSDP2 warns of writing into it, which nobody does.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        for owner, name, part in calls:
            stack.enter_context(mock.patch.object(owner, name, timeline.within(part, getattr(owner, name))))
        for handle in _hook(timeline, trainer.model, COMMUNICATION if several else OTHER):
            stack.callback(handle.remove)
        yield timeline


def split(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    """Seconds by part of each of the trainer's next steps. The first with hooks is taken besides and not counted."""
    with watched(trainer) as timeline:
        return [timeline.measure(trainer.train_step) for _ in range(steps + 1)][1:]
