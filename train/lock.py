"""One run per folder: the first process holds `out_dir/lock` for as long as it lives.

The lock is the kernel's (flock), not the file's existence: it ends with the process however that ends, so a file that a
killed run left behind locks nothing. What the file holds is for people: who has the lock, as JSON.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_engine.train.errors import InputError
from moe_engine.train.parallel import World, from_first

LOCK_FILE = "lock"
PATIENCE = 5.0  # seconds for a run that is just being killed, by torchrun's restart say
_PAUSE = 0.1
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})

_held: set[int] = set()  # descriptors


def _forget() -> None:
    """In a forked child: a lock lives until its last descriptor is closed, and a child may outlive the run."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


class RunLock:
    """The lock of one run folder.

    Args:
        out_dir: the run folder; made by `acquire` if it is not there.
    """

    def __init__(self, out_dir: Path) -> None:
        self.path = Path(out_dir) / LOCK_FILE
        self.warning: str | None = None  # that this file system has no locks
        self._descriptor: int | None = None
        self._made: list[Path] = []  # folders that were not there, innermost first
        self._process = os.getpid()

    def acquire(self, patience: float = PATIENCE) -> None:
        """Take the lock, and write down who has it.

        Args:
            patience: seconds to wait for a process that has it.
        Raises:
            InputError: another process has it; or the folder cannot be made or written.
        """
        folder = self.path.parent
        try:
            if folder.exists() and not folder.is_dir():
                raise InputError(f"--out_dir {folder}: expected a folder, found a file")
            self._made = [path for path in (folder, *folder.parents) if not path.exists()]
            self._take(patience)
        except OSError as error:
            raise InputError(f"--out_dir {folder}: cannot be written: {error.strerror} ({error.filename})") from None

    def renew(self) -> None:
        """Take it in the folder that is there now, should the first have been deleted or moved away.

        Raises:
            InputError: another process has been faster.
            OSError: the folder cannot be written, at this time.
        """
        if not self.is_in_place():
            old = self._descriptor
            self._take(patience=0.0)
            self._close(old)

    def is_in_place(self) -> bool:
        """Whether the file that is locked is the one that the next start would try."""
        try:
            return self._descriptor is not None and _same_file(self._descriptor, self.path)
        except OSError:  # it cannot be told now
            return True

    def release(self) -> None:
        """Give it back, and remove the file and the folders that were made for it, as far as they are empty."""
        if self._descriptor is None or os.getpid() != self._process:
            return
        with contextlib.suppress(OSError):  # what cannot be removed now locks nothing once it is closed
            if self.is_in_place():
                self.path.unlink()  # while it is held: who waits for it will see that it waited for a removed file
            for folder in self._made:
                folder.rmdir()
        self._close(self._descriptor)
        self._descriptor = None

    def _take(self, patience: float) -> None:
        until = time.monotonic() + patience
        while (descriptor := self._try(last=time.monotonic() >= until)) is None:
            time.sleep(_PAUSE)
        self._descriptor = descriptor
        _held.add(descriptor)
        self._write_owner()

    def _try(self, last: bool) -> int | None:
        """One attempt; returns the descriptor, or None to try again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its last owner has just removed the folder that it had made
            if last:
                raise
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            if last:
                raise InputError(f"--out_dir {self.path.parent}: {owner}") from None
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            self.warning = (
                f"{self.path}: this file system has no locks ({error.strerror}): "
                "nothing keeps a second run out of this folder"
            )
        if _same_file(descriptor, self.path):
            return descriptor
        os.close(descriptor)  # the lock of a file that its owner has removed
        return None

    def _write_owner(self) -> None:
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        os.ftruncate(self._descriptor, 0)
        with contextlib.suppress(OSError):  # on a full disk the lock holds, with nobody's name
            os.pwrite(self._descriptor, json.dumps(owner).encode() + b"\n", 0)

    def _close(self, descriptor: int | None) -> None:
        if descriptor is not None:
            _held.discard(descriptor)
            os.close(descriptor)


@contextmanager
def locked(out_dir: Path, world: World) -> Iterator[RunLock | None]:
    """Hold the run folder's lock; every rank makes this call, the first one takes the lock and yields it.

    Raises:
        InputError: on every rank, with what the first one met.
    """
    lock = RunLock(out_dir) if world.is_main else None
    try:
        from_first(lambda: lock.acquire(), world)
        yield lock
    finally:
        if lock:
            lock.release()


def _owner(descriptor: int) -> str:
    """What a lock file says of its owner."""
    advice = "choose another folder, or stop that run first"
    try:
        owner: dict[str, Any] = json.loads(os.pread(descriptor, 1 << 16, 0))
        who = f"process {owner['pid']} on host {owner['host']} since {owner['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return f"in use by {who}; {advice}"


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
