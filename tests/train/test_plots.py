"""The run's pictures: all of them, from the first points on, whatever the numbers are."""

import math
import random
from pathlib import Path

import numpy as np
import pytest

from moe_engine.train.metrics import RunLog
from moe_engine.train.plots import draw_plots

pytestmark = pytest.mark.usefixtures("rendered")

PICTURES = {"loss", "learning_rate", "gradient_norm", "router_balance", "expert_load", "throughput"}


def train_values(i: int) -> dict:
    rng = random.Random(i)
    return {
        "loss": 4 + 4 * math.exp(-i / 40) + rng.gauss(0, 0.05),
        "lr": 3e-4 * min(1, i / 20),
        "grad_norm": 0.8 + rng.random() * 0.2,
        "router_aux": 0.0003,
        "balance_per_layer": [1.0 + rng.random() / i, 1.0 + rng.random() / i],
        "expert_share": [[0.25, 0.25, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]],
        "tokens_per_second": 6000.0 + rng.random(),
        "mfu": 0.12,
        "data_wait": 0.004,
    }


def write_run(folder: Path, start: int, stop: int) -> None:
    with RunLog(folder, console=False) as log:
        for i in range(start + 1, stop + 1):
            log.metrics("train", i, **train_values(i))
            if i % 5 == 0:
                log.metrics("eval", i, loss=4 + 4 * math.exp(-i / 40))


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.parametrize("length", [5, 40])
def test_pictures(tmp_path: Path, length: int) -> None:
    write_run(tmp_path, 0, length)
    drawn = draw_plots(tmp_path, grad_clip=1.0, warmup_iters=20)
    assert {p.stem for p in drawn} == PICTURES
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {f"{name}.png" for name in PICTURES}
    for path in drawn:
        image = pixels(path)[:, :, :3]
        coloured = (np.ptp(image, axis=2) > 0.3).sum()  # axes, grid and text are grey
        assert image.shape[1] == 1040 and coloured > 300, f"{path.name}: {coloured} coloured pixels"


def test_pictures_follow_the_metrics(tmp_path: Path) -> None:
    write_run(tmp_path, 0, 10)
    (loss, *_) = draw_plots(tmp_path)
    before = pixels(loss)
    write_run(tmp_path, 10, 30)
    draw_plots(tmp_path)
    assert not np.array_equal(before, pixels(loss))


def test_pictures_of_what_is_there(tmp_path: Path) -> None:
    assert draw_plots(tmp_path) == []
    with RunLog(tmp_path, console=False) as log:
        log.metrics("eval", 0, loss=8.3)
    assert [p.stem for p in draw_plots(tmp_path)] == ["loss"]


def test_pictures_survive_nan(tmp_path: Path) -> None:
    bad = dict.fromkeys(["loss", "lr", "grad_norm", "tokens_per_second", "mfu", "data_wait"], math.nan)
    with RunLog(tmp_path, console=False) as log:
        for i in range(20):
            log.metrics("train", i, **bad, balance_per_layer=[math.nan, math.inf], expert_share=[[math.nan, 0.5]])
            log.metrics("eval", i, loss=math.nan)
    assert {p.stem for p in draw_plots(tmp_path, grad_clip=1.0)} == PICTURES
