"""Memory of a training step: peak bytes per device by kind, counted without a device, and what fits on a card.

Without options: the configurations of `configs/` that the guide promises, against its table. With options of
`moe-train` (or --config): that run. GB are 10⁹ bytes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_engine.bench import plots
from moe_engine.bench.runner import append_rows, changed, check_writable, make_row
from moe_engine.bench.targets import CONFIGS, GUIDE
from moe_engine.memory import KINDS
from moe_engine.train import config as settings
from moe_engine.train import memory
from moe_engine.train.cli import guarded, parse
from moe_engine.train.config import TrainConfig
from moe_engine.train.device import DTYPES
from moe_engine.train.errors import InputError
from moe_engine.train.options import option


@dataclass(frozen=True)
class Flags(TrainConfig):
    """`TrainConfig`, and what it is to run on."""

    config: str | None = option(None, "TOML file with options of moe-train")
    ranks: int = option(1, "devices")
    memory_gb: float | None = option(None, "memory of one device in GB: prints the largest batch_size that fits")
    output: str = option("", "JSONL file to add the result to")
    picture: str = option("", "PNG file to draw the result into")


def _run(config: TrainConfig, ranks: int) -> tuple[memory.Run, memory.Estimate]:
    """What is to run, and its estimate."""
    on_gpu = config.device != "cpu"
    dtype = DTYPES[config.dtype or ("bfloat16" if on_gpu else "float32")]
    run = memory.Run(config, config.model_config(1), ranks, dtype, on_gpu)
    return run, memory.estimate(run)


def _line(run: memory.Run, found: memory.Estimate) -> str:
    formula = memory.formula(run)
    size = memory.gigabytes
    parts = ", ".join(f"{kind} {size(found.parts[kind])}" for kind in KINDS)
    return (
        f"  {parts}\n"
        f"  total {size(found.total)}, with {memory.SLACK - 1:.0%} for fragments {size(found.reserved)}; "
        f"peak at {found.at}; formula {size(formula)} ({formula / found.total - 1:+.1%})"
    )


def _result(name: str, run: memory.Run, found: memory.Estimate, **values: Any) -> dict[str, Any]:
    config = run.config
    names = ("preset", "batch_size", "block_size", "grad_accum_steps", "optimizer", "optimizer_in_backward")
    names += ("param_dtype", "checkpointing", "checkpoint_every", "dp_replicate")
    settings = {name: getattr(config, name) for name in names} | changed(config, "reshard_after_forward")
    settings |= {} if run.on_gpu else {"device": "cpu"}  # where other operations are counted
    return make_row(
        "memory",
        name,
        settings | {"dtype": str(run.dtype).removeprefix("torch."), "ranks": run.ranks},
        "none, fake tensors",
        bytes=found.parts,
        total=found.total,
        reserved=found.reserved,
        formula=memory.formula(run),
        **values,
    )


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A bar a result, by kind of memory, with a mark at what it may take where that is said."""
    colors = (plots.BLUE, plots.VIOLET, plots.GREEN, plots.ORANGE, plots.INK, plots.MUTED)
    size = (9.0, 2.2 + 0.45 * len(rows))
    note = "counted under fake tensors, without room for fragments; |: what is allowed"
    figure, axes = plots.figure("Peak memory of a training step, one device", note, size=size)
    parts = {kind: [row["bytes"][kind] / 1e9 for row in rows] for kind in KINDS}
    plots.stacked(axes, parts, dict(zip(KINDS, colors, strict=True)), "GB (10⁹ bytes)")
    axes.set_yticks(range(len(rows)), [row["name"].removesuffix(".toml") for row in rows])
    axes.invert_yaxis()
    for place, row in enumerate(rows):
        if row.get("required"):
            axes.plot([row["required"]], [place], marker="|", markersize=22, markeredgewidth=2, color=plots.RED)
    plots.save(figure, path)


def _keep(rows: list[dict[str, Any]], output: str, picture: str) -> None:
    if output:
        append_rows(Path(output), rows)
    if picture and rows:
        draw(Path(picture), rows)


def guide_table(output: str = "", picture: str = "") -> int:
    """Estimate the guide's rows; 1 if one takes more than it may.

    Raises:
        InputError: one of them cannot be estimated here; the others are printed and stored all the same.
    """
    if not CONFIGS.is_dir():
        raise InputError(f"{CONFIGS}: expected the folder of configurations, which only a source tree has")
    rows, broken, left_out = [], 0, []
    for target in GUIDE:
        config = settings.resolve({}, {"data_dir": "", **settings.read_toml(CONFIGS / target.file)})
        try:
            run, found = _run(config, target.ranks)
        except InputError as error:
            print(f"{target.file}: not estimated: {error}")
            left_out.append(target.file)
            continue
        reserved = found.reserved / 1e9
        verdict = (
            "within the aim" if reserved <= target.aim_gb else "PASS" if reserved <= target.required_gb else "FAIL"
        )
        broken += verdict == "FAIL"
        print(
            f"{target.ranks} × {target.card.name}, {run.config.batch_size} × {run.config.block_size} ({target.file}): "
            f"{reserved:.1f} GB; guide ~{target.guide_gb:g}, required ≤ {target.required_gb:g}, "
            f"aim ≤ {target.aim_gb:g}: {verdict}\n"
            f"{_line(run, found)}",
            flush=True,
        )
        rows.append(
            _result(target.file, run, found, card=target.card.name, required=target.required_gb, verdict=verdict)
        )
    _keep(rows, output, picture)
    if left_out:
        raise InputError(f"not all of the guide's rows could be estimated: {', '.join(left_out)}")
    return 1 if broken else 0


def one_run(config: TrainConfig, ranks: int, memory_gb: float | None, output: str = "", picture: str = "") -> int:
    """Estimate one configuration; 1 if not even batch_size 1 fits the memory that was given."""
    run, found = _run(config, ranks)
    print(
        f"{config.preset}, {config.batch_size} × {config.block_size} tokens, "
        f"{str(run.dtype).removeprefix('torch.')}, {ranks} device{'s' * (ranks > 1)}: "
        f"{memory.gigabytes(found.reserved)} per device\n{_line(run, found)}",
        flush=True,
    )
    largest = None
    if memory_gb is not None:
        libraries = memory.CONTEXT if run.on_gpu else 0
        largest = memory.largest_batch(run, memory_gb * 1e9 - libraries)
        left = f" ({memory.gigabytes(libraries)} of it left to driver and libraries)" if libraries else ""
        answer = f"largest batch_size in {memory_gb:g} GB: {largest}" if largest else f"no batch fits {memory_gb:g} GB"
        print(answer + left)
    _keep([_result(config.preset, run, found, memory_gb=memory_gb, largest_batch=largest)], output, picture)
    return 1 if largest == 0 else 0


def _body(argv: Sequence[str] | None) -> int:
    given = parse("moe-bench memory", Flags, argv, __doc__ or "")
    files = {name: given.pop(name, "") for name in ("output", "picture")}
    check_writable(**files)
    if not given:
        return guide_table(**files)
    file, ranks, memory_gb = given.pop("config", None), given.pop("ranks", 1), given.pop("memory_gb", None)
    for name, value in (("ranks", ranks), ("memory_gb", memory_gb)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name}: expected more than 0, got {value}")
    config = settings.resolve(given, {"data_dir": "", **(settings.read_toml(file) if file else {})})
    return one_run(config, ranks, memory_gb, **files)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return guarded(lambda: _body(argv))


if __name__ == "__main__":
    sys.exit(main())
