"""Draws a run's metrics.jsonl as PNG pictures in `plots/`. Works from the first few lines on, and is cheap to repeat.

Every picture is written under a temporary name and renamed, so that a viewer never sees half of one.
"""

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_engine.train.metrics import read_metrics
from moe_engine.train.signs import short_number

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#2563eb", "#ea580c", "#0d9488", "#dc2626"
_SIZE, _DPI = (8.0, 4.5), 130
_FEW = 12  # up to so many points are drawn one by one
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.1, 0.965, 0.13, 0.83

Records = list[dict[str, Any]]


def draw_plots(out_dir: Path, *, grad_clip: float | None = None, warmup_iters: int | None = None) -> list[Path]:
    """Rewrite `out_dir/plots/*.png` from `out_dir/metrics.jsonl` and return the pictures drawn.

    A picture whose keys are not (yet) in the metrics is left out.

    Args:
        out_dir: the run folder.
        grad_clip: where to draw the clipping line in the picture of the gradient norm.
        warmup_iters: how many iterations to shade as warm-up in the pictures of loss and learning rate.

    Raises:
        InputError: metrics.jsonl is not what `metrics.py` writes.
    """
    records = read_metrics(Path(out_dir) / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    figures = {
        "loss": _loss(train, evals, warmup_iters),
        "learning_rate": _learning_rate(train, warmup_iters),
        "gradient_norm": _gradient_norm(train, grad_clip),
        "router_balance": _router_balance(train),
        "expert_load": _expert_load(records),
        "throughput": _throughput(train),
    }
    folder = Path(out_dir) / "plots"
    drawn = []
    for name, figure in figures.items():
        if figure is not None:
            drawn.append(save(figure, folder / f"{name}.png"))
    return drawn


def save(figure: Any, path: Path) -> Path:
    """Write a PNG picture, under another name first; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp")
    figure.savefig(temporary, format="png", dpi=_DPI)
    os.replace(temporary, path)
    return path


def _loss(train: Records, evals: Records, warmup_iters: int | None) -> Any:
    x, y = _series(train, "loss")
    xe, ye = _series(evals, "loss")
    if not x and not xe:
        return None
    figure, axes = _figure("Loss", "nats per token")
    _curve(axes, x, y, BLUE, "training")
    if xe:
        size = 5 if len(xe) <= 30 else 2.5
        axes.plot(xe, ye, color=ORANGE, linewidth=1.6, marker="o", markersize=size, label="validation")
        best = min((v for v in ye if math.isfinite(v)), default=math.nan)
        _subtitle(figure, f"validation {ye[-1]:.3f} at iteration {xe[-1]:,}, best {best:.3f}")
    _time_axis(axes, max(x[-1:] + xe[-1:]), warmup_iters)
    low, high = axes.get_ylim()
    spare = max(0.0, 0.5 - (high - low)) / 2  # no zooming into noise while there are few points
    axes.set_ylim(low - spare, high + spare)
    _legend(figure, axes)
    return figure


def _learning_rate(train: Records, warmup_iters: int | None) -> Any:
    x, y = _series(train, "lr")
    if not x:
        return None
    figure, axes = _figure("Learning rate", "learning rate")
    _subtitle(figure, f"{y[-1]:.2e} at iteration {x[-1]:,}, highest so far {max(y):.2e}")
    axes.plot(x, y, color=BLUE, linewidth=2, **_dots(x))
    axes.set_ylim(0, 1.08 * _highest(y, at_least=1e-9))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
    _time_axis(axes, x[-1], warmup_iters)
    _legend(figure, axes)
    return figure


def _gradient_norm(train: Records, grad_clip: float | None) -> Any:
    x, y = _series(train, "grad_norm")
    if not x:
        return None
    figure, axes = _figure("Gradient norm", "global norm before clipping")
    finite = sorted(v for v in y if math.isfinite(v))
    # A few early or spiking values must not flatten the rest: they are marked at the upper edge instead.
    usual = finite[int(0.97 * (len(finite) - 1))] if finite else 1.0
    top = 1.25 * max(usual, grad_clip or 0.0, 2.0)
    over = [(a, b) for a, b in zip(x, y, strict=True) if not b <= top]
    _curve(axes, x, y, BLUE, "norm")
    if grad_clip:
        axes.axhline(grad_clip, color=MUTED, linewidth=1.2, linestyle="--", label=f"clip {grad_clip:g}")
    axes.axhline(2.0, color=ORANGE, linewidth=1.2, linestyle=":", label="warning 2.0")
    note = f"{y[-1]:.2f} at iteration {x[-1]:,}"
    if over:
        broken = len(y) - len(finite)
        note += f"; largest {finite[-1]:.3g}" if finite else ""
        note += f"; {broken} not finite" if broken else ""
        axes.plot([a for a, _ in over], [top * 0.98] * len(over), "^", color=RED, markersize=5, label="off the scale")
    _subtitle(figure, note)
    axes.set_ylim(0, top)
    _time_axis(axes, x[-1])
    _legend(figure, axes)
    return figure


def _router_balance(train: Records) -> Any:
    from matplotlib import colormaps

    rows = [(r["iter"], r["balance_per_layer"]) for r in train if r.get("balance_per_layer")]
    if not rows:
        return None
    x = [iteration for iteration, _ in rows]
    layers = len(rows[-1][1])
    figure, axes = _figure("Router balance", "balance per layer (1.0 = even use)")
    colors = [colormaps["viridis"](0.92 * i / max(layers - 1, 1)) for i in range(layers)]
    for layer in range(layers):
        y = [balance[layer] for _, balance in rows]
        named = layer % math.ceil(layers / 4) == 0 or layer == layers - 1  # the colours of the others lie in between
        label = f"layer {layer}" if named else None
        axes.plot(x, y, color=colors[layer], linewidth=1.4, label=label, **_dots(x))
    axes.axhline(1.0, color=MUTED, linewidth=1.2, linestyle="--")
    worst = max(range(layers), key=lambda layer: rows[-1][1][layer])
    _subtitle(figure, f"worst at iteration {x[-1]:,}: layer {worst} with {rows[-1][1][worst]:.3f}")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.98), max(high, 1.1))
    _time_axis(axes, x[-1])
    _legend(figure, axes)
    return figure


def _expert_load(records: Records) -> Any:
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    record = next((r for r in reversed(records) if r.get("expert_share")), None)
    if record is None:
        return None
    share = record["expert_share"]
    layers, experts = len(share), len(share[0])
    load = [[value * experts for value in row] for row in share]  # 1 = an even share
    figure, axes = _figure("Expert load", "layer", height=min(8.0, 1.9 + 0.3 * max(layers, 3)), right=0.89)
    _subtitle(figure, f"share of the routed tokens at iteration {record['iter']:,}; 1 = an even share of 1/{experts}")
    peak = _highest([value for row in load for value in row], at_least=2.0)
    colors = LinearSegmentedColormap.from_list("load", ["#3b6fb6", "#f7f7f5", "#c2410c"])
    image = axes.imshow(load, aspect="auto", cmap=colors, norm=TwoSlopeNorm(1.0, 0.0, peak), interpolation="nearest")
    if experts <= 16 and layers <= 32:
        for i, row in enumerate(load):
            for j, value in enumerate(row):
                shade = "white" if value > 1 + 0.65 * (peak - 1) or value < 0.25 else INK
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=shade)
    axes.set_xlabel("expert", color=INK)
    axes.set_xticks(range(0, experts, max(1, experts // 16)))
    axes.set_yticks(range(0, layers, max(1, layers // 12)))
    axes.grid(False)
    box = axes.get_position()
    ticks = [0, 0.5, 1, (1 + peak) / 2, peak]
    cax = figure.add_axes([0.905, box.y0, 0.014, box.height])
    bar = figure.colorbar(image, cax=cax, ticks=ticks, format="%.3g")
    for part in (axes, bar.ax):
        part.tick_params(labelsize=9, colors=MUTED, length=0)
        for spine in part.spines.values():
            spine.set_visible(False)
    return figure


def _throughput(train: Records) -> Any:
    x, y = _series(train, "tokens_per_second")
    if not x:
        return None
    figure, axes = _figure("Throughput", "tokens per second")
    usual = statistics.median(y)
    _, mfu = _series(train, "mfu")
    _subtitle(figure, f"median {short_number(usual)} tok/s" + (f", MFU {statistics.median(mfu):.1%}" if mfu else ""))
    _curve(axes, x, y, BLUE, "tokens per second")
    axes.axhline(usual, color=MUTED, linewidth=1.2, linestyle="--")
    axes.set_ylim(0, 1.15 * _highest(y, at_least=1.0))
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    _time_axis(axes, x[-1])
    xw, wait = _series(train, "data_wait")
    if xw:
        axes.set_position([_LEFT, 0.40, _RIGHT - _LEFT, _TOP - 0.40])
        axes.set_xlabel("")
        axes.tick_params(labelbottom=False)
        lower = figure.add_axes([_LEFT, _BOTTOM, _RIGHT - _LEFT, 0.20], sharex=axes)
        _style(lower, "data wait")
        percent = [100 * share for share in wait]
        _curve(lower, xw, percent, GREEN, "share of time waiting for data")
        lower.set_ylim(0, 1.2 * _highest(percent, at_least=4.0))
        lower.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    return figure


def _figure(title: str, ylabel: str, *, height: float = _SIZE[1], right: float = _RIGHT) -> tuple[Any, Any]:
    """A Figure of our own look with one axes. No pyplot: its global state is not ours to change."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0], height), facecolor="white")
    FigureCanvasAgg(figure)
    margin = _SIZE[1] / height  # keeps the margins the same in inches for every height
    bottom, top = _BOTTOM * margin, 1 - (1 - _TOP) * margin
    axes = figure.add_axes([_LEFT, bottom, right - _LEFT, top - bottom])
    figure.text(_LEFT, 1 - 0.075 * margin, title, fontsize=14, fontweight="bold", color=INK, va="center")
    _style(axes, ylabel)
    return figure, axes


def _subtitle(figure: Any, text: str) -> None:
    margin = _SIZE[1] / figure.get_figheight()
    figure.text(_LEFT, 1 - 0.13 * margin, text, fontsize=10, color=MUTED, va="center")


def _style(axes: Any, ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("iteration", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    clean_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def clean_axes(axes: Any) -> None:
    """A pale grid behind the data, and no frame but the two axes."""
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#cbd2d9")


def _time_axis(axes: Any, last: int, warmup_iters: int | None = None) -> None:
    end = 1.03 * max(last, 1)
    axes.set_xlim(0, end)
    if warmup_iters:
        axes.axvspan(0, min(warmup_iters, end), color=GRID, alpha=0.5, linewidth=0, label="warm-up", zorder=0)


def _legend(figure: Any, axes: Any) -> None:
    """In one row beside the title, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    style = {"frameon": False, "fontsize": 9, "labelcolor": INK, "handlelength": 1.4, "columnspacing": 1.3}
    place = (_RIGHT + 0.01, 1 - 0.075 * _SIZE[1] / figure.get_figheight())
    figure.legend(handles, labels, loc="center right", bbox_to_anchor=place, ncols=max(1, len(labels)), **style)


def _curve(axes: Any, x: Sequence[int], y: Sequence[float], color: str, label: str) -> None:
    """Few points as they are; many as a pale line with a smoothed one on top."""
    if len(x) <= _FEW:
        axes.plot(x, y, color=color, linewidth=1.8, label=label, **_dots(x))
    else:
        axes.plot(x, y, color=color, linewidth=1, alpha=0.28)
        axes.plot(x, _smooth(y), color=color, linewidth=2, label=f"{label} (smoothed)")


def _dots(x: Sequence[int]) -> dict[str, Any]:
    """Markers while there are few points: a line through one point is nothing to look at."""
    return {"marker": "o", "markersize": 3.5} if len(x) <= _FEW else {}


def _series(records: Records, key: str) -> tuple[list[int], list[float]]:
    points = [(r["iter"], r[key]) for r in records if r.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _highest(values: Sequence[float], at_least: float) -> float:
    return max([at_least, *(v for v in values if math.isfinite(v))])


def _smooth(y: Sequence[float]) -> list[float]:
    """The mean of the middle half of a window around each point.

    Centred, so it does not lag behind a falling curve; trimmed, so it ignores spikes, NaN and infinity.
    """
    half = max(2, len(y) // 60)
    result = []
    for i in range(len(y)):
        reach = min(half, i)  # shorter at the start, where curves are steep; one-sided at the end, where they are flat
        window = sorted(v for v in y[i - reach : i + reach + 1] if math.isfinite(v))
        middle = window[len(window) // 4 : len(window) - len(window) // 4]
        result.append(statistics.fmean(middle) if middle else math.nan)
    return result
