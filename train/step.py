"""One iteration of training: model, losses, gradients, update.

An iteration is one optimizer step over `batch_size · grad_accum_steps` sequences a rank. Its loss is

    Σ nats / tokens + router_aux_coef · Σ_layers balance + router_z_coef · Σ_layers z_loss
                    + logit_z_coef · Σ logsumexp(logits)² / tokens

balance uses the expert counts of all ranks (global-batch balance), so that the number of ranks does not change the
loss of a global batch.

`Trainer` runs it on data, `memory` on tensors that have shapes only: nothing here knows which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_engine.config import ModelConfig
from moe_engine.model import ModelOutput, Transformer
from moe_engine.router import balance_loss, z_loss
from moe_engine.train import parallel
from moe_engine.train.config import TrainConfig
from moe_engine.train.device import DTYPES
from moe_engine.train.errors import InputError
from moe_engine.train.optim import StepInBackward, make_optimizer, make_scaler, set_learning_rate
from moe_engine.train.parallel import World, all_sum
from moe_engine.train.skips import SpikeGuard, not_finite


@dataclass
class Step:
    """What one iteration did. Tensors stay on the device; loss and router values are this rank's."""

    loss: Tensor  # nats per token, with the z-loss of the logits if there is one
    losses: Tensor  # (micro-steps): the loss is their mean
    balance: Tensor  # (layers)
    z: Tensor  # (layers)
    grad_norm: float
    applied: bool
    reason: str  # why it was not applied, in words; all ranks have the same


def build_model(
    config: TrainConfig,
    model_config: ModelConfig,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
    *,
    sharded: bool,
) -> Transformer:
    """The model on the meta device, wrapped with FSDP2 if `sharded`; it has no storage yet.

    Raises:
        InputError: the backend asked for is not there.
    """
    try:
        with torch.device("meta"):
            model = Transformer(model_config)
    except ValueError as error:
        raise InputError(f"--model.{error}") from None
    model.set_checkpointing(config.checkpointing, config.checkpoint_every)
    parallel.cast_weights(model, DTYPES[config.param_dtype])
    if sharded:
        parallel.shard(
            model,
            world,
            device,
            dtype,
            replicas=config.dp_replicate,
            reshard_after_forward=config.reshard_after_forward == "always",
            cpu_offload=config.cpu_offload,
        )
    return model


class Engine:
    """A model in training.

    Args:
        config: what to train.
        model: with storage; sharded or not.
        world: this process among the others.
        device, dtype: of the computation.
    """

    def __init__(
        self, config: TrainConfig, model: Transformer, world: World, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.model, self.world = config, model, world
        self.model_config = model.config
        self.grad_accum_steps = config.grad_accum_steps  # another number when a run goes on with other ranks
        self.aux_coef = config.aux_coef(model.config.num_experts, model.config.router_balance)
        self.expert_counts: Tensor | int = 0  # (layers, E), over all ranks and the micro-steps of the present step
        self.optimizer = make_optimizer(model, config)
        in_backward = config.optimizer_in_backward
        self.in_backward = StepInBackward(model, self.optimizer, config.grad_clip) if in_backward else None
        self.scaler = make_scaler(dtype, device)
        self.guard = SpikeGuard(config.skip_spikes)

    def _losses(self, out: ModelOutput) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross-entropy of a micro-batch; balance, with the expert counts of all ranks, and z-loss `(layers)`."""
        counts = all_sum(out.stats.expert_counts.clone(), self.world)
        if self.model_config.router_balance == "bias":
            self.expert_counts = self.expert_counts + counts
        balance = balance_loss(out.stats, self.model_config.top_k, counts)
        z = z_loss(out.stats, self.model_config.top_k)
        return out.loss / (self.config.batch_size * self.config.block_size), balance, z

    def step(self, batches: Iterable[tuple[Tensor, Tensor]], iteration: int) -> Step:
        """One optimizer step. All ranks apply it or, when a loss or a gradient is not finite or a spike, none does.

        With `optimizer_in_backward` that holds, as to gradients, for each parameter and not for all together.

        Args:
            batches: grad_accum_steps pairs of inputs and targets, `(batch_size, block_size)` int64.
            iteration: steps before this one; decides the learning rate.
        """
        config = self.config
        parts: list[tuple[Tensor, ...]] = []
        self.expert_counts = 0
        set_learning_rate(self.optimizer, config.learning_rate(iteration))
        for micro_step, (inputs, targets) in enumerate(batches):
            jitter = self._jitter(iteration * self.grad_accum_steps + micro_step)
            mean, balance, z = self._losses(self.model(inputs, targets, z_coef=config.logit_z_coef, jitter=jitter))
            total = mean + self.aux_coef * balance.sum()
            if config.router_z_coef:
                total = total + config.router_z_coef * z.sum()
            if self.in_backward:  # it steps before backward is over, and must know by then
                self.in_backward.loss = self._global(mean)
            self.scaler.scale(total / self.grad_accum_steps).backward()
            parts.append((mean.detach(), balance.detach(), z.detach()))
        losses, *router = (torch.stack(values) for values in zip(*parts, strict=True))
        loss, balance, z = losses.mean(0), *(values.mean(0) for values in router)
        grad_norm, reason = self._update(loss)
        applied = not reason
        if applied and self.model_config.router_balance == "bias":
            self.model.update_select_bias(self.expert_counts, config.router_bias_rate)
        return Step(loss, losses, balance, z, grad_norm, applied, reason)

    def _global(self, loss: Tensor) -> Tensor:
        """The mean of a loss over ranks, fp64, on the device."""
        return all_sum(loss.detach().double(), self.world) / self.world.size

    def _jitter(self, micro_steps: int) -> tuple[int, int] | None:
        """What the model draws the routers' noise from: a sequence has the same on any rank, in any micro-step."""
        if not self.model_config.router_jitter:
            return None
        return self.config.seed, (micro_steps * self.world.size + self.world.rank) * self.config.batch_size

    def _update(self, loss: Tensor) -> tuple[float, str]:
        """Clip and step, or skip it.

        Args:
            loss: this rank's.
        Returns:
            The gradient's global norm before clipping, and why the step was not taken; empty if it was.
        """
        if self.in_backward:  # done
            mean, norm = self.in_backward.loss, self.in_backward.finish()
            _, grad_norm, reason = self._judge(mean, norm)
            return grad_norm, reason
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        # As torch.nn.utils.get_total_norm, which would give a bf16 gradient's norm in bf16.
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        mean, grad_norm, reason = self._judge(self._global(loss), parallel.whole(norm))
        if not reason:
            if self.config.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
            self.scaler.step(self.optimizer)
            self.guard.applied(mean, grad_norm)
        # An overflow lowers fp16's loss scale; a step that is skipped for another reason says nothing about it.
        skipped_otherwise = bool(reason) and math.isfinite(grad_norm)
        self.scaler.update(self.scaler.get_scale() if skipped_otherwise else None)
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, reason

    def _judge(self, loss: Tensor, norm: Tensor) -> tuple[float, float, str]:
        """Loss and gradient norm, both global, as numbers, and why such an iteration is skipped; empty if it is not.

        Every rank sees the same numbers and decides alike. Nowhere else in a step does the host wait for the device.
        """
        mean, grad_norm = torch.stack((loss, norm.to(loss.device, torch.float64))).tolist()
        return mean, grad_norm, not_finite(mean, grad_norm) or self.guard.spike(mean, grad_norm)
