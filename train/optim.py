"""The optimizer: AdamW with decay on matrices only, and loss scaling for fp16."""

from __future__ import annotations

import torch

from moe_engine.model import Transformer
from moe_engine.train.config import TrainConfig


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW in two groups: matrices, which decay, and everything else (norms, biases, sinks), which does not."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (others if model.initial_std(name) is None else matrices).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)


def make_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Dynamic loss scaling for fp16, a pass-through for everything else.

    On sharded gradients PyTorch makes the ranks agree on infinities by itself.
    """
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
