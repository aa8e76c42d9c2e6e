"""Appends records to a file that may be full, unreachable or gone for a while, without ever failing its caller."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from pathlib import Path

KEPT_BYTES = 64 << 20  # of records that wait for a file; beyond, the oldest are dropped
_BLOCK = 1 << 16


class Records:
    """Whole records (lines, events) at the end of one file.

    A record that cannot be written waits in memory, and what was written of it is cut off again; `flush` tries anew.
    Records stay in order.

    Args:
        path: the file; it is continued if it is there, and its folder is made if not.
        lines: whether records are lines, so that what a killed process left of its last one can be seen and cut off.
        kept_bytes: how much may wait.
    Raises:
        OSError: it cannot be opened now, at the start.
    """

    def __init__(self, path: Path, *, lines: bool = True, kept_bytes: int = KEPT_BYTES) -> None:
        self.path = path
        self.waiting: deque[bytes] = deque()
        self.dropped = 0
        self.error: OSError | None = None  # what the newest attempt failed with
        self._lines, self._kept_bytes, self._waiting_bytes = lines, kept_bytes, 0
        self._whole: int | None = None  # the length without half a record; None where it is not known
        self._descriptor: int | None = None
        self._open()

    def add(self, record: bytes) -> None:
        """Take a record; `flush` writes it."""
        self.waiting.append(record)
        self._waiting_bytes += len(record)
        while self._waiting_bytes > self._kept_bytes and len(self.waiting) > 1:
            self._waiting_bytes -= len(self.waiting.popleft())
            self.dropped += 1

    def flush(self) -> bool:
        """Write what waits; whether all of it is written."""
        try:
            if self._descriptor is None:
                self._open()
            while self.waiting:
                self._append(self.waiting[0])
                self._waiting_bytes -= len(self.waiting.popleft())
        except OSError as error:
            self.error = error
            return False
        self.error = None
        return True

    def vanished(self) -> bool:
        """Whether the path does not lead to this file any more: deleted, moved away or replaced."""
        try:
            there = os.stat(self.path)
            return self._descriptor is not None and not os.path.samestat(os.fstat(self._descriptor), there)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # it cannot be told: writing will say what is wrong
            return False

    def close(self) -> None:
        """Close the file; `flush` opens it again by its path."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # records were handed over one by one, and what failed then waits
                os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if self._lines:
                self._whole = _after_last_line(self._descriptor)
            self._cut()
        except OSError:
            self.close()
            raise

    def _append(self, record: bytes) -> None:
        self._whole = os.fstat(self._descriptor).st_size
        written = 0
        try:
            while written < len(record):  # a disk that fills takes a part, and refuses the rest
                written += os.write(self._descriptor, record[written:])
        except OSError:
            try:
                self._cut()
            except OSError:  # cut when it is opened again; a stale handle needs that as well
                self.close()
            raise

    def _cut(self) -> None:
        if self._whole is not None and os.fstat(self._descriptor).st_size > self._whole:
            os.ftruncate(self._descriptor, self._whole)


def _after_last_line(descriptor: int) -> int:
    """Where the last whole line ends."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        begin = max(0, end - _BLOCK)
        found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0
