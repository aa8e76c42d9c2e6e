"""What a train record says to a person: its line, and the warning signs at exactly their thresholds."""

import math
import random

import pytest

from moe_engine.train.signs import (
    WarningSigns,
    drop_cause,
    format_seconds,
    format_train_line,
    grad_sign,
    is_loss_spike,
    router_sign,
    short_number,
)


def test_train_line() -> None:
    values = {
        "loss": 4.2131,
        "lr": 2.9e-4,
        "grad_norm": 0.83,
        "router_aux": 0.0003,
        "tokens_per_second": 11_200.0,
        "mfu": 0.123,
        "data_wait": 0.004,
        "memory": 1.2e9,
        "eta": 92.0,
    }
    assert format_train_line(120, 400, values) == (
        "iter 120/400 | loss 4.213 | lr 2.9e-04 | grad 0.83 | router_aux 0.0003 ok | 11.2K tok/s | mfu 12.3%"
        " | data 0.4% | mem 1.2 GB | eta 1m32s"
    )
    assert (
        format_train_line(1, 9, {"loss": math.nan, "router_aux": 0.02}) == "iter 1/9 | loss nan | router_aux 0.02 bad"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7.6, "8s"), (92, "1m32s"), (3599.7, "1h00m"), (7500, "2h05m"), (273_600, "3d04h"), (math.inf, "?")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(940, "940"), (999.9, "1K"), (11_210, "11.2K"), (1_850_000, "1.85M")])
def test_short_numbers(number: float, text: str) -> None:
    assert short_number(number) == text


@pytest.mark.parametrize(
    ("aux", "sign"),
    [(0.0, "ok"), (0.00099, "ok"), (0.001, "warning"), (0.01, "warning"), (0.0101, "bad"), (math.nan, "bad")],
)
def test_router_sign(aux: float, sign: str) -> None:
    assert router_sign(aux) == sign


@pytest.mark.parametrize(
    ("norms", "sign"),
    [
        ([0.9], "ok"),
        ([3.0, 0.9, 3.0], "ok"),
        ([3.0, 0.9, 3.0, 2.1], "warning"),
        ([3.0, 3.0, 3.0] + [1.0] * 7, "warning"),
        ([3.0, 3.0, 3.0] + [1.0] * 8, "ok"),
        ([2.0] * 10, "ok"),
        ([1.0, math.nan], "bad"),
        ([math.inf], "bad"),
    ],
)
def test_grad_sign(norms: list[float], sign: str) -> None:
    assert grad_sign(norms) == sign


def test_loss_spike() -> None:
    steady = [4.0, 4.1, 3.9, 4.0, 4.1, 3.9]
    assert not is_loss_spike(4.5, steady), "not 0.5 above the mean"
    assert is_loss_spike(4.51, steady)
    assert not is_loss_spike(9.0, steady[:4]), "too few to know what is usual"
    noisy = [3.0, 5.0] * 5
    assert not is_loss_spike(7.9, noisy), "within four standard deviations"
    assert is_loss_spike(8.1, noisy)


def test_a_healthy_run_has_no_warnings() -> None:
    rng, signs = random.Random(0), WarningSigns()
    for i in range(300):
        loss = 4 + 4 * math.exp(-i / 40) + rng.gauss(0, 0.05)
        rate, norm = rng.gauss(6000, 100), 3 * math.exp(-i) + rng.uniform(0.7, 1.2)
        values = {"loss": loss, "grad_norm": norm, "router_aux": 0.0003, "tokens_per_second": rate}
        assert signs.check(values) == []


def test_loss_spike_is_reported_once() -> None:
    signs = WarningSigns()
    for _ in range(10):
        assert signs.check({"loss": 4.0}) == []
    (warning,) = signs.check({"loss": 6.0})
    assert warning.startswith("loss 6.000 jumped above its running mean 4.000") and "--lr" in warning
    assert signs.check({"loss": 4.0}) == []


def test_nan_is_always_reported() -> None:
    signs = WarningSigns()
    for _ in range(2):
        loss, norm = signs.check({"loss": math.nan, "grad_norm": math.inf})
        assert loss.startswith("loss is nan: lower --lr") and norm.startswith("gradient norm is inf: lower --lr")
    assert signs.check({"loss": 4.0, "grad_norm": 1.0}) == []


def test_frequent_large_gradients() -> None:
    signs = WarningSigns()
    seen = [signs.check({"grad_norm": norm}) for norm in [3.0, 1.0, 3.0, 3.0, 3.0, *[1.0] * 10, 3.0]]
    assert [len(s) for s in seen] == [0, 0, 0, 1] + [0] * 12
    assert seen[3][0].startswith("gradient norm above 2.0 in 3 of the last 4 log lines")


def test_router_warning_gets_worse_then_recovers() -> None:
    signs = WarningSigns()
    seen = [signs.check({"router_aux": aux}) for aux in [0.0005, 0.002, 0.003, 0.02, 0.02, 0.005, 0.0005, 0.002]]
    assert [len(s) for s in seen] == [0, 1, 0, 1, 0, 0, 0, 1]
    assert "0.002 is warning" in seen[1][0] and "0.02 is bad" in seen[3][0]


def test_throughput_drop_names_its_cause() -> None:
    signs = WarningSigns()
    rates = [500.0, 2000.0] + [6000.0] * 6  # compilation and warm-up first
    assert [w for rate in rates for w in signs.check({"tokens_per_second": rate, "seconds": 1.0})] == []
    slow = {"tokens_per_second": 3000.0, "seconds": 2.0, "data_wait_seconds": 0.1, "eval_seconds": 0.9}
    (warning,) = signs.check(slow)
    assert warning == (
        "throughput fell to 3K tok/s, 50% of the usual 6K: evaluation took 0.9 s since the last log line"
    )
    assert signs.check(slow) == [], "said once while it lasts"
    assert signs.check({"tokens_per_second": 4300.0}) == [], "above 70 %"


@pytest.mark.parametrize(
    ("seconds", "cause"),
    [
        ({"data_wait_seconds": 0.8, "eval_seconds": 0.1}, "waiting for data"),
        ({"save_seconds": 0.8, "sample_seconds": 0.7}, "saving"),
        ({"sample_seconds": 0.8}, "sampling"),
        ({"data_wait_seconds": 0.3}, "the step itself"),
        ({}, "the step itself"),
    ],
)
def test_drop_cause(seconds: dict[str, float], cause: str) -> None:
    assert drop_cause({"tokens_per_second": 50.0, "seconds": 2.0, **seconds}, 100.0).startswith(cause)
