"""Optimizers: AdamW or AdamW with 8-bit moments, stepped after backward or inside it; loss scaling for fp16."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor

from moe_engine.model import Transformer
from moe_engine.train import parallel
from moe_engine.train.config import TrainConfig
from moe_engine.train.errors import InputError

_SLICE = 1 << 24  # elements that adamw8bit updates at once: 64 MB an fp32 temporary; a multiple of 256


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices, which decay, and everything else (norms, biases, sinks), which does not.

    `adamw` is PyTorch's, fused. `adamw8bit` is torchao's: both moments of a parameter (of a rank's part of it) that
    has at least 4096 elements and a multiple of 256 are kept in 8 bits with one fp32 scale for 256 elements. It rounds
    stochastically where weights are bf16, and not at all where they are fp32.

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
        return _adamw8bit_class()(groups, config.seed, **options)
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
        from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned
    except ImportError as error:
        raise InputError(
            "--optimizer adamw8bit: expected torchao to be installed, got "
            f"{type(error).__name__}: {str(error).splitlines()[0]}; pip install -e '.[adamw8bit]', or --optimizer adamw"
        ) from None

    with unset_fake_temporarily():  # tables that torchao makes once and reads back, which fake tensors cannot be
        get_qmap_signed(), get_qmap_unsigned()

    class LocalAdamW8bit(AdamW8bit):
        """Steps on each rank's own part of a sharded parameter, a slice of it at a time.

        AdamW is elementwise, so a part needs nothing from the others. Torchao compiles its step, and the compiler does
        not take a DTensor of 8-bit moments apart; plain tensors that share memory with slices of the part it does.
        Outside of `step` parameters and moments are whole (DTensors where sharded), as checkpoints need them. A slice
        bounds what a step needs in fp32 beside them, and makes most parameters one shape to compile. Moments exist from
        the start, in fp32 where they are not in 8 bits, whatever the parameter's dtype.

        Stochastic rounding draws from a seed, the parameter's number, the number of its steps and the part's place
        among the parts. So replicas of a part stay equal, and a resumed run draws what the uninterrupted one did.
        """

        def __init__(self, groups: list[dict[str, Any]], seed: int, **options: Any) -> None:
            super().__init__(groups, bf16_stochastic_round=True, **options)
            self._seed = seed
            self._numbers = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
            for p in self._numbers:
                self.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": _placed_as(p, self._zeros(_local(p.detach()), signed=True)),
                    "exp_avg_sq": _placed_as(p, self._zeros(_local(p.detach()), signed=False)),
                }

        def _zeros(self, part: Tensor, signed: bool) -> Tensor:
            """A moment of a rank's part, in 8 bits under torchao's condition, else in fp32."""
            if part.numel() >= 4096 and part.numel() % self.block_size == 0:
                return OptimState8bit.zeros(part.shape, signed, self.block_size, part.device, dtype=torch.float32)
            return torch.zeros_like(part, dtype=torch.float32)

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            """One step for all parameters with a gradient; none if `found_inf`, as in PyTorch's fused AdamW, is set."""
            if bool(getattr(self, "found_inf", False)):
                return
            groups = self.param_groups
            stepping = [(p, group) for group in groups for p in group["params"] if p.grad is not None]
            devices = {p.device for p, _ in stepping if p.device.type != "cpu"}
            with torch.random.fork_rng(devices, device_type=next(iter(devices)).type if devices else "cpu"):
                for p, group in stepping:
                    self._step_slices(p, group)

        def _step_slices(self, p: Tensor, group: dict[str, Any]) -> None:
            """Torchao's step of one parameter, on twins of its slices."""
            groups, states = self.param_groups, self.state
            state = states[p]
            if p.dtype == torch.bfloat16:
                draw = f"{self._seed} {self._numbers[p]} {int(state['step'])} {part_number(p)}"
                torch.manual_seed(zlib.crc32(draw.encode()))
            part, grad = _local(p.detach()).view(-1), _local(p.grad).view(-1)
            moments = {name: _local(state[name]) for name in ("exp_avg", "exp_avg_sq")}
            twins = {}
            for begin in range(0, part.numel(), _SLICE):
                end = min(begin + _SLICE, part.numel())
                twin = part[begin:end]
                twin.grad = grad[begin:end]
                twins[twin] = {"step": state["step"].clone()} | {n: _slice(m, begin, end) for n, m in moments.items()}
            self.param_groups, self.state = [{**group, "params": list(twins)}], twins
            try:
                super().step()
            finally:
                self.param_groups, self.state = groups, states
            state["step"] += 1

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """As PyTorch's, but moments keep their dtype: PyTorch gives them the parameter's."""
            super().load_state_dict(state_dict)
            keys = (key for group in state_dict["param_groups"] for key in group["params"])
            for p, key in zip((p for g in self.param_groups for p in g["params"]), keys, strict=True):
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[p][name] = state_dict["state"][key][name]

    def _slice(moment: Tensor, begin: int, end: int) -> Tensor:
        """Elements of a rank's moment, in the same memory; begin is a multiple of 256."""
        if not isinstance(moment, OptimState8bit):
            return moment.view(-1)[begin:end]
        scale = moment.scale[begin // moment.block_size : end // moment.block_size]
        return OptimState8bit(moment.codes.view(-1)[begin:end], scale, moment.qmap, moment.signed, moment.dtype)

    return LocalAdamW8bit


def _local(value: Tensor) -> Tensor:
    """This rank's part, in the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def part_number(parameter: Tensor) -> int:
    """Which of a parameter's distinct parts this rank has; replicas of a part have its number in common."""
    number = 0
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for place, size, placement in zip(mesh.get_coordinate(), mesh.shape, parameter.placements, strict=True):
            if not placement.is_replicate():
                number = number * size + place
    return number


def _placed_as(parameter: Tensor, part: Tensor) -> Tensor:
    """A rank's part of a moment as the whole moment, spread over ranks as the parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    whole = DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return whole.to(part.device)  # from_local takes a part in the host's memory to the mesh's device


class StepInBackward:
    """Steps each parameter as soon as backward has its gradient, and frees the gradient: there is no gradient buffer.

    A global norm is known only when backward is over, so it cannot scale the gradients. Each parameter's gradient is
    scaled by min(1, grad_clip / its own norm) instead, its norm taken over all ranks. A parameter whose gradient is
    not finite is not updated, on any rank; those before it in backward are updated by then. Where the loss is not
    finite, none is. One backward is one step: gradients cannot be accumulated, and a loss scale cannot be taken back.

    Args:
        model: its parameters.
        optimizer: over the same parameters; it is asked to step on one at a time. Its state, groups and checkpoints are
            what they are without this class.
        grad_clip: largest norm of one parameter's gradient; 0 turns clipping off.
    """

    def __init__(self, model: Transformer, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
        self.optimizer, self.grad_clip = optimizer, grad_clip
        self.loss: Tensor  # the mean over ranks, (), to be set before each backward
        self._norms: dict[Tensor, Tensor | None] = dict.fromkeys(model.parameters())
        # By number: a checkpoint that is loaded replaces the groups themselves.
        self._group = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
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
        group = groups[self._group[parameter]]
        # Judged by the optimizer: PyTorch's kernel does so on the device, where the host need not wait for it.
        optimizer.found_inf = (~(norm.isfinite() & self.loss.isfinite())).float()
        optimizer.param_groups = [{**group, "params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
            del optimizer.found_inf
        parameter.grad = None

    def finish(self) -> Tensor:
        """The gradient's global norm before clipping, after backward; makes ready for the next iteration."""
        norms = [norm for norm in self._norms.values() if norm is not None]
        self._norms = dict.fromkeys(self._norms)
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(math.nan)


def make_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Dynamic loss scaling for fp16, a pass-through for everything else.

    On sharded gradients PyTorch makes the ranks agree on infinities by itself.
    """
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
