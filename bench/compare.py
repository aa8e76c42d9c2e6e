"""What became slower or larger from one file of results to another: `moe-bench compare A.jsonl B.jsonl`.

Results of the same thing on the same device are compared, the newest of each in either file. A time counts as changed
when it is beyond the noise of both measurements and beyond --threshold; a figure that has no noise, such as bytes, when
it grows by more than --threshold. A result that was there and is lost, wrong or failed in B is a regression as well.
The exit status is 1 when there is a regression.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_engine.bench.runner import append_rows, check_writable, identity, read_rows
from moe_engine.train.cli import run_command
from moe_engine.train.errors import InputError
from moe_engine.train.options import option

LESS_IS_BETTER = {
    "layer": ("peak_bytes", "saved_bytes"),
    "throughput": ("memory",),
    "memory": ("total", "reserved"),
    "checkpoint": ("bytes",),
    "compile": ("registers", "stack", "spill_loads", "spill_stores", "shared"),
    "traffic": ("bytes.forward", "bytes.backward"),
    "modes": ("val_loss",),
}
"""Benchmark → its figures without noise, beside p50; a dot leads into an object."""
REGRESSIONS = ("slower", "larger", "lost", "broken")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class CompareConfig:
    """Options of the comparison."""

    a: str = option(help="JSONL file of results, before", positional=True)
    b: str = option(help="JSONL file of results, after", positional=True)
    threshold: float = option(0.05, "change that is allowed, relative")
    any_device: bool = option(False, "compare results of different devices too")
    output: str | None = option(None, "JSONL file to append the ratios to")


@dataclass(frozen=True)
class Change:
    """A figure of a result in both files.

    Attributes:
        label: what was measured.
        figure: p50, or one of `LESS_IS_BETTER`; `status` where a result became a wrong one.
        a, b: its values; None where there is none.
        ratio: of b to a; None where one is missing or a is 0 and b is not.
        band: how far a ratio of 1 may be off by noise; None for a figure without noise.
        verdict: same, slower, faster, larger, smaller, lost, broken.
        row: the result in B.
    """

    label: str
    figure: str
    a: float | None
    b: float | None
    ratio: float | None
    band: float | None
    verdict: str
    row: Row


def _value(row: Row, figure: str) -> float | None:
    value: Any = row
    for key in figure.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def broken(row: Row) -> str:
    """Why a result is no good; empty if it is."""
    status = row.get("status") or ""
    if status.startswith(("wrong", "failed")):
        return status
    if row.get("verdict") == "FAIL":
        return "FAIL"
    if row.get("kept") is False:
        return "not within its bound"
    return "; ".join(row.get("violations") or ())


def _ratio(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    return b / a if a else 1.0 if b == 0 else None


def _time_verdict(ratio: float, limit: float) -> str:
    return "slower" if ratio > 1 + limit else "faster" if ratio < 1 / (1 + limit) else "same"


def _size_verdict(a: float, b: float, limit: float) -> str:
    if not math.isfinite(a) or not math.isfinite(b):  # a loss that is NaN is larger than any other
        return "same" if math.isfinite(a) == math.isfinite(b) else "larger" if math.isfinite(a) else "smaller"
    return "larger" if b > a * (1 + limit) else "smaller" if b < a / (1 + limit) else "same"


def changes(label: str, a: Row, b: Row, threshold: float) -> list[Change]:
    """Every figure that a result has in A or in B."""
    found = []
    for figure in ("p50", *LESS_IS_BETTER.get(a["benchmark"], ())):
        before, after, band = _value(a, figure), _value(b, figure), None
        if before is None:  # nothing that it could be compared with
            continue
        ratio = _ratio(before, after)
        if figure == "p50":
            band = math.hypot(a["band"], b.get("band", 0.0))
        if after is None:
            verdict = "lost"
        elif band is not None and ratio is not None:
            verdict = _time_verdict(ratio, max(band, threshold))
        else:
            verdict = _size_verdict(before, after, threshold)
        found.append(Change(label, figure, before, after, ratio, band, verdict, b))
    if broken(b) and not broken(a):
        found.append(Change(label, "status", None, None, None, None, "broken", b))
    return found


def flat(settings: Row) -> dict[str, Any]:
    """Settings with those of an object in it beside the others."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= value if isinstance(value, Mapping) else {key: value}
    return flat


