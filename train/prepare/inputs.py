"""Reads text files, JSON lines, parquet files and standard input in batches of about a megabyte.

Reading happens in the parent process and is cheap: bytes are cut where documents or lines end, and UTF-8 is checked.
What costs time (JSON, tokens) happens in `encode.py`, in the workers. Batches are the same, in the same order,
however many workers there are.
"""

import gzip
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from moe_engine.train.errors import InputError
from moe_engine.train.prepare.sources import STDIN, TABLES, Source, Tally, suffixes

BATCH_BYTES = 1 << 20
# A plain text longer than WHOLE is many documents of about SECTION: one book then has a validation part, and memory
# stays bounded. So that a shorter one has that part too, it is cut into about LONE when it is the whole input.
WHOLE_BYTES = 256 << 10
SECTION_BYTES = 64 << 10
LONE_BYTES = 4 << 10
MAX_LINE_BYTES = 32 << 20
_CHUNK = 1 << 20
_ZSTD_CHUNK = 16 << 10  # what one piece unpacks to has no bound, only a ratio
_ROWS = 16  # read at a time; rows may be whole books


@dataclass(frozen=True)
class Batch:
    """About a megabyte of input for one worker.

    Attributes:
        kind: "text" (each part is a document, UTF-8), "jsonl" (one part: whole lines) or "rows" (each part is the
            value of one row).
        name: the file, for error messages; empty for text, which was checked and may come from many files.
        first: number of the first line or row, from 1.
        parts: the contents.
        size: of the contents, in bytes or characters. A single document or line may be far more than a megabyte.
    """

    kind: str
    name: str
    first: int
    parts: list[Any]
    size: int


class NotText(Exception):
    """A file holds something other than UTF-8 text, at a byte offset."""

    def __init__(self, reason: str, offset: int):
        super().__init__(f"{reason} at byte {offset}")


def read_batches(sources: Iterable[Source], text_column: str, tally: Tally) -> Iterator[Batch]:
    """All sources in order, small texts gathered into batches of about BATCH_BYTES.

    If there is only one document, and it is a plain text, its sections are the documents.

    Raises:
        InputError: a file that was named is binary or not UTF-8; a damaged archive; a column that does not exist; a
            line that does not end.
    """
    gathered: list[bytes] = []
    size = batches = 0
    for source in sources:
        for item in _read(source, text_column, tally):
            if isinstance(item, bytes):
                gathered.append(item)
                size += len(item)
            if gathered and (size >= BATCH_BYTES or not isinstance(item, bytes)):
                yield Batch("text", "", 1, gathered, size)
                gathered, size, batches = [], 0, batches + 1
            if not isinstance(item, bytes):
                yield item
                batches += 1
    if batches == 0 and len(set(filter(bytes.strip, gathered))) == 1:  # one text, perhaps with copies or empty files
        gathered = [section for text in gathered for section in _sections(text)]
    if gathered:
        yield Batch("text", "", 1, gathered, size)


def _read(source: Source, text_column: str, tally: Tally) -> Iterator[bytes | Batch]:
    """One source: the documents of a plain text as bytes, batches of anything else."""
    path = source.path
    kind = "" if path == STDIN else suffixes(path)[0]
    before = tally.done_bytes
    try:
        if kind == ".parquet":
            yield from row_batches(path, _parquet_columns(path, text_column, tally), text_column)
        elif kind in TABLES:
            yield from _lines(path, tally)
        else:
            if source.found:  # left out as a whole, so look at all of it before any of it is used
                for _ in _documents(_chunks(path, Tally())):
                    pass
            yield from _documents(_chunks(path, tally))
    except NotText as error:
        if not source.found:
            raise InputError(f"{path}: not UTF-8 text ({error})") from None
        tally.skipped.append(f"{path} ({error})")
    except PermissionError as error:
        if not source.found:
            raise InputError(f"{path}: {error.strerror}") from None
        tally.skipped.append(f"{path} ({error.strerror})")
    if path != STDIN:
        tally.done_bytes = before + os.path.getsize(path)


def _chunks(path: str, tally: Tally) -> Iterator[bytes]:
    """The bytes of a file, unpacked, in pieces of about a megabyte."""
    if path == STDIN:
        yield from iter(lambda: sys.stdin.buffer.read(_CHUNK), b"")
        return
    before = tally.done_bytes
    with open(path, "rb") as file:
        for chunk in _unpacked(path, file):
            tally.done_bytes = before + (file.tell() if file.seekable() else 0)
            yield chunk


def _unpacked(path: str, file: BinaryIO) -> Iterator[bytes]:
    compression = suffixes(path)[1]
    if compression == ".zst":
        yield from _unzstd(path, file)
        return
    stream = gzip.GzipFile(fileobj=file) if compression == ".gz" else file
    try:
        yield from iter(lambda: stream.read(_CHUNK), b"")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged or truncated gzip file ({error})") from None


