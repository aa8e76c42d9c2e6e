"""The run folder's logs: `logs.txt` for people, `metrics.jsonl` for programs, TensorBoard events for both.

`metrics.jsonl` holds one JSON object a line: `{"kind": "train", "iter": 120, "loss": 4.2131…, …, "time": …}`.
- `kind` is "train", "eval", "sample", "save", …; `iter` is the number of finished iterations.
- Floats are written with `repr`, so they read back to the last bit. JSON has no NaN or infinity: those are the strings
  "NaN", "Infinity" and "-Infinity", which `read_metrics` turns back into floats.
- The keys in WALL_CLOCK depend on the machine's mood. All others are the same for two runs with one seed;
  `deterministic` picks them out.

Keys of a train line and their units: `loss` (nats per token), `lr`, `grad_norm` (before clipping), `router_aux`,
`balance_per_layer` (one number a layer, 1.0 = perfect), `expert_share` (layers x experts, each row sums to 1),
`tokens` (read so far), `skipped` (iterations so far that were not applied), and the wall-clock ones:
`tokens_per_second`; `mfu` and `data_wait`, shares from 0 to 1 of the peak and of the time since the last log line;
`memory` in bytes; `eta` in seconds; `seconds` since the last log line and, of these, `data_wait_seconds`,
`eval_seconds`, `save_seconds`, `sample_seconds`; `time`, in every line, in seconds since 1970. An eval line has `loss`.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from moe_engine.train.errors import InputError

WALL_CLOCK = frozenset(
    {"time", "tokens_per_second", "mfu", "data_wait", "memory", "eta"}
    | {"seconds", "data_wait_seconds", "eval_seconds", "save_seconds", "sample_seconds"}
    | {"write_seconds", "stall_seconds"}
)
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunLog:
    """Writes the logs of one run; on ranks other than the first (`is_main=False`) every call does nothing.

    Args:
        out_dir: the run folder, made if it is not there. Existing logs are continued.
        is_main: whether this process writes.
        console: whether notes and warnings also go to standard output.

    Every line is flushed at once. A write that fails (a full disk) raises OSError.
    """

    def __init__(self, out_dir: Path, *, is_main: bool = True, console: bool = True) -> None:
        self.out_dir = Path(out_dir)
        self.is_main = is_main
        self._console = console
        self._purge_step: int | None = None
        self._board: Any = None  # SummaryWriter, made at the first metrics: its import takes a second
        if is_main:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self._log = open(self.out_dir / "logs.txt", "ab")  # noqa: SIM115
            self._open_metrics()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def metrics_path(self) -> Path:
        return self.out_dir / "metrics.jsonl"

    def note(self, text: str) -> None:
        """A line with the time in front, to logs.txt and the terminal; further lines of `text` are indented."""
        if not self.is_main:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        line = f"{stamp} | " + text.replace("\n", "\n" + " " * len(stamp) + " | ")
        _write_line(self._log, line)
        if self._console:
            _print(line)

    def warn(self, text: str) -> None:
        """A note marked as a warning."""
        self.note(f"warning: {text}")

    def metrics(self, kind: str, iteration: int, **values: Any) -> None:
        """One line of metrics.jsonl, and its numbers as TensorBoard scalars `kind/name`.

        Values are numbers, texts, lists, dicts, or tensors and arrays (written as numbers and lists). In TensorBoard
        a list of numbers is one scalar per element, `kind/name/03`; texts and nested lists are left out.
        """
        if not self.is_main:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        record = {"kind": kind, "iter": int(iteration), **plain, "time": round(time.time(), 3)}
        _write_line(self._metrics, json.dumps(_encode(record), allow_nan=False))
        self._add_scalars(kind, iteration, plain)

    def truncate_after(self, iteration: int) -> None:
        """Forget all metrics later than `iteration`: call it before resuming there, so that no step counts twice.

        metrics.jsonl is replaced by rename; a crash leaves the old or the new file. TensorBoard hides later steps.
        """
        if not self.is_main:
            return
        self._metrics.close()
        kept = [line for line, record in _lines(self.metrics_path) if record["iter"] <= iteration]
        temporary = self.metrics_path.with_suffix(".jsonl.tmp")
        with open(temporary, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.metrics_path)
        self._open_metrics()
        self._close_board()
        self._purge_step = iteration + 1

    def close(self) -> None:
        """Close the files; needed for TensorBoard's last events."""
        if self.is_main:
            self._log.close()
            self._metrics.close()
            self._close_board()

    def _open_metrics(self) -> None:
        self._metrics = open(self.metrics_path, "a+b")  # noqa: SIM115
        # A process that was killed may have left half a line, and the next one must not be appended to it.
        self._metrics.seek(0)
        whole = self._metrics.read().rfind(b"\n") + 1
        self._metrics.truncate(whole)

    def _add_scalars(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.out_dir / "tensorboard"), purge_step=self._purge_step)
        for name, value in values.items():
            # Not add_scalars: that opens one more event file for every curve.
            curves = {f"{name}/{i:02d}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            for curve, number in curves.items():
                if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number):
                    self._board.add_scalar(f"{kind}/{curve}", number, iteration)

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; a missing file is an empty list, half a last line is left out.

    Raises:
        InputError: a line is no JSON object with `kind` and `iter`.
    """
    return [record for _, record in _lines(path)]


def deterministic(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without its wall-clock values: what two runs with one seed agree on to the last bit."""
    return {key: value for key, value in record.items() if key not in WALL_CLOCK}


def _write_line(file: IO[bytes], line: str) -> None:
    file.write(line.encode("utf-8", "backslashreplace") + b"\n")
    file.flush()


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # half a line: its writer was killed
            try:
                record = _decode(json.loads(line))
                complete = isinstance(record["iter"], int) and isinstance(record["kind"], str)
            except (ValueError, KeyError, TypeError):
                complete = False
            if not complete:
                raise InputError(f"{path}, line {number}: expected a JSON object with kind and iter, got {line[:60]!r}")
            yield line, record


def _plain(value: Any) -> Any:
    """Tensors and arrays as numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    return [_encode(_plain(item)) for item in value] if isinstance(value, list | tuple) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _print(line: str) -> None:
    # Sampled text must not stop a run on a terminal that is not UTF-8.
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
