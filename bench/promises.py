"""The guide's promises beside physics, and what a run takes in days and dollars: tables of `moe-bench roofline`.

All of it follows from the FLOPs of a token (`ModelConfig.flops_per_token`) and the peak of a data sheet.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_engine.bench.gpus import GPUS, Gpu
from moe_engine.bench.scaling import Links, project
from moe_engine.bench.targets import CONFIGS, GUIDE, TRAINING_TIMES
from moe_engine.presets import preset
from moe_engine.train import config as settings

MODEL, BLOCK = "8b", 4096
"""What the guide speaks of: its model, at the context that it trains with."""
CARD = GPUS["a100-80gb"]
HOUR = 3600


def peak_rate(gpu: Gpu, ranks: int = 1, block_size: int = BLOCK) -> float:
    """Tokens per second of the guide's model on so many cards at 100 % of their peak: nothing can be faster."""
    return ranks * gpu.peak / preset(MODEL).flops_per_token(block_size)


def share_of_peak(tokens: float, ranks: int, hours: float) -> float:
    """What part of the peak of so many A100 a training time needs; above 1 it is impossible."""
    return tokens / (hours * HOUR) / peak_rate(CARD, ranks)


def percent(low: float, high: float) -> str:
    """Two shares as `224–336 %`."""
    return f"{100 * low:.0f}–{100 * high:.0f} %"


def thousands(rate: float) -> str:
    """Tokens per second as `17.2 K`."""
    return f"{rate / 1e3:.1f} K"


def verdict(least: float) -> str:
    """What is to be said of a promise that needs at least this share of peak."""
    return "impossible" if least > 1 else "modest" if least < 0.25 else "possible"


def times_table(price: float) -> list[tuple[str, ...]]:
    """The guide's training times and costs: promise, at 100 % of peak, share of peak that it needs, verdict.

    Args:
        price: dollars for a GPU-hour.
    """
    lines = []
    for time in TRAINING_TIMES:
        hours = time.tokens / peak_rate(CARD, time.ranks) / HOUR
        needs = [share_of_peak(time.tokens, time.ranks, h) for h in reversed(time.hours)]
        promise = f"{time.tokens / 1e9:.0f} B tokens, {time.ranks} × A100"
        lines.append(
            (f"{promise}: {time.hours[0]:g}–{time.hours[1]:g} h", f"{hours:.0f} h", percent(*needs), verdict(needs[0]))
        )
        if time.ranks > 1:
            cost = time.ranks * hours * price
            needs = [cost / dollars for dollars in reversed(time.dollars)]
            promise = f"{time.tokens / 1e9:.0f} B tokens: ${time.dollars[0]:g}–{time.dollars[1]:g}"
            lines.append((promise, f"${cost:,.0f}", percent(*needs), verdict(needs[0])))
    return lines


def rates_table() -> list[tuple[str, ...]]:
    """The guide's tokens per second, by number of cards, in the same columns."""
    lines = []
    for ranks in sorted({target.ranks for target in GUIDE}):
        rates = [target.tokens_per_second for target in GUIDE if target.ranks == ranks]
        most = peak_rate(CARD, ranks)
        promise = f"{ranks} × A100: {' and '.join(f'{r / 1e3:.0f} K' for r in rates)} tok/s"
        shares = " and ".join(f"{100 * r / most:.0f} %" for r in rates)
        lines.append((promise, f"{thousands(most)} tok/s", shares, verdict(min(rates) / most)))
    return lines


def guide_table(links: Callable[[Gpu], Links], compute: float, bandwidth: float) -> list[tuple[str, ...]]:
    """The guide's four rows, as the configurations in `configs/` run them, in tokens per second.

    Args:
        links: those of a card.
        compute, bandwidth: shares of the card's peaks for the projection.
    Returns:
        Configuration, cards, roofline, projection, guide, projection over guide, moonshot, moonshot over roofline.
    """
    lines = []
    for target in GUIDE:
        config = settings.resolve({}, {"data_dir": "", **settings.read_toml(CONFIGS / target.file)})
        model, gpu, replicas = config.model_config(1), target.card, config.dp_replicate
        rates = []
        for shares in ((1.0, 1.0), (compute, bandwidth)):
            projection = project(config, model, gpu, target.ranks, replicas, links(gpu), *shares)
            rates.append(projection.tokens / projection.hidden)
        guide, moonshot = target.tokens_per_second, target.moonshot
        over = (f"{rates[1] / guide:.1f}", thousands(moonshot), f"{100 * moonshot / rates[0]:.0f} %")
        lines.append((target.file, f"{target.ranks} × {gpu.name}", *map(thousands, [*rates, guide]), *over))
    return lines
