"""What the guide promises for `8b`, row by row, and what we hold ourselves to.

The moonshot is 10 K tok/s on each A100 and 25 K on each H100: five times the guide's row of one A100 80 GB, 58 % of
that card's peak at block 4096, 46 % of an H100's. Five times the guide's 32 K on eight A100 would be 116 % of their
peak, so it is by card and not by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_engine.bench.gpus import GPUS, Gpu

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MOONSHOT = {"A100": 10_000.0, "H100": 25_000.0}
"""Tokens per second of one card, by what its device name contains."""


@dataclass(frozen=True)
class Target:
    """A row of the guide's table.

    Attributes:
        file: configuration in `configs/` with its batch and block size.
        gpu: key of `GPUS`.
        ranks: how many of them.
        guide_gb, required_gb, aim_gb: memory of a device: what the guide says, what has to be kept, what would be good.
        tokens_per_second: what the guide says, over all ranks.
    """

    file: str
    gpu: str
    ranks: int
    guide_gb: float
    required_gb: float
    aim_gb: float
    tokens_per_second: float

    @property
    def card(self) -> Gpu:
        """The card."""
        return GPUS[self.gpu]

    @property
    def moonshot(self) -> float:
        """Tokens per second over all ranks."""
        return MOONSHOT[self.card.match] * self.ranks


GUIDE = (
    Target("8b_1x40gb.toml", "a100-40gb", 1, 35, 37.5, 35, 1_000),
    Target("8b_1x80gb.toml", "a100-80gb", 1, 70, 70, 60, 2_000),
    Target("8b_8x40gb.toml", "a100-40gb", 8, 32, 32, 26, 16_000),
    Target("8b_8x80gb.toml", "a100-80gb", 8, 60, 60, 38, 32_000),
)


@dataclass(frozen=True)
class TrainingTime:
    """A line of the guide's "Expected Training Time".

    Attributes:
        tokens: to train on.
        ranks: A100 cards.
        hours, dollars: from and to; the guide has a price for each number of tokens, not of cards.
    """

    tokens: float
    ranks: int
    hours: tuple[float, float]
    dollars: tuple[float, float]


TRAINING_TIMES = (
    TrainingTime(10e9, 1, (48, 72), (50, 150)),
    TrainingTime(10e9, 8, (6, 10), (50, 150)),
    TrainingTime(100e9, 8, (60, 100), (500, 1500)),
)
"""None of them can be kept: see `moe-bench roofline`."""

SAVING_SHARE = 0.05
"""Of training time, what checkpoints may cost at the preset's default `save_every`."""
