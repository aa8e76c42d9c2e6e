"""From batches of text to batches of tokens, over processes, in order.

Workers import neither torch nor anything else that is slow to start.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_engine.train.errors import InputError
from moe_engine.train.prepare.inputs import BATCH_BYTES, Batch
from moe_engine.train.tokenizer import load_tokenizer

_BATCHES_PER_WORKER = 3  # in flight: one at work, one waiting, one being collected


@dataclass(frozen=True)
class EncodeOptions:
    """What a worker must know. `text_key` and `text_column` name the text in JSON lines and in rows."""

    tokenizer: str
    dtype: str
    seed: int
    text_key: str
    text_column: str


@dataclass(frozen=True)
class Encoded:
    """The documents of one batch.

    Attributes:
        tokens: `(sum of lengths)`, uint16 or uint32; every document ends with the end-of-text token.
        lengths: `(documents)` int64, in tokens.
        hashes: `(documents)` uint64, of seed and text: equal texts have equal hashes, wherever they stand.
        empty: documents left out because they hold no text.
        text_bytes, characters: of the text that was encoded.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    empty: int
    text_bytes: int
    characters: int


class Encoder:
    """Turns batches into tokens. `load_tokenizer` makes building one cheap after the first."""

    def __init__(self, options: EncodeOptions):
        self._options = options
        self._tokenizer = load_tokenizer(options.tokenizer)
        self._end = np.array([self._tokenizer.eot], dtype=options.dtype)

    def __call__(self, batch: Batch) -> Encoded:
        arrays, lengths, hashes = [], [], []
        empty = text_bytes = characters = 0
        for text in documents(batch, self._options.text_key, self._options.text_column):
            if not text or text.isspace():
                empty += 1
                continue
            data = text.encode("utf-8", "surrogatepass")
            tokens = self._tokenizer.encode_array(text)
            arrays += [tokens.astype(self._options.dtype), self._end]
            lengths.append(len(tokens) + 1)
            hashes.append(document_hash(data, self._options.seed))
            text_bytes += len(data)
            characters += len(text)
        return Encoded(
            tokens=np.concatenate(arrays) if arrays else np.empty(0, self._options.dtype),
            lengths=np.array(lengths, dtype=np.int64),
            hashes=np.array(hashes, dtype=np.uint64),
            empty=empty,
            text_bytes=text_bytes,
            characters=characters,
        )


def document_hash(text: bytes, seed: int) -> int:
    """64 bits that decide a document's place in the split."""
    digest = hashlib.blake2b(f"{seed}\n".encode(), digest_size=8)
    digest.update(text)
    return int.from_bytes(digest.digest(), "little")


def documents(batch: Batch, text_key: str, text_column: str) -> Iterator[str]:
    """The texts of a batch; a null counts as an empty text.

    Raises:
        InputError: with file and line or row: broken JSON, no such key, or a value that is no text.
    """
    if batch.kind == "text":
        yield from (part.decode() for part in batch.parts)
    elif batch.kind == "rows":
        for number, value in enumerate(batch.parts, batch.first):
            yield _text(value, f"{batch.name}, row {number}: --text_column {text_column}")
    else:
        for number, line in enumerate(batch.parts[0].split(b"\n"), batch.first):
            if line and not line.isspace():
                yield _json_text(line, f"{batch.name}:{number}", text_key)


def _json_text(line: bytes, place: str, key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8
        raise InputError(f"{place}: not valid JSON ({str(error) or type(error).__name__})") from None
    if not isinstance(record, dict):
        raise InputError(f"{place}: expected a JSON object on each line, got {type(record).__name__}")
    if key not in record:
        present = ", ".join(list(record)[:20]) or "none"
        raise InputError(f"{place}: --text_key {key}: no such key; keys present: {present}")
    return _text(record[key], f"{place}: --text_key {key}")


def _text(value: Any, place: str) -> str:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{place}: expected text, got {type(value).__name__}")
    return value or ""


def encode_batches(batches: Iterable[Batch], options: EncodeOptions, workers: int) -> Iterator[Encoded]:
    """Encode batches over `workers` processes (1: in this one), results in the order of the batches.

    At most a few batches per worker, and a few megabytes, are in flight at any time, however fast they are read.

    Raises:
        InputError: what the reader or a worker found wrong; or a worker died.
    """
    if workers == 1:
        yield from map(Encoder(options), batches)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (options,))
    pending: deque[tuple[Future[Encoded], int]] = deque()
    limit = _BATCHES_PER_WORKER * workers
    try:
        for batch in batches:
            while pending and (
                len(pending) == limit or sum(size for _, size in pending) + batch.size > limit * 2 * BATCH_BYTES
            ):
                yield pending.popleft()[0].result()
            with interrupts_held():  # starts a process, when all others are busy
                pending.append((pool.submit(_encode, batch), batch.size))
        while pending:
            yield pending.popleft()[0].result()
    except BrokenProcessPool:
        raise InputError("a worker process ended unexpectedly, out of memory perhaps; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits for the end of the block. Processes started inside never see it: the parent does, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_encoder: Encoder | None = None


def _start_worker(options: EncodeOptions) -> None:
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(options)


def _end_with_parent() -> None:
    """A pool's worker outlives a killed parent, waiting for work for ever. Not ours."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(batch: Batch) -> Encoded:
    assert _encoder is not None
    return _encoder(batch)
