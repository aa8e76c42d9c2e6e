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

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_engine.train.errors import InputError
from moe_engine.train.records import Records

if TYPE_CHECKING:
    from moe_engine.train.events import EventFile

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
        restore: writes what else the folder needs, should it have to be made anew while the run goes on.
        missing: names of files, beside the logs, that call for that when they are gone.
        reader_gone: called once when nobody reads standard output any more (`| head`); without it, BrokenPipeError.

    Every line is handed to the file system at once. A write that fails (a full disk) ends no run: a warning goes to
    standard error, lines wait in memory, and are written as soon as that works again. Files that were deleted or moved
    away are begun anew.

    Raises:
        OSError: the files cannot be opened at the start.
    """

    def __init__(
        self,
        out_dir: Path,
        *,
        is_main: bool = True,
        console: bool = True,
        restore: Callable[[], None] | None = None,
        missing: Callable[[], list[str]] = list,
        reader_gone: Callable[[], None] | None = None,
    ) -> None:
        self.out_dir = Path(out_dir)
        self.is_main = is_main
        self._console = console
        self._restore, self._missing, self._reader_gone = restore, missing, reader_gone
        self._purge_step: int | None = None
        self._board: EventFile | None = None  # made at the first metrics: its import takes a second
        self._failing = self._vanished = False
        self._warned: set[str] = set()
        if is_main:
            self._log = Records(self.out_dir / "logs.txt")
            self._metrics = Records(self.metrics_path)

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
        self._log.add(_line(line))
        self._write()
        if self._console:
            self._print(line)

    def warn(self, text: str) -> None:
        """A note marked as a warning."""
        self.note(f"warning: {text}")

    @contextmanager
    def beside(self, what: str) -> Iterator[None]:
        """For what is made beside a run (pictures, samples): a failure is a warning, once, and no end of the run."""
        try:
            yield
        except Exception as error:  # whatever it is, training does not need it
            if what not in self._warned:
                self._warned.add(what)
                self.warn(f"{what} not written ({type(error).__name__}: {str(error).partition(chr(10))[0]})")

    def metrics(self, kind: str, iteration: int, **values: Any) -> None:
        """One line of metrics.jsonl, and its numbers as TensorBoard scalars `kind/name`.

        Values are numbers, texts, lists, dicts, or tensors and arrays (written as numbers and lists). In TensorBoard
        a list of numbers is one scalar per element, `kind/name/03`; texts and nested lists are left out.
        """
        if not self.is_main:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        record = {"kind": kind, "iter": int(iteration), **plain, "time": round(time.time(), 3)}
        self._metrics.add(_line(json.dumps(_encode(record), allow_nan=False)))
        self._write()
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
        self._metrics = Records(self.metrics_path)
        self._close_board()
        self._purge_step = iteration + 1

    def close(self) -> None:
        """Write what still waits, if that works now, and close the files; says how many lines are lost."""
        if not self.is_main:
            return
        self._write()
        files = self._files()
        lost = sum(file.dropped + len(file.waiting) for file in (self._log, self._metrics))
        if lost:
            reason = next((file.error.strerror for file in files if file.error), "there were too many")
            _complain(f"{lost} lines of the logs in {self.out_dir} are lost: {reason}")
        for file in files:
            file.close()
        self._board = None

    def _files(self) -> "list[Records]":
        return [self._log, self._metrics, *([self._board.records] if self._board else [])]

    def _write(self) -> None:
        """Bring to the disk what waits."""
        gone = [file.path.name for file in self._files() if file.vanished()] + self._missing()
        self._vanished = self._vanished or bool(gone)
        failures = self._begin_anew() if self._vanished else []
        if not self._vanished:
            failures = [(f.path, f.error) for f in self._files() if not f.flush()]
        if failures and not self._failing:
            path, error = failures[0]
            _complain(
                f"{path}: {error.strerror}; training goes on, lines of the logs are kept in memory until they can be "
                "written"
            )
        elif self._failing and not failures:
            dropped = self._log.dropped + self._metrics.dropped
            lost = f"; {dropped} of them, the oldest, are lost" if dropped else ""
            self._failing = False
            self.note(f"the logs can be written again; lines that had to wait are in their places{lost}")
        self._failing = bool(failures)
        if gone and not self._vanished:
            self.warn(
                f"{', '.join(gone)} had been deleted or moved away: begun anew in {self.out_dir}, with what comes from "
                "here on"
            )

    def _begin_anew(self) -> list[tuple[Path, OSError]]:
        """Make the folder's other files before its logs: a folder with logs alone would be none to resume in."""
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            if self._restore:
                self._restore()
        except OSError as error:
            return [(self.out_dir, error)]
        self._close_board()
        self._log.close()
        self._metrics.close()
        self._vanished = False
        return []

    def _add_scalars(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        scalars = {}
        for name, value in values.items():
            curves = {f"{name}/{i:02d}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            for curve, number in curves.items():
                if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number):
                    scalars[f"{kind}/{curve}"] = number
        if self._vanished:
            return
        with self.beside("TensorBoard's events"):
            if self._board is None:
                from moe_engine.train.events import EventFile

                self._board = EventFile(self.out_dir / "tensorboard", self._purge_step)
            self._board.add(iteration, scalars)
            self._board.records.flush()

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.records.close()
            self._board = None

    def _print(self, line: str) -> None:
        try:
            _print(line)
        except OSError as error:  # a terminal that hung up, a pipe without a reader, a full disk behind `>`
            if isinstance(error, BrokenPipeError) and self._reader_gone is None:
                raise
            self._console = False
            with contextlib.suppress(OSError, ValueError):  # what it still holds would fail again at the exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.warn(f"standard output: {error.strerror}; nothing more is written there")
            if isinstance(error, BrokenPipeError):
                self._reader_gone()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; a missing file is an empty list, half a last line is left out.

    Raises:
        InputError: a line is no JSON object with `kind` and `iter`.
    """
    return [record for _, record in _lines(path)]


def deterministic(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without its wall-clock values: what two runs with one seed agree on to the last bit."""
    return {key: value for key, value in record.items() if key not in WALL_CLOCK}


def _line(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _complain(text: str) -> None:
    """A warning where the log is what fails."""
    with contextlib.suppress(OSError, AttributeError):  # standard error may be gone or closed, too
        print(f"warning: {text}", file=sys.stderr, flush=True)


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
    if sys.stdout is None:  # closed before the start
        return
    # Sampled text must not stop a run on a terminal that is not UTF-8.
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
