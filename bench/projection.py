"""Options of `moe-bench roofline`, the run that it projects, and the form of its tables and rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_engine.bench.gpus import GPUS, Gpu
from moe_engine.bench.runner import changed, make_row
from moe_engine.bench.scaling import Links, meta_model
from moe_engine.bench.shapes import SHAPES
from moe_engine.bench.work import Work, total_seconds
from moe_engine.config import ModelConfig
from moe_engine.train import config as settings
from moe_engine.train.config import TrainConfig
from moe_engine.train.device import DTYPES
from moe_engine.train.errors import InputError
from moe_engine.train.options import option

DETAILED = "a100-80gb"
"""The card of the long tables where none is asked for."""


@dataclass(frozen=True)
class Options:
    """What the command takes besides the options of `moe-train`."""

    config: str | None = option(None, "TOML file with options of moe-train")
    shape: str | None = option(None, "layer of the table of launches (default: the model's)", choices=tuple(SHAPES))
    tokens: int | None = option(None, "tokens that go through that layer (default: those of a micro-step)")
    card: list[str] = option(
        default_factory=list, help="cards (default: all, the long tables for a100-80gb)", choices=tuple(GPUS)
    )
    efficiency: float = option(0.4, "share of peak FLOP/s that projections assume")
    bandwidth_efficiency: float = option(0.8, "share of memory bandwidth that projections assume")
    gpus: list[int] = option(default_factory=lambda: [1, 8, 64, 512], help="numbers of cards to scale to")
    link_gbs: float | None = option(None, "GB/s between cards of a host, one direction (default: the data sheet's)")
    network_gbs: float = option(50.0, "GB/s of a card to other hosts, one direction; 50 is 400 Gb/s")
    price: float = option(2.0, "dollars for a GPU-hour")
    rows: str | None = option(None, "JSONL file with rows of moe-bench kernels, for points that were measured")
    output: str | None = option(None, "JSONL file to append the rows to")
    picture: str | None = option(None, "PNG file for the roofline")
    scaling_picture: str | None = option(None, "PNG file for tokens per second over cards")

    def __post_init__(self) -> None:
        for name in ("efficiency", "bandwidth_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"--{name}: expected more than 0 and at most 1, got {getattr(self, name):g}")
        for name in ("tokens", "link_gbs", "network_gbs", "price"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name}: expected more than 0, got {value:g}")
        if self.rows and not self.picture:
            raise InputError(f"--rows: expected --picture too, to draw them in, got {self.rows} alone")
        for gpus in self.gpus:
            if gpus < 1:
                raise InputError(f"--gpus: expected at least 1, got {gpus}")

    @property
    def shares(self) -> tuple[float, float]:
        """Of peak FLOP/s and of bandwidth."""
        return self.efficiency, self.bandwidth_efficiency

    @property
    def cards(self) -> list[str]:
        """Keys of the cards of the short tables."""
        return self.card or list(GPUS)

    @property
    def detailed(self) -> list[str]:
        """Keys of the cards of the long tables."""
        return self.card or [DETAILED]

    def links(self, gpu: Gpu) -> Links:
        """A card's links."""
        return Links(gpu.link if self.link_gbs is None else 1e9 * self.link_gbs, 1e9 * self.network_gbs)


@dataclass(frozen=True)
class Flags(Options, TrainConfig):
    """All flags of the command."""


@dataclass(frozen=True)
class Run:
    """The training run that is projected."""

    config: TrainConfig
    model: ModelConfig
    parameters: int

    @property
    def itemsize(self) -> int:
        """Bytes of the computation's dtype."""
        return DTYPES[self.config.dtype or "bfloat16"].itemsize

    @property
    def tokens(self) -> int:
        """Of a step on one card."""
        return self.config.batch_size * self.config.block_size * self.config.grad_accum_steps

    @property
    def name(self) -> str:
        """In titles."""
        c = self.config
        tokens = f"{c.batch_size} × {c.block_size} × {c.grad_accum_steps} tokens a card"
        return f"{c.preset}, {tokens}, checkpointing {c.checkpointing}"


def read_run(given: dict[str, Any], file: str | None) -> Run:
    """The run from options of `moe-train` on top of a TOML file.

    Raises:
        InputError: an option is out of range, or is one that the projection knows nothing of.
    """
    config = settings.resolve(given, {"data_dir": "", **(settings.read_toml(file) if file else {})})
    if config.dtype == "float32":
        raise InputError("--dtype: expected bfloat16 or float16, whose peaks the data sheets have, got float32")
    if config.cpu_offload:
        raise InputError("--cpu_offload: its traffic to the host is not projected, got true")
    model = config.model_config(1)
    return Run(config, model, sum(p.numel() for p in meta_model(model).parameters()))


def run_settings(run: Run) -> dict[str, Any]:
    """What makes two projections of runs comparable, the card and its efficiencies apart."""
    names = ("preset", "batch_size", "block_size", "grad_accum_steps", "checkpointing", "checkpoint_every")
    names += ("optimizer", "param_dtype", "reshard_after_forward")
    chosen = {name: getattr(run.config, name) for name in names} | {"itemsize": run.itemsize}
    return chosen | changed(run.config, "optimizer_in_backward", "grad_clip")


def result(
    card: str, kind: str, name: str, given: Mapping[str, Any], options: Options, **values: Any
) -> dict[str, Any]:
    """One projected result; `given` and the efficiencies are what makes two of them comparable."""
    chosen = {"kind": kind, **given}
    chosen |= {"efficiency": options.efficiency, "bandwidth_efficiency": options.bandwidth_efficiency}
    device = f"none, projected for {GPUS[card].name}"
    return make_row("roofline", name, chosen, device, card=card, projected=True, **values)


def print_table(title: str, headings: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """A table: the first column to the left, the others to the right."""
    table = [list(headings), *map(list, lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(headings))]
    print(f"\n{title}; projected")
    for line in table:
        cells = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())


def both_times(works: Sequence[Work], gpu: Gpu, options: Options) -> tuple[float, float]:
    """Seconds at the card's peaks and at the efficiencies."""
    return total_seconds(works, gpu), total_seconds(works, gpu, *options.shares)


def ms(seconds: float) -> str:
    """Milliseconds for a table."""
    return f"{1e3 * seconds:.3f}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def assumed(options: Options) -> str:
    """The efficiencies, for titles."""
    return f"at {100 * options.efficiency:g} % FLOP/s, {100 * options.bandwidth_efficiency:g} % bandwidth"