def labels(rows: Sequence[Row]) -> list[str]:
    """A short name of each: its benchmark and name, with those settings in which its namesakes differ."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["benchmark"], row["name"]), []).append(flat(row["settings"]))
    result = []
    for row in rows:
        namesakes, own = groups[row["benchmark"], row["name"]], flat(row["settings"])
        differing = [key for key in own if any(other.get(key) != own[key] for other in namesakes)]
        text = ", ".join(f"{key} {own[key]}" for key in differing)
        result.append(f"{row['benchmark']}: {row['name']}" + (f" ({text})" if text else ""))
    return result


def differences(a: Sequence[Row], b: Sequence[Row]) -> list[str]:
    """In what the two files' results differ beside their figures: device, commit, versions; a line each."""

    def all_of(rows: Iterable[Row], get: Callable[[Row], Any]) -> str:
        return ", ".join(dict.fromkeys(str(get(r) or "not recorded") for r in rows))

    fields: dict[str, Callable[[Row], Any]] = {name: lambda r, n=name: r.get(n) for name in ("device", "commit")}
    packages = dict.fromkeys(key for r in (*a, *b) for key in r.get("versions") or {})
    fields |= {name: lambda r, n=name: (r.get("versions") or {}).get(n) for name in packages}
    pairs = {name: (all_of(a, get), all_of(b, get)) for name, get in fields.items()}
    return [f"{name}: {before} → {after}" for name, (before, after) in pairs.items() if before != after]


def _print_times(found: Sequence[Change]) -> None:
    if found:
        width = max(len(c.label) for c in found)
        print(f"\n{'time':{width}}{'ms A':>11}{'ms B':>11}{'B/A':>8}{'noise':>8}  verdict")
    for c in found:
        after = "none" if c.b is None else f"{1e3 * c.b:.4g}"
        ratio, noise = "" if c.ratio is None else f"{c.ratio:.3f}", f"± {c.band or 0:.0%}"
        print(f"{c.label:{width}}{1e3 * (c.a or 0):11.4g}{after:>11}{ratio:>8}{noise:>8}  {c.verdict}")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _print_figures(found: Sequence[Change]) -> None:
    changed = [c for c in found if c.verdict != "same"]
    if found:
        print(f"\nfigures without noise: {len(found)} compared, {len(found) - len(changed)} the same")
    for c in changed:
        ratio = "" if c.ratio is None else f" ({c.ratio:.3f})"
        print(f"  {c.label}: {c.figure} {_number(c.a)} → {_number(c.b)}{ratio}: {c.verdict}")


def _matched(config: CompareConfig) -> tuple[list[tuple[Row, Row]], list[Row], list[Row]]:
    """Pairs of results, and those of A and of B that have no partner."""

    def key(row: Row) -> tuple[str, ...]:
        return identity(row) if config.any_device else (*identity(row), row["device"])

    a, b = ({key(r): r for r in read_rows(Path(path))} for path in (config.a, config.b))  # the last of a thing counts
    pairs = [(row, b[name]) for name, row in a.items() if name in b]
    if not pairs:
        hint = "" if config.any_device else "; other devices count with --any_device"
        raise InputError(f"{config.b}: expected results of what {config.a} has results of, found none{hint}")
    return pairs, [r for name, r in a.items() if name not in b], [r for name, r in b.items() if name not in a]


def _output_row(change: Change) -> dict[str, Any]:
    about = {name: change.row[name] for name in ("benchmark", "name", "settings", "device", "time")}
    names = ("figure", "a", "b", "ratio", "band", "verdict")
    return about | {name: getattr(change, name) for name in names}


def compare(config: CompareConfig) -> int:
    """Match, print the tables, name the regressions; returns the exit status."""
    if not 0 <= config.threshold < math.inf:  # a NaN would call everything the same
        raise InputError(f"--threshold: expected 0 or more, got {config.threshold}")
    check_writable(output=config.output)
    pairs, only_a, only_b = _matched(config)
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    print(f"A: {config.a}\nB: {config.b}\n{len(pairs)} results in both; threshold {config.threshold:.1%}")
    for line in differences(before, after):
        print(line)
    found = [
        change
        for (a, b), label in zip(pairs, labels(before), strict=True)
        for change in changes(label, a, b, config.threshold)
    ]
    _print_times([c for c in found if c.figure == "p50"])
    _print_figures([c for c in found if c.figure not in ("p50", "status")])
    for c in (c for c in found if c.figure == "status"):
        print(f"  {c.label}: {broken(c.row)}")
    for side, rows in (("A", only_a), ("B", only_b)):
        for label in labels(rows):
            print(f"only in {side}: {label}")
    if config.output:
        append_rows(Path(config.output), map(_output_row, found))
    regressions = [c for c in found if c.verdict in REGRESSIONS]
    for c in regressions:
        print(f"regression: {c.label}: {c.figure} {c.verdict}", file=sys.stderr)
    return 1 if regressions else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("moe-bench compare", CompareConfig, compare, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
