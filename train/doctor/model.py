"""The checks of `moe-doctor` that run a model: a small one of the preset's kind, forward and backward once."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

from moe_engine.config import ModelConfig
from moe_engine.train.doctor.check import Check, Outcome, Setup, fail, passed, warn

_VOCAB, _BATCH, _LENGTH = 1000, 2, 192  # long enough for a window of 128 to hide something
_SEED = 1337
_INSTALL = "install torch (and triton, where there is a GPU) anew, and report this if it stays"


class TinyRun(NamedTuple):
    """What one forward and backward gave.

    Attributes:
        loss: nats per token.
        balance: of each layer, 1 = experts used equally.
        parameters: how many there are, as tensors.
        faulty: names of parameters whose gradient is missing or not finite.
        router_pull: of each layer, the norm of the balance loss's gradient at the router's weight.
    """

    loss: float
    balance: list[float]
    parameters: int
    faulty: list[str]
    router_pull: list[float]


def model_checks() -> list[Check]:
    """Both, in the order in which they are reported."""
    return [Check("forward/backward", _forward_backward, _INSTALL), Check("router", _router, _INSTALL)]


def miniature(config: ModelConfig) -> ModelConfig:
    """Two layers, one of them sliding if any does, and 64 wide; attention, experts and activation as configured."""
    group = config.num_heads // config.num_kv_heads
    return replace(
        config,
        vocab_size=_VOCAB,
        num_layers=2,
        d_model=64,
        num_heads=4,
        num_kv_heads=max(1, 4 // group),
        head_dim=16,
        d_ff=64,
    )


@cache
def tiny_run(config: ModelConfig, coef: float, device: torch.device, dtype: torch.dtype) -> TinyRun:
    """One forward and backward of a freshly initialised model on random tokens.

    Args:
        config: the miniature; coef: of the balance loss.
    """
    from moe_engine.model import Transformer
    from moe_engine.router import balance_loss

    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device=device)
    model.init_weights(_SEED)
    model.to(dtype)
    tokens = torch.randint(config.vocab_size, (_BATCH, _LENGTH + 1), generator=torch.Generator().manual_seed(_SEED))
    tokens = tokens.to(device)
    out = model(tokens[:, :-1], tokens[:, 1:])
    balance = balance_loss(out.stats, config.top_k)
    routers = [block.moe.router.weight for block in model.blocks]
    pull = torch.autograd.grad(balance.sum(), routers, retain_graph=True)
    loss = out.loss / (_BATCH * _LENGTH)
    (loss + coef * balance.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    faulty = [name for name, grad in gradients.items() if grad is None or not bool(grad.isfinite().all())]
    return TinyRun(loss.item(), balance.tolist(), len(gradients), faulty, [grad.norm().item() for grad in pull])


def _run(setup: Setup) -> TinyRun:
    config = miniature(setup.model)
    bf16 = bool(setup.devices) and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return tiny_run(config, setup.config.aux_coef(config.num_experts, config.router_balance), setup.device, dtype)


def _forward_backward(setup: Setup) -> Outcome:
    run, expected = _run(setup), math.log(_VOCAB)
    found = f"a model of 2 layers on {setup.device}: loss {run.loss:.3f}, ln({_VOCAB}) = {expected:.3f}"
    if not abs(run.loss - expected) < 0.1:  # a NaN too
        return fail(f"{found}: a random model must be near it", _INSTALL)
    if run.faulty:
        return fail(f"{found}; gradient missing or not finite: {', '.join(run.faulty)}", _INSTALL)
    return passed(f"{found}; the gradients of all {run.parameters} parameters are finite")


def _router(setup: Setup) -> Outcome:
    run, model = _run(setup), setup.model
    balance = ", ".join(f"{value:.3f}" for value in run.balance)
    coef = setup.config.aux_coef(model.num_experts, model.router_balance)
    found = (
        f"{model.num_experts} experts, top-{model.top_k}: router_aux_coef auto is"
        f" {coef:g}; balance of a random model {balance} (1 = equal use)"
    )
    if not all(math.isfinite(pull) and pull > 0 for pull in run.router_pull):
        return fail(f"{found}; the auxiliary loss has no gradient at the router's weight", _INSTALL)
    if not all(0.9 < value < 1.2 for value in run.balance):
        return warn(f"{found}: expected near 1", "watch balance_per_layer in the first iterations")
    return passed(f"{found}; the auxiliary gradient reaches every router")
