"""Optimizers: AdamW or AdamW with 8-bit moments, stepped after backward or inside it; loss scaling for fp16."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_engine.model import Transformer
from moe_engine.train import parallel
from moe_engine.train.config import TrainConfig
from moe_engine.train.errors import InputError


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices, which decay, and everything else (norms, biases, sinks), which does not.

    `adamw` is PyTorch's, fused. `adamw8bit` is torchao's: both moments of a parameter (of a rank's part of it) that
    has at least 4096 elements and a multiple of 256 are kept in 8 bits with one fp32 scale for 256 elements.

    Raises:
        InputError: `adamw8bit` without torchao.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (others if model.initial_std(name) is None else matrices).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": 1e-8}
    if config.optimizer == "adamw8bit":
        # Rounds stochastically where weights are bf16, and not at all where they are fp32.
        return _adamw8bit_class()(groups, **options, bf16_stochastic_round=True)
    return torch.optim.AdamW(groups, **options, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group this learning rate; torchao wants its tensor filled, PyTorch a number."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _adamw8bit_class() -> type[torch.optim.Optimizer]:
    """torchao's AdamW8bit, made to work on sharded parameters.

    Raises:
        InputError: torchao is not installed.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            "--optimizer adamw8bit: expected torchao to be installed, got "
            f"{type(error).__name__}: {str(error).splitlines()[0]}; pip install -e '.[adamw8bit]', or --optimizer adamw"
        ) from None

    class LocalAdamW8bit(AdamW8bit):
        """Steps on each rank's own part of a sharded parameter.

        AdamW is elementwise, so a part needs nothing from the others. Torchao compiles its step, and the compiler does
        not take a DTensor of 8-bit moments apart; plain tensors that share memory with the parts it does. Outside of
        `step` parameters and moments are DTensors, as checkpoints need them.
        """

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            """One step for all parameters with a gradient; none if `found_inf`, as in PyTorch's fused AdamW, is set."""
            if bool(getattr(self, "found_inf", False)):
                return
            groups, states = self.param_groups, self.state
            twins = {p: _local_twin(p) for group in groups for p in group["params"] if p.grad is not None}
            self.param_groups = [{**g, "params": [twins[p] for p in g["params"] if p in twins]} for g in groups]
            self.state = defaultdict(dict)
            for p, twin in twins.items():
                if p in states:
                    self.state[twin] = {name: _local(value) for name, value in states[p].items()}
            try:
                super().step()
                stepped = self.state
            finally:
                self.param_groups, self.state = groups, states
            for p, twin in twins.items():
                if p not in states:
                    states[p] = {n: v if n == "step" else _placed_as(p, v) for n, v in stepped[twin].items()}

    return LocalAdamW8bit


def _local(value: Tensor) -> Tensor:
    """This rank's part, in the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def _local_twin(parameter: Tensor) -> Tensor:
    """A plain tensor in the memory of this rank's part of a parameter, with its part of the gradient."""
    twin = _local(parameter.detach())
    twin.grad = _local(parameter.grad)
    return twin


def _placed_as(parameter: Tensor, part: Tensor) -> Tensor:
    """A rank's part of a moment as the whole moment, spread over ranks as the parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


class StepInBackward:
    """Steps each parameter as soon as backward has its gradient, and frees the gradient: there is no gradient buffer.

    A global norm is known only when backward is over, so it cannot scale the gradients. Each parameter's gradient is
    scaled by min(1, grad_clip / its own norm) instead, its norm taken over all ranks. A parameter whose gradient is
    not finite is not updated, on any rank; those before it in backward are updated by then. One backward is one step:
    gradients cannot be accumulated, and a loss scale cannot be taken back.

    Args:
        model: its parameters.
        optimizer: over the same parameters; it is asked to step on one at a time. Its state, groups and checkpoints are
            what they are without this class.
        grad_clip: largest norm of one parameter's gradient; 0 turns clipping off.
    """

    def __init__(self, model: Transformer, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
        self.optimizer, self.grad_clip = optimizer, grad_clip
        self._norms: dict[Tensor, Tensor | None] = dict.fromkeys(model.parameters())
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._step)

    @torch.no_grad()
    def _step(self, parameter: Tensor) -> None:
        if self._norms[parameter] is not None:
            raise RuntimeError("a parameter got a second gradient in one iteration: its first is applied already")
        norm = parallel.whole(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        self._norms[parameter] = norm
        if self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_([parameter], self.grad_clip, norm)
        optimizer = self.optimizer
        groups = optimizer.param_groups
        (group,) = (g for g in groups if any(p is parameter for p in g["params"]))
        # Judged by the optimizer's kernel, on the device: to ask here would make the host wait for every parameter.
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.param_groups = [{**group, "params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
            del optimizer.found_inf
        parameter.grad = None

    def finish(self) -> float:
        """The gradient's global norm before clipping, after backward; makes ready for the next iteration."""
        norms = [norm for norm in self._norms.values() if norm is not None]
        self._norms = dict.fromkeys(self._norms)
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else math.nan


def make_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Dynamic loss scaling for fp16, a pass-through for everything else.

    On sharded gradients PyTorch makes the ranks agree on infinities by itself.
    """
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
