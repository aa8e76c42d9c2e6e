"""Whether a layer's output and gradients are right: the layer benchmark asks before it takes a time.

Judge is `moe_engine.reference` in fp64, budget that of `moe_engine.testing`: twice the error of the same reference in
the layer's own dtype (at least `LEAST_ERROR`) and one rounding. Results are those at the very sizes that are timed: the
output of all tokens, and every gradient for a `grad_out` that is zero but for `layer_steps.CHECKED` tokens spread over
all. The others have to add exactly nothing to these gradients; and the reference, its weights apart, needs memory for
so many tokens only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_engine import MoELayer, reference
from moe_engine.bench.layer_steps import Inputs
from moe_engine.testing import assert_close

AT_ONCE = 1024
"""Tokens of which the reference computes the output in one go."""
LEAST_ERROR = 16 * torch.finfo(torch.float32).eps / 2
"""Of results, relative, when everybody adds in fp32 in an order of his own: the reference's can be less by luck."""


class Truth(NamedTuple):
    """What `Step.results` has to be: in fp64, and in the layer's dtype by the same plain code."""

    exact: dict[str, Tensor]
    plain: dict[str, Tensor]


def make_truth(layer: MoELayer, inputs: Inputs) -> Truth:
    """The results of a layer, by the reference."""
    return Truth(by_reference(layer, inputs, torch.float64), by_reference(layer, inputs, layer.w_up.dtype))


def by_reference(layer: MoELayer, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `Step.results` has to be, computed in a dtype."""
    x, sample, config = inputs.x[0].to(dtype), inputs.sample, layer.config
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in layer.named_parameters()}
    # By expert: the gradient of an index into all of them would be as large as all of them, for each.
    params = {name: value if name.startswith("router.") else value.unbind() for name, value in leaves.items()}
    rows = x[sample].requires_grad_()
    out = reference.moe(rows, params, config).out
    grad_rows, *grads = torch.autograd.grad(out, [rows, *leaves.values()], inputs.grad_out[0, sample].to(dtype))
    with torch.no_grad():
        out = torch.cat([reference.moe(part, params, config).out for part in x.split(AT_ONCE)])
    grad_x = torch.zeros_like(x)
    grad_x[sample] = grad_rows
    return {"out": out, "x": grad_x} | dict(zip(leaves, grads, strict=True))


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def what_is_wrong(results: dict[str, Tensor], truth: Truth) -> str:
    """The first result that is missing or over its budget, and by how much; "" if none is."""
    exact, plain = truth
    if results.keys() != exact.keys():
        return f"has {', '.join(sorted(results))}; the reference {', '.join(sorted(exact))}"
    for which, value in results.items():
        rounding = torch.finfo(value.dtype).eps / 2
        roundings = max(1.0, LEAST_ERROR / rounding)
        name = which if which == "out" else f"gradient of {which}"
        if exact[which].any():
            try:
                assert_close(value, exact[which], plain[which], roundings=roundings, name=name)
            except AssertionError as error:
                return str(error)
        else:  # what cancels, as all of the router's gradient does with one expert a token: roundings of what cancelled
            rounding *= max(map(_rms, exact.values()))
            budget = 2 * (max(_rms(plain[which]), roundings * rounding) + rounding)
            if not (error := _rms(value)) <= budget:
                return f"{name}: expected zeros, got values of {error:.3g}, more than the budget of {budget:.3g}"
    return ""
