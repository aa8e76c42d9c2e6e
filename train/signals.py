"""Signals that ask a run to stop: remembered from the start on, acted upon between iterations."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)
_LEAVING = b"SIGINT again: left at once; the last published checkpoint stays\n"
_END = b"\0"

_installed: StopSignals | None = None


class StopSignals:
    """Remembers the first of SIGINT, SIGTERM, SIGUSR1 and SIGHUP; a context manager, to be entered by the main thread.

    A second SIGINT ends the process at once with status 130, also while the main thread is inside C++ (a collective, a
    compilation), where Python's own handlers have to wait: a thread reads the numbers that the interpreter writes into
    a pipe as signals arrive. A SIGINT after another signal is a first one: launchers send SIGTERM besides.

    SIGHUP stays ignored where it is, which is what nohup is for. Entering again, inside, changes nothing. Children that
    are forked meanwhile have the handlers from before.

    Attributes:
        number: the signal to stop for, None as long as there is none. A run that has to stop for a reason of its own
            may set it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._depth = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        global _installed
        self._depth += 1
        if self._depth == 1:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._watcher = threading.Thread(target=_watch, args=(self._read,), name="stop-signals", daemon=True)
            self._watcher.start()
            self._previous_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            for number in STOP_SIGNALS:
                if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._remember)
            self._outer, _installed = _installed, self
        return self

    def __exit__(self, *_: object) -> None:
        global _installed
        self._depth -= 1
        if self._depth == 0:
            self._restore(self._previous_wakeup)
            os.write(self._write, _END)
            self._watcher.join()
            self._close()
            _installed = self._outer

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number

    def _restore(self, wakeup: int) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        signal.set_wakeup_fd(wakeup)

    def _close(self) -> None:
        os.close(self._read)
        os.close(self._write)


def _watch(pipe: int, leave: Callable[[int], object] = os._exit) -> None:
    """Count SIGINTs; at the second, leave without asking anyone."""
    interrupts = 0
    while (data := os.read(pipe, 64)) and _END not in data:
        interrupts += data.count(signal.SIGINT)
        if interrupts > 1:
            try:
                os.write(2, _LEAVING)
            finally:
                leave(128 + signal.SIGINT)


def _forget() -> None:
    """In a forked child: its signals are its own, and must not be written into the parent's pipe."""
    global _installed
    if _installed is not None:
        _installed._restore(-1)
        _installed._close()
        _installed = None


os.register_at_fork(after_in_child=_forget)
