"""The error budget and the input makers: what they accept, and above all what they reject."""

import math

import pytest
import torch

from moe_engine import ModelConfig, MoEConfig, MoELayer, Transformer
from moe_engine.testing import (
    LOGITS,
    assert_budget_bites,
    assert_close,
    normal,
    parameters,
    relative_error,
    routing_logits,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def _product(dtype, rows=512):
    """A GEMM in a dtype, the same with another order of summation, and the exact one."""
    x, w = normal(rows, 96, seed=1, dtype=dtype), normal(96, 64, seed=2, dtype=dtype)
    exact = x.double() @ w.double()
    halves = (x[:, :48] @ w[:48] + x[:, 48:] @ w[48:]).to(dtype)
    return x @ w, halves, exact


@pytest.mark.parametrize("dtype", LOW)
def test_another_order_of_summation_passes(dtype):
    reference, halves, exact = _product(dtype)
    assert_close(halves, exact, reference)


@pytest.mark.parametrize("dtype", LOW)
def test_correctly_rounded_values_pass_without_a_reference(dtype):
    exact = normal(100, 30)
    assert_close(exact.to(dtype), exact)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("rows", [2, 16_384], ids=["two rows", "many rows, which dilute a fault in two of them"])
def test_budget_rejects_zeros_swapped_rows_and_one_percent(dtype, rows):
    reference, _, exact = _product(dtype, rows)
    assert_budget_bites(exact, reference)


@pytest.mark.parametrize(
    ("fault", "measure"),
    [
        (lambda e: torch.zeros_like(e), "largest"),
        (lambda e: e[torch.tensor([1, 0, *range(2, len(e))])], "largest"),
        (lambda e: e * 1.01, "bias"),
        (lambda e: e * (1 + 0.02 * normal(*e.shape, seed=9)), "typical"),
        (lambda e: torch.where(torch.arange(len(e))[:, None] == 7, e * 1.3, e), "largest"),
    ],
    ids=["zeros", "two rows swapped", "1 % too large", "2 % of noise", "one row wrong"],
)
def test_each_measure_has_a_fault_to_catch(fault, measure):
    reference, _, exact = _product(torch.bfloat16)
    actual = fault(exact).bfloat16()
    granted, got = relative_error(reference, exact), relative_error(actual, exact)
    rounding = torch.finfo(torch.bfloat16).eps / 2
    assert getattr(got, measure) > 2 * (getattr(granted, measure) + rounding)
    with pytest.raises(AssertionError, match="exceeds its budget"):
        assert_close(actual, exact, reference)


def test_a_budget_that_does_not_bite_is_reported():
    exact = normal(100, 30)
    sloppy = (exact * 1.02).bfloat16()  # a reference this bad grants its own fault to everybody
    with pytest.raises(AssertionError, match=r"lets a factor of 1\.01 pass"):
        assert_budget_bites(exact, sloppy)


def test_a_small_slice_does_not_hide_behind_a_large_one():
    exact = normal(2, 40, 30) * torch.tensor([1.0, 1e-6])[:, None, None]
    actual = exact.float()
    assert_close(actual, exact)
    actual[1] = 0
    with pytest.raises(AssertionError, match=r"grad\[1\]"):
        assert_close(actual, exact, name="grad")


def test_where_nothing_is_expected_nothing_passes_but_zeros():
    exact = torch.zeros(3, 4, dtype=torch.float64)
    assert_close(exact.float(), exact)
    with pytest.raises(AssertionError, match="expected zeros"):
        assert_close(exact.float() + 1e-30, exact)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_is_rejected(value):
    exact = normal(3, 4)
    actual = exact.float()
    actual[1, 2] = value
    with pytest.raises(AssertionError, match="1 values are not finite"):
        assert_close(actual, exact)
    with pytest.raises(ValueError, match="exact: expected finite"):
        assert_close(exact.float(), actual.double())


def test_scalars_and_empty_tensors():
    assert_close(torch.tensor(1.0 + 1e-7), torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(torch.tensor(1.0 + 1e-6), torch.tensor(1.0, dtype=torch.float64))
    assert_close(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.float64))


def test_wrong_arguments_are_named():
    exact = normal(3, 4)
    with pytest.raises(AssertionError, match=r"expected shape \(3, 4\), got \(4, 3\)"):
        assert_close(exact.float().t(), exact)
    with pytest.raises(ValueError, match="same_dtype_reference"):
        assert_close(exact.float(), exact, exact.bfloat16())
    with pytest.raises(ValueError, match="exact"):
        assert_close(exact.float(), exact.float())


@pytest.mark.parametrize("kind", LOGITS)
def test_logits_are_what_their_kind_says(kind):
    z = routing_logits(kind, 60, 8, seed=3)
    assert z.shape == (60, 8) and z.dtype == torch.float32
    assert torch.equal(z.nan_to_num(), routing_logits(kind, 60, 8, seed=3).nan_to_num())
    first = z.nan_to_num(nan=100).argmax(1)
    counts = torch.bincount(first, minlength=8)
    if kind == "balanced":
        assert counts.min() > 0 and counts.max() < 20
    elif kind == "skewed":
        assert counts[0] > 3 * counts[4:].sum()
    elif kind == "one_expert":
        assert counts[4] == 60
    elif kind == "empty_expert":
        assert (z.argsort(1)[:, 0] == 4).all()
    elif kind == "duplicates":
        assert (z[::3] == 0).all() and z.unique().numel() < 12
    else:
        bad = z.isnan().any(1)
        assert bad[0] and bad[1] and not bad[2] and z[1].isnan().all() and z[0].isnan().sum() == 1


def test_seeds_differ_and_repeat():
    assert torch.equal(normal(5, 6, seed=1), normal(5, 6, seed=1))
    assert not torch.equal(normal(5, 6, seed=1), normal(5, 6, seed=2))
    assert torch.equal(normal(5, 6, dtype=torch.bfloat16), normal(5, 6).bfloat16())


def test_parameters_keep_activations_near_one_and_leave_nothing_at_its_default():
    config = MoEConfig(d_model=256, d_ff=192, num_experts=4)
    values = parameters(MoELayer(config))
    assert values.keys() == dict(MoELayer(config).named_parameters()).keys()
    x = normal(500, 256)
    assert 0.8 < (x @ values["w_up"][0]).std() < 1.2
    assert 0.8 < (x @ values["router.weight"].T).std() < 1.2
    assert all(v.abs().max() > 0.1 and v.dtype == torch.float64 for v in values.values())
    with torch.device("meta"):
        model = Transformer(ModelConfig(64, 2, 32, 4, 2, 8, 24))
    values = parameters(model)
    assert 0.5 < values["blocks.0.attention_norm.weight"].mean() < 1.5
    assert values["blocks.0.attention.sinks"].std() > 0.1
    assert not torch.equal(values["blocks.0.attention.sinks"], values["blocks.1.attention.sinks"])
    model.to_empty(device="cpu").load_state_dict(values)
