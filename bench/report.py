"""One page from the newest results: `moe-bench report` writes bench/results/REPORT.md and pictures beside it.

The same results give the same page, byte for byte: nothing is measured here, and no date but theirs is in it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_engine.bench import report_counted as counted
from moe_engine.bench import report_tables as tables
from moe_engine.bench.report_tables import Page, Rows
from moe_engine.bench.runner import check_writable, newest, read_rows
from moe_engine.train.cli import run_command
from moe_engine.train.errors import InputError
from moe_engine.train.options import option

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = "REPORT.md"
PICTURE = re.compile(r"(layer|throughput|kernels|roofline|scaling|memory)(_\d+)?\.png")
"""What a report's pictures are called."""


@dataclass(frozen=True)
class ReportConfig:
    """Options of the report."""

    results: str = option(str(RESULTS), "folder whose *.jsonl are read")
    out: str | None = option(None, f"folder to write {PAGE} and its pictures to; without it, that of the results")


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        benchmarks: whose results it shows; those of the first have to be there.
        command: that makes them, without --output.
        file: in the folder of results, for that option.
        write: adds their tables and pictures; adds nothing where there is nothing to show.
    """

    title: str
    benchmarks: tuple[str, ...]
    command: str
    file: str
    write: Callable[[Page, Rows], None]


STEPS, MODES = "moe-bench throughput --allow_unchecked", "python -m moe_engine.bench.modes --data_dir data/stdlib"
SECTIONS = (
    Section("A layer against peers", ("layer",), "moe-bench layer", "layer", tables.layer),
    Section("Training steps against peers", ("throughput",), STEPS, "throughput", tables.throughput),
    Section("Scaling over ranks", ("throughput",), f"{STEPS} --ranks 1 2", "throughput", tables.scaling),
    Section("The guide's targets", ("targets",), STEPS, "throughput", tables.targets),
    Section("Checkpoints", ("checkpoint",), "moe-bench checkpoint --preset small", "checkpoint", tables.checkpoint),
    Section("Kernels", ("kernels",), "moe-bench kernels", "kernels", tables.kernels),
    Section("Roofline, projected", ("roofline", "kernels"), "moe-bench roofline", "roofline", counted.roofline),
    Section("Memory of a training step", ("memory",), "moe-bench memory", "memory", counted.memory),
    Section("Memory traffic of the kernels", ("traffic",), "moe-bench traffic", "traffic", counted.traffic),
    Section("Machine code of the kernels", ("compile",), "moe-bench compile", "compile", counted.code),
    Section("The loss with ways to save memory", ("modes",), MODES, "modes", counted.training_modes),
)
COMMITS = 10  # digits of a commit that are shown


def _one_of(rows: Rows, get: Callable[[Mapping[str, Any]], Any]) -> str:
    return ", ".join(sorted({str(get(row) or "not recorded") for row in rows}))


def _commit(row: Mapping[str, Any]) -> str | None:
    commit = row.get("commit")
    return commit and commit[:COMMITS] + "+" * commit.endswith("+")


def where(page: Page, rows: Rows) -> None:
    """What was measured on which device, with what, and when."""
    lines = []
    for (benchmark, device), found in _by_benchmark_and_device(rows).items():
        days = sorted({row["time"][:10] for row in found})
        packages = dict.fromkeys(name for row in found for name in row.get("versions") or {})
        versions = [f"{name} {_one_of(found, lambda r, n=name: (r.get('versions') or {}).get(n))}" for name in packages]
        period = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        lines.append([benchmark, device, str(len(found)), period, _one_of(found, _commit), ", ".join(versions)])
    page.table(("benchmark", "device", "results", "date", "commit", "versions"), lines, left=6)


def _by_benchmark_and_device(rows: Rows) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["benchmark"], row["device"]), []).append(row)
    return found


def make_page(rows: Rows) -> Page:
    """The whole page from rows of which none is out of date."""
    page = Page()
    page.add("# Results of the benchmarks")
    page.add(
        "Made by `moe-bench report` from the newest results in this folder's `*.jsonl`; not edited by hand. A result",
        "whose device begins with `none` was counted or projected without one. `band`: how far p50 may be off when",
        "it is measured again. A commit with `+` had changes on top of it.",
    )
    page.add("## Where and when")
    where(page, rows)
    for section in SECTIONS:
        page.add(f"## {section.title}")
        before = len(page.lines)
        if any(row["benchmark"] == section.benchmarks[0] for row in rows):
            section.write(page, [row for row in rows if row["benchmark"] in section.benchmarks])
        if len(page.lines) == before:
            page.add(f"No results yet: `{section.command} --output bench/results/{section.file}.jsonl`")
    page.lines.pop()
    return page


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The newest rows of a folder, file by file.

    Raises:
        InputError: there are none, or a line is no row.
    """
    rows = [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]
    if not rows:
        raise InputError(f"--results {folder}: expected a folder with results of moe-bench in *.jsonl, found none")
    return newest(rows)


def report(config: ReportConfig) -> int:
    """Read, draw, write; returns the exit status."""
    results = Path(config.results)
    page, out = make_page(read_results(results)), Path(config.out or config.results)
    check_writable(out=str(out / PAGE))
    if (out / PAGE).exists():  # else a picture of such a name is somebody else's
        for old in out.glob("*.png"):
            if PICTURE.fullmatch(old.name) and old.name not in page.pictures:
                old.unlink()
    for name, draw in page.pictures.items():
        draw(out / name)
    (out / PAGE).write_text("\n".join(page.lines) + "\n", encoding="utf-8")
    print(f"{out / PAGE}: {len(page.pictures)} picture{'s' * (len(page.pictures) != 1)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("moe-bench report", ReportConfig, report, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
