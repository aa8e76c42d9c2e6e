"""TensorBoard's event files, written without a thread: a disk that fills is met where it can be dealt with."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from moe_engine.train.records import Records

_PREFIX = "events.out.tfevents."


class EventFile:
    """One file of scalars.

    Args:
        folder: where TensorBoard looks; made if it is not there.
        purge_step: earlier files' events from this step on are hidden.
    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        # TensorBoard reads files in the order of their names: a clock that was set back must not put this one first.
        earlier = [path.name.removeprefix(_PREFIX).partition(".")[0] for path in folder.glob(f"{_PREFIX}*")]
        stamp = max(int(time.time()), *(int(part) + 1 for part in earlier if part.isdecimal()), 0)
        name = f"{_PREFIX}{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self.records = Records(folder / name, lines=False)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            self._add(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """The scalars of one step, by their tags; `records.flush` writes them."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _add(self, event: Event) -> None:
        framed = io.BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        self.records.add(framed.getvalue())
