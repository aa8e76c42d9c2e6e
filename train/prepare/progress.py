"""The progress display of `moe-prepare`: a bar on a terminal, now and then a line anywhere else."""

import sys
import time
from typing import Any

from moe_engine.train.prepare.sources import Tally

_SECONDS_PER_LINE = 10.0


class Progress:
    """A context manager; `update` is called once per batch."""

    def __init__(self, tally: Tally):
        self._tally = tally
        self._start = self._last_line = time.monotonic()
        self._text_bytes = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("preparing"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=self._tally.total_bytes or None, rate="")
            self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, text_bytes: int) -> None:
        """`text_bytes` more of text are done."""
        self._text_bytes += text_bytes
        now = time.monotonic()
        elapsed = now - self._start
        rate = f"{self._text_bytes / 1e6:,.0f} MB of text, {self._text_bytes / 1e6 / max(elapsed, 1e-9):.1f} MB/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._tally.done_bytes, rate=rate)
        elif now - self._last_line >= _SECONDS_PER_LINE:
            self._last_line = now
            print(f"preparing: {rate}{self._remaining(elapsed)}", file=sys.stderr, flush=True)

    def _remaining(self, elapsed: float) -> str:
        done, total = self._tally.done_bytes, self._tally.total_bytes
        if not total or not done:
            return ""
        seconds = int(elapsed * (total - done) / done)
        return f", {100 * done / total:.0f} % read, ETA {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