def _unzstd(path: str, file: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{path}: .zst files need the zstandard package: pip install zstandard") from None
    # `stream_reader` takes a file cut off in the middle for a whole one; a decompression object knows its end.
    frame = None
    try:
        while data := file.read(_ZSTD_CHUNK):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if unpacked := frame.decompress(data):
                    yield unpacked
                data = frame.unused_data
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise InputError(f"{path}: damaged zstd file ({error})") from None
    if frame is not None:
        raise InputError(f"{path}: truncated zstd file")


def _lines(path: str, tally: Tally) -> Iterator[Batch]:
    """Batches of whole lines."""
    first, held, size = 1, [], 0
    for chunk in _chunks(path, tally):
        head, newline, tail = chunk.rpartition(b"\n")
        size += len(chunk)
        if not newline or size < BATCH_BYTES:
            held.append(chunk)
            if size > MAX_LINE_BYTES:
                raise InputError(f"{path}:{first}: a line of more than {MAX_LINE_BYTES >> 20} MB; is this JSON lines?")
            continue
        lines = b"".join([*held, head, newline])
        yield Batch("jsonl", path, first, [lines], len(lines))
        first += lines.count(b"\n")
        held, size = [tail], len(tail)
    if rest := b"".join(held):
        yield Batch("jsonl", path, first, [rest], len(rest))


def _parquet_columns(path: str, column: str, tally: Tally) -> Iterator[dict[str, list[Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: .parquet files need the pyarrow package: pip install pyarrow") from None
    before, size = tally.done_bytes, os.path.getsize(path)
    try:
        # A row group may be larger than memory: read through a buffer, not whole columns at once.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise InputError(f"--text_column {column}: {path} has no such column, only {', '.join(names)}")
            done = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=[column], use_threads=False):
                done += batch.num_rows
                tally.done_bytes = before + size * done // file.metadata.num_rows
                yield {column: batch.column(0).to_pylist()}
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: not a readable parquet file ({reason})") from None


def hub_columns(column: str) -> Iterator[dict[str, list[Any]]]:
    """FineWeb-Edu's 10-billion-token sample, streamed from the Hugging Face hub."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            "--source fineweb-edu needs the Hugging Face datasets package: pip install datasets (moe-engine[hub])"
        ) from None
    stream = load_dataset("HuggingFaceFW/fineweb-edu", name="sample-10BT", split="train", streaming=True)
    if stream.column_names and column not in stream.column_names:
        names = ", ".join(stream.column_names)
        raise InputError(f"--text_column {column}: fineweb-edu has no such column, only {names}")
    yield from stream.iter(batch_size=_ROWS)


def row_batches(name: str, tables: Iterable[dict[str, list[Any]]], column: str) -> Iterator[Batch]:
    """Rows of parquet files and of the hub alike: one value of `column` is one document.

    Args:
        name: what error messages call the table.
        tables: pieces of it, as lists by column name.
        column: the one that holds the text.
    """
    first, rows, size = 1, [], 0
    for table in tables:
        for value in table[column]:
            rows.append(value)
            size += len(value) if isinstance(value, str) else 0
            if size >= BATCH_BYTES:
                yield Batch("rows", name, first, rows, size)
                first, rows, size = first + len(rows), [], 0
    if rows:
        yield Batch("rows", name, first, rows, size)


def _documents(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """A plain text as documents: itself, or sections cut after a line where it is longer than WHOLE_BYTES.

    Where a cut falls depends on the text alone, not on how it arrives in chunks.

    Raises:
        NotText: with the byte offset in the whole text.
    """
    buffer, offset, whole = b"", 0, True
    for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start > WHOLE_BYTES:
            end = _cut(buffer, start + SECTION_BYTES, start + WHOLE_BYTES)
            yield _checked(buffer[start:end], offset + start)
            start, whole = end, False
        buffer, offset = buffer[start:], offset + start
    while not whole and len(buffer) > SECTION_BYTES and (end := _cut(buffer, SECTION_BYTES, WHOLE_BYTES)) < len(buffer):
        yield _checked(buffer[:end], offset)
        buffer, offset = buffer[end:], offset + end
    if buffer or whole:  # also an empty text, to be counted as such
        yield _checked(buffer, offset)


def _sections(text: bytes) -> list[bytes]:
    """A short text in equal parts of LONE_BYTES or a little more, give or take half of that to end with a line."""
    count = max(len(text) // LONE_BYTES, 1)
    ideal = [len(text) * i // count for i in range(1, count)]
    ends = [_cut(text, end, end + LONE_BYTES // 2) for end in ideal]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def _cut(buffer: bytes, least: int, most: int) -> int:
    """Where to end a section, from `least` to `most`: after a line, or failing that between two characters."""
    end = buffer.find(b"\n", least, most) + 1 or min(most, len(buffer))
    inside = 0  # bytes between the last start of a character and `end`; a UTF-8 sequence has at most four
    while inside < 3 and end < len(buffer) and buffer[end - inside] & 0xC0 == 0x80:
        inside += 1
    return end - inside


def _checked(section: bytes, offset: int) -> bytes:
    zero = section.find(b"\0")
    if zero >= 0:
        raise NotText("binary: a zero byte", offset + zero)
    try:
        section.decode()
    except UnicodeDecodeError as error:
        raise NotText(f"byte 0x{section[error.start]:02x}", offset + error.start) from None
    return section.removeprefix(b"\xef\xbb\xbf") if offset == 0 else section
