"""The command `moe-doctor`: its options, its report, its exit status."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

from moe_engine.presets import PRESETS
from moe_engine.train.cli import run_command
from moe_engine.train.config import TrainConfig, read_toml, resolve
from moe_engine.train.doctor.check import Result, Setup
from moe_engine.train.doctor.data import data_checks
from moe_engine.train.doctor.machine import machine_checks
from moe_engine.train.doctor.model import model_checks
from moe_engine.train.options import option

_STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}


@dataclass(frozen=True)
class DoctorConfig:
    """The options of `moe-doctor`; those of a run that are not given are the preset's."""

    data_dir: str = option(help="folder with tokenized data")
    preset: str | None = option(None, "model size that is to be trained [default: 8b]", choices=tuple(PRESETS))
    batch_size: int | None = option(None, "sequences per device and micro-step [default: the preset's]")
    block_size: int | None = option(None, "context length in tokens [default: the preset's]")
    grad_accum_steps: int | None = option(None, "micro-steps per optimizer step [default: the preset's]")
    config: str | None = option(None, "TOML file of moe-train; the options given here come before it")
    out_dir: str | None = option(None, "run folder, for the check of the disk [default: the preset's]")
    memory: bool = option(False, "estimate the peak memory of a training step, not only of what lasts; takes seconds")
    deep: bool = option(False, "read everything: every shard against its checksum, every token id")
    json: bool = option(False, "print one JSON object and nothing else")

    def train_config(self) -> TrainConfig:
        """What `moe-train` would run with, given these options. Raises InputError for a value out of range."""
        names = {field.name for field in fields(TrainConfig)}
        given = {k: v for k, v in asdict(self).items() if k in names and v is not None}
        return resolve(given, read_toml(self.config) if self.config else {})


class Screen:
    """Results on standard output: colours and a sign of life on a terminal, plain lines anywhere else."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, quiet=quiet)

    def busy(self, name: str) -> Any:
        """A context in which a check is shown to be under way."""
        if not self._console.is_terminal:
            return nullcontext()
        return self._console.status(f"checking {name}", spinner="line")  # drawn in ASCII

    def show(self, result: Result) -> None:
        """One result: a line, and a second one with the remedy."""
        self._print((result.status, _STYLES[result.status]), f"  {result.name:<16}  {result.found}")
        if result.remedy:
            self._print((" " * 24 + "remedy: ", "bold"), result.remedy)

    def close(self, counts: Counter[str], seconds: float) -> None:
        """The summary."""
        self._print(
            (f"{counts.total()} checks", "bold"),
            f" in {seconds:.1f} s: {counts['PASS']} passed, {counts['WARN']} with a warning, {counts['FAIL']} failed",
        )

    def _print(self, head: tuple[str, str], rest: str) -> None:
        from rich.text import Text

        # Names of files and the text of the data must not stop the report on a terminal that is not UTF-8.
        encoding = self._console.encoding
        plain = rest.encode(encoding, "backslashreplace").decode(encoding)
        self._console.print(Text.assemble(head, plain), soft_wrap=True)


def doctor(config: DoctorConfig) -> int:
    """Run all checks and report; returns the exit status."""
    begin = time.perf_counter()
    train_config = config.train_config()
    setup, screen = Setup(train_config, config.deep, config.memory), Screen(quiet=config.json)
    results = []
    for check in [*machine_checks(), *data_checks(config.deep), *model_checks()]:
        with screen.busy(check.name):
            result = check.run(setup)
        screen.show(result)
        results.append(result)
    counts = Counter(result.status for result in results)
    seconds = time.perf_counter() - begin
    screen.close(counts, seconds)
    if config.json:
        report = {
            "checks": [asdict(result) for result in results],
            "passed": counts["PASS"],
            "warned": counts["WARN"],
            "failed": counts["FAIL"],
            "data_dir": config.data_dir,
            "preset": train_config.preset,
            "deep": config.deep,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(report))
    return 1 if counts["FAIL"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("moe-doctor", DoctorConfig, doctor, argv, "Check that everything is in place to train.")
