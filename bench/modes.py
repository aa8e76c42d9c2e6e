"""Loss curves of what is meant to save memory: the tiny run, once for each way, against the plain one.

    python -m moe_engine.bench.modes --data_dir data/stdlib --out out/modes --picture docs/images/modes.png

Each run is a `moe-train` of its own, in fp32, on the same number of threads, one after another; one that is finished
in `out` is not repeated. Checkpointing and save modes have to log the plain run's very numbers, and 8-bit moments to
end within 2 % of its validation loss: else the exit status is 1.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_engine.bench import plots
from moe_engine.bench.runner import append_rows, check_writable, make_row
from moe_engine.train.cli import run_command
from moe_engine.train.errors import InputError
from moe_engine.train.metrics import deterministic, read_metrics
from moe_engine.train.options import option


@dataclass(frozen=True)
class Mode:
    """A way to train, beside the plain one.

    Attributes:
        flags: options of moe-train.
        bound: how far the last validation loss may be from the plain run's, relative; 0: every logged number has to be
            the same to the last bit; None: no bound.
        color: in the picture.
    """

    flags: tuple[str, ...]
    bound: float | None
    color: str


PLAIN = "adamw"
MODES = {
    PLAIN: Mode((), 0.0, plots.INK),
    "checkpointing_block": Mode(("--checkpointing", "block"), 0.0, plots.BLUE),
    "checkpointing_selective": Mode(("--checkpointing", "selective"), 0.0, plots.GREEN),
    "save_x": Mode(("--model.save", "x"), 0.0, plots.VIOLET),
    "adamw8bit": Mode(("--optimizer", "adamw8bit"), 0.02, plots.ORANGE),
    # Its clipping is another one, by design, and a run of this learning rate clips now and then.
    "in_backward": Mode(("--optimizer_in_backward",), None, plots.RED),
}


@dataclass(frozen=True)
class ModesConfig:
    """Options of the comparison."""

    data_dir: str = option(help="folder with tokenized data (see moe-prepare)")
    out: str = option("out/modes", "folder of the runs")
    max_iters: int = option(300, "iterations of a run")
    threads: int = option(1, "threads of a run: another number rounds differently")
    picture: str | None = option(None, "PNG file to draw")
    output: str | None = option(None, "JSONL file to append the rows to")


Records = list[dict[str, Any]]


def _finished(folder: Path, iterations: int) -> bool:
    records = read_metrics(folder / "metrics.jsonl")
    return any(r["kind"] == "eval" and r["iter"] == iterations for r in records)


def _run(config: ModesConfig, name: str) -> Records:
    """The metrics of a mode's run, which is made, or brought to its end, where there is none.

    Raises:
        InputError: the run failed.
    """
    folder = Path(config.out) / name
    if not _finished(folder, config.max_iters):
        iterations = str(config.max_iters)
        flags = {"--preset": "tiny", "--data_dir": config.data_dir, "--out_dir": str(folder), "--dtype": "float32",
                 "--device": "cpu", "--max_iters": iterations, "--lr_decay_iters": iterations, "--eval_interval": "50",
                 "--sample_every": "0", "--save_every": "0"}  # fmt: skip
        given = [word for pair in flags.items() for word in pair]
        command = [sys.executable, "-m", "moe_engine.train", *given, *MODES[name].flags]
        print(f"{name}: {' '.join(command)}", flush=True)
        status = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(config.threads)}).returncode
        if status:
            raise InputError(f"--out: the run {folder} ended with status {status}")
    return read_metrics(folder / "metrics.jsonl")


def _validation(records: Records) -> tuple[list[int], list[float]]:
    evals = [r for r in records if r["kind"] == "eval"]
    return [r["iter"] for r in evals], [r["loss"] for r in evals]


def _row(config: ModesConfig, name: str, records: Records, plain: Records) -> dict[str, Any]:
    """One result, with what the run's own env.json says of it."""
    environment = json.loads((Path(config.out) / name / "env.json").read_text(encoding="utf-8"))
    loss, reference = _validation(records)[1][-1], _validation(plain)[1][-1]
    same = [deterministic(r) for r in records] == [deterministic(r) for r in plain]
    difference, bound = loss / reference - 1, MODES[name].bound
    values = {
        "val_loss": loss,
        "difference": difference,
        "bitwise_equal": same,
        "bound": bound,
        # A NaN is not within any bound.
        "kept": math.isfinite(loss) and (bound is None or (same if bound == 0 else abs(difference) <= bound)),
    }
    settings = {"flags": list(MODES[name].flags), "iterations": config.max_iters}
    code = environment["git"]
    commit = None if code is None else code["commit"] + ("+" if code["changed"] else "")
    found = make_row("modes", name, settings, environment["device"], **values)
    return found | {"versions": environment["versions"], "commit": commit}


