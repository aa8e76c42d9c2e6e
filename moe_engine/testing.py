"""Inputs for tests, and the error budget that says whether a result is right.

A result is judged against the same mathematics in fp64, by three measures of its relative error:

    largest  = max |actual − exact| / max |exact|                     one wrong element, two rows swapped
    typical  = rms(actual − exact) / rms(exact)                       noise everywhere
    bias     = |⟨actual − exact, exact⟩| / ⟨exact, exact⟩             a wrong factor, which noise would hide

each at most 2 × (that of plain PyTorch in the same dtype + one rounding of the dtype). There is no absolute tolerance:
a result of zeros has an error of 1 by all three measures. The bias is there for 16-bit types, whose noise covers a
factor of 1.01; its rounding is bfloat16's in every dtype, since in finer ones the other two see the factor first.

T = tokens, D = d_model, E = experts
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

FP64_SUMS = 64.0
"""Roundings to grant where fp64 is held against fp64: the same terms, added in another order."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal values, the same for a seed in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


def _balanced(z: Tensor) -> Tensor:
    return z


def _skewed(z: Tensor) -> Tensor:
    return z - 0.5 * torch.arange(z.shape[1])  # each expert gets e^½ times less than the one before it


def _one_expert(z: Tensor) -> Tensor:
    z[:, z.shape[1] // 2] += 30
    return z


def _empty_expert(z: Tensor) -> Tensor:
    z[:, z.shape[1] // 2] -= 30
    return z


def _duplicates(z: Tensor) -> Tensor:
    z = z.round()
    z[::3] = 0
    return z


def _nan(z: Tensor) -> Tensor:
    z[::3, -1] = math.nan
    z[1::6] = math.nan
    return z


LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "balanced": _balanced,
    "skewed": _skewed,  # a few experts do most of the work, as early in training
    "one_expert": _one_expert,  # the middle one is every token's first choice
    "empty_expert": _empty_expert,  # the middle one is nobody's choice while there are others
    "duplicates": _duplicates,  # few distinct values, every third row all equal: ties decide
    "nan": _nan,  # rows 0, 3, 6, … in one place, rows 1, 7, 13, … everywhere; the others are clean
}


def routing_logits(kind: str, tokens: int, experts: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Router logits `(T, E)` of a kind in `LOGITS`."""
    return LOGITS[kind](normal(tokens, experts, seed=seed)).to(dtype)


def parameters(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Values for every parameter of a layer or model, in fp64, of the size that trained ones have.

    Matrices keep the variance of what they multiply (standard deviation 1/√fan_in), norms are near 1, biases and sinks
    are not zero, so that none of them can be left out unnoticed. The module may be on the meta device.
    """
    values = {}
    for number, (name, parameter) in enumerate(module.named_parameters()):
        value = normal(*parameter.shape, seed=1000 * seed + number)
        if name.endswith("norm.weight"):
            value = 1 + 0.1 * value
        elif name.endswith("embedding.weight"):
            pass  # unit rows, as the norm behind it would make them
        elif name.endswith("sinks"):
            value = value + 1  # about the log-sum-exp of a few keys: the sink takes a visible share
        elif value.dim() == 1 or name.endswith(("b_up", "b_down")):
            value = 0.3 * value
        else:
            fan_in = value.shape[1] if name.endswith(("w_up", "w_down")) else value.shape[-1]
            value = value / math.sqrt(fan_in)
        values[name] = value
    return values


class RelativeError(NamedTuple):
    """The three measures of the module's docstring."""

    largest: float
    typical: float
    bias: float


def relative_error(values: Tensor, exact: Tensor) -> RelativeError:
    """Distance of values from exact ones (fp64, not all zero, same shape)."""
    values, exact = values.detach(), exact.detach()
    error = values.double() - exact
    square = exact.square().sum()
    return RelativeError(
        largest=float(error.abs().max() / exact.abs().max()),
        typical=float((error.square().sum() / square).sqrt()),
        bias=float((error * exact).sum().abs() / square),
    )


def _slices(tensor: Tensor) -> list[Tensor]:
    return list(tensor) if tensor.dim() > 2 else [tensor]


def assert_close(
    actual: Tensor,
    exact: Tensor,
    same_dtype_reference: Tensor | None = None,
    *,
    roundings: float = 0,
    name: str = "result",
) -> None:
    """Hold a result to the budget by each measure: error ≤ 2 × (error of the reference + one rounding).

    Tensors of three and more dimensions are judged slice by slice along the first, so that no expert or sequence hides
    behind a larger one. Where the exact slice is all zero, the actual one has to be.

    Args:
        actual: the result, of the dtype whose rounding counts.
        exact: the same in fp64, from the same inputs (rounded first, then widened).
        same_dtype_reference: the same from plain PyTorch in actual's dtype.
        roundings: the least error to take for the reference's, in roundings. 0 does for what is merely copied, and with
            a reference of many elements; of a handful, some are right by luck.
        name: what to call the result in the message.
    Raises:
        AssertionError: over the budget, not finite, or not of the exact result's shape.
        ValueError: exact is not finite fp64, or the reference is of another shape or dtype.
    """
    if exact.dtype != torch.float64 or not exact.isfinite().all():
        raise ValueError(f"exact: expected finite values in float64, got {exact.dtype}")
    reference = same_dtype_reference
    if reference is not None and (reference.shape, reference.dtype) != (actual.shape, actual.dtype):
        raise ValueError(f"same_dtype_reference: expected {actual.dtype}, {tuple(actual.shape)} as the result has it")
    assert actual.shape == exact.shape, f"{name}: expected shape {tuple(exact.shape)}, got {tuple(actual.shape)}"
    assert actual.isfinite().all(), f"{name}: {int((~actual.isfinite()).sum())} values are not finite"
    if exact.numel() == 0:
        return
    rounding = torch.finfo(actual.dtype).eps / 2
    exact = exact.detach()
    actual = actual.detach().to(exact.device)  # judged where the exact result is
    references = None if reference is None else _slices(reference.detach().to(exact.device))
    for i, (a, e) in enumerate(zip(_slices(actual), _slices(exact), strict=True)):
        where = f"{name}[{i}]" if exact.dim() > 2 else name
        if not e.any():
            assert not a.any(), f"{where}: expected zeros, got values up to {float(a.abs().max()):.3g}"
            continue
        found = relative_error(references[i], e) if references else RelativeError(0, 0, 0)
        units = RelativeError(rounding, rounding, max(rounding, torch.finfo(torch.bfloat16).eps / 2))
        for measure, got, granted, unit in zip(units._fields, relative_error(a, e), found, units, strict=True):
            budget = 2 * (max(granted, roundings * unit) + unit)
            assert got <= budget, f"{where}: {measure} error {got:.3g} exceeds its budget of {budget:.3g}"


def assert_budget_bites(exact: Tensor, same_dtype_reference: Tensor) -> None:
    """Show that `assert_close` with this reference would reject typical faults, so that passing means something.

    The faults: zeros, two rows exchanged, and everything 1 % too large.

    Raises:
        AssertionError: one of them would pass.
    """
    swapped = exact.clone(memory_format=torch.contiguous_format)
    rows = swapped.view(-1, swapped.shape[-1]) if swapped.dim() > 1 else swapped
    far = int((rows - rows[:1]).abs().reshape(len(rows), -1).sum(1).argmax())
    rows[torch.tensor([0, far])] = rows[torch.tensor([far, 0])]
    for fault, values in {"zeros": 0 * exact, "two rows swapped": swapped, "a factor of 1.01": 1.01 * exact}.items():
        try:
            assert_close(values.to(same_dtype_reference.dtype), exact, same_dtype_reference)
        except AssertionError:
            continue
        raise AssertionError(f"the budget lets {fault} pass")