TABLE_HEAD = "| run | validation loss | difference | logged numbers |\n| --- | ---: | ---: | --- |"


def table_line(row: dict[str, Any]) -> str:
    """A result as a line of the table in docs/training.md."""
    plain = row["name"] == PLAIN
    same = "" if plain else "bitwise equal" if row["bitwise_equal"] else "differ"
    flags = "plain" if plain else f"`{' '.join(row['settings']['flags'])}`"
    return f"| {flags} | {row['val_loss']:.4f} | {100 * row['difference']:+.2f} % | {same} |"


def draw(path: Path, runs: dict[str, Records]) -> None:
    """Validation loss of every run, and below it what it is above the plain one's, in percent."""
    note = "the tiny model in fp32, one seed; equal curves lie on each other: larger marks are drawn below smaller ones"
    options = {"rows": 2, "size": (8.0, 6.4), "sharex": True, "height_ratios": (3, 2)}
    figure, (upper, lower) = plots.figure("Ways to save memory: validation loss", note, **options)
    base = _validation(runs[PLAIN])[1]
    for number, (name, records) in enumerate(runs.items()):
        x, y = _validation(records)
        size = 3.5 + 2.5 * max(0, 4 - number)
        style = {"color": MODES[name].color, "linewidth": 1.4, "marker": "o", "markersize": size}
        upper.plot(x, y, label=" ".join(MODES[name].flags) or "plain (AdamW)", **style)
        lower.plot(x, [100 * (a / b - 1) for a, b in zip(y, base, strict=True)], **style)
    lower.axhspan(-2, 2, color=plots.GRID, alpha=0.5, zorder=0, linewidth=0)
    lower.text(x[-1], 1.93, "allowed for 8-bit moments: ± 2 %", fontsize=8, color=plots.MUTED, ha="right", va="top")
    low, high = lower.get_ylim()
    lower.set_ylim(min(low, -2.5), max(high, 2.5))
    plots.style(upper, ylabel="nats per token")
    plots.style(lower, "iteration", "difference to plain in %")
    upper.legend(frameon=False, fontsize=9, labelcolor=plots.INK)
    plots.save(figure, path)


def compare(config: ModesConfig) -> int:
    """Run, print a table (as docs/training.md has it), draw; returns 1 where a bound is not kept."""
    if config.threads < 1:
        raise InputError(f"--threads: expected at least 1, got {config.threads}")
    check_writable(picture=config.picture, output=config.output)
    runs = {name: _run(config, name) for name in MODES}
    rows = [_row(config, name, records, runs[PLAIN]) for name, records in runs.items()]
    print(TABLE_HEAD)
    for row in rows:
        print(table_line(row))
    if config.picture:
        draw(Path(config.picture), runs)
    if config.output:
        append_rows(Path(config.output), rows)
    broken = [row["name"] for row in rows if not row["kept"]]
    if broken:
        print(f"not within its bound: {', '.join(broken)}", file=sys.stderr)
    return int(bool(broken))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("python -m moe_engine.bench.modes", ModesConfig, compare, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
