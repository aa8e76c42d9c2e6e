"""The command `moe-prepare`: its options, the flow from input to data set, its report."""

import os
import re
import resource
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_engine.train.errors import InputError
from moe_engine.train.options import option
from moe_engine.train.prepare.encode import EncodeOptions, encode_batches, interrupts_held
from moe_engine.train.prepare.inputs import (
    LONE_BYTES,
    SECTION_BYTES,
    WHOLE_BYTES,
    Batch,
    hub_columns,
    read_batches,
    row_batches,
)
from moe_engine.train.prepare.output import DatasetFolder, ShardWriter
from moe_engine.train.prepare.progress import Progress
from moe_engine.train.prepare.sources import STDIN, Tally, find_sources, stdlib_sources
from moe_engine.train.prepare.split import SplitWriter
from moe_engine.train.tokenizer import load_tokenizer

_MOST_WORKERS = 5  # unless asked for more: keeps all processes together below 1 GB
_BYTES_PER_WORKER = 32 << 20  # of input; the start of a process is worth it from here

_DOC = f"""Turn text into token shards and a meta.json for training.

A document is a text file, a JSON line or a table's row. A text file of more than {WHOLE_BYTES >> 10} KB is cut at line
ends into sections of about {SECTION_BYTES >> 10} KB that count as documents. A smaller one that is the only document is
cut so too, into sections of about {LONE_BYTES >> 10} KB: it needs {2 * LONE_BYTES >> 10} KB or more.
"""


@dataclass
class PrepareConfig:
    """The options of `moe-prepare`."""

    out_dir: str = option(help="folder for the data set")
    input: list[str] = option(
        default_factory=list,
        help="text files, folders, .jsonl or .parquet files (also .gz, .zst), or - for standard input",
    )
    source: str | None = option(
        None,
        "a built-in corpus instead of --input: the .py files of Python's standard library, or FineWeb-Edu from the hub",
        choices=("stdlib", "fineweb-edu"),
    )
    tokenizer: str = option("o200k_base", "a tiktoken encoding, or NAME:N for its first N ranks, e.g. o200k_base:8192")
    format: str = option("npy", "npy: shards; bin: one train.bin and one val.bin", choices=("npy", "bin"))
    shard_tokens: int = option(100_000_000, "tokens per .npy shard")
    val_fraction: float = option(0.01, "share of the text held back for validation, by document")
    seed: int = option(1337, "changes which documents are held back")
    text_key: str = option("text", "key of the text in JSON lines")
    text_column: str = option("text", "column of the text in parquet files and in FineWeb-Edu")
    dataset: str | None = option(None, "name of the data set [default: that of the source or the first input]")
    workers: int = option(
        0, f"processes; 0: one per core, at most {_MOST_WORKERS} (120 MB of memory each), fewer for small inputs"
    )
    max_tokens: int = option(0, "stop after about this many tokens; 0: read everything")
    overwrite: bool = option(False, "replace a finished data set in --out_dir")


@dataclass(frozen=True)
class Prepared:
    """What was done.

    Attributes:
        meta: the contents of meta.json.
        seconds: wall time, start of the workers included.
        processor_seconds: of all processes together.
        text_bytes, characters: of the text that was encoded.
        empty: documents without text, left out.
        tally: what was read and what was left out in folders.
        workers: number of processes.
    """

    meta: dict[str, Any]
    seconds: float
    processor_seconds: float
    text_bytes: int
    characters: int
    empty: int
    tally: Tally
    workers: int


def prepare(config: PrepareConfig) -> Prepared:
    """Tokenize text into a data set. On an error or an interrupt nothing is left in `out_dir`.

    With more than one worker, call it below `if __name__ == "__main__":` (processes are spawned).

    Raises:
        InputError: an option, an input or the output folder cannot be used; the disk is full.
    """
    try:
        return _prepare(config)
    except BrokenPipeError:  # of our own output: the command's business
        raise
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise InputError(f"{place}{error.strerror or error}") from error


def _prepare(config: PrepareConfig) -> Prepared:
    start, processor_start = time.monotonic(), _processor_seconds()
    name = _check(config)
    tokenizer = load_tokenizer(config.tokenizer)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    options = EncodeOptions(tokenizer.name, dtype, config.seed, config.text_key, config.text_column)
    out_dir, tally = Path(config.out_dir), Tally()
    batches = _batches(config, out_dir, tally)
    workers = config.workers or _default_workers(tally.total_bytes)
    text_bytes = characters = empty = 0
    patterns = [f"{name}_{split}_{{}}.npy" if config.format == "npy" else f"{split}.bin" for split in ("train", "val")]
    limit = config.shard_tokens if config.format == "npy" else 0

    with (
        DatasetFolder(out_dir, config.overwrite) as folder,
        ShardWriter(folder.staging, patterns[0], "train", dtype, limit) as train,
        ShardWriter(folder.staging, patterns[1], "val", dtype, limit) as val,
        Progress(tally) as progress,
        closing(encode_batches(batches, options, workers)) as results,
    ):
        writer = SplitWriter(train, val, config.val_fraction)
        for encoded in results:
            writer.add(encoded)
            text_bytes += encoded.text_bytes
            characters += encoded.characters
            empty += encoded.empty
            progress.update(encoded.text_bytes)
            if 0 < config.max_tokens <= writer.received:
                break
        writer.finish()
        meta = {
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype,
            "dataset": name,
            "documents": writer.documents,
            "tokens": writer.tokens,
            "eot": tokenizer.eot,
            "format": config.format,
            "seed": config.seed,
            "val_fraction": config.val_fraction,
            "shards": train.shards + val.shards,
        }
        with interrupts_held():
            folder.commit(meta)
    seconds, processor_seconds = time.monotonic() - start, _processor_seconds() - processor_start
    return Prepared(meta, seconds, processor_seconds, text_bytes, characters, empty, tally, workers)


def _batches(config: PrepareConfig, out_dir: Path, tally: Tally) -> Iterator[Batch]:
    if config.source == "fineweb-edu":
        return row_batches("fineweb-edu", hub_columns(config.text_column), config.text_column)
    sources = find_sources(config.input, out_dir, tally) if config.input else stdlib_sources(tally)
    if not sources:
        others = f" ({tally.unknown} files with other endings)" if tally.unknown else ""
        raise InputError(f"the document list is empty: --input {' '.join(config.input)} has no text files{others}")
    return read_batches(sources, config.text_column, tally)


def _check(config: PrepareConfig) -> str:
    """The name of the data set; InputError for options that cannot be used."""
    if bool(config.input) == bool(config.source):
        came = "both" if config.input else "neither"
        raise InputError(f"expected --input PATH… or --source stdlib|fineweb-edu, got {came}")
    if not 0 < config.val_fraction < 1:
        raise InputError(f"--val_fraction: expected a number between 0 and 1, got {config.val_fraction}")
    for field, least in (("shard_tokens", 1), ("workers", 0), ("max_tokens", 0)):
        if getattr(config, field) < least:
            raise InputError(f"--{field}: expected at least {least}, got {getattr(config, field)}")
    # A name such as `my_val` would make its training shards match `*_val_*.npy`.
    misleading = re.compile(r"_(train|val)(_|$)")
    if config.dataset is None:
        first = "stdin" if config.input[:1] == [STDIN] else Path(*config.input[:1]).resolve().name.partition(".")[0]
        name = re.sub(r"[^\w-]+", "_", config.source or first).strip("_") or "text"
        return name.replace("_", "-") if misleading.search(name) else name
    if not re.fullmatch(r"\w[\w.+-]*", config.dataset) or misleading.search(config.dataset):
        raise InputError(
            f"--dataset {config.dataset!r}: expected letters, digits and -_.+ only, without _train or _val: it begins"
            " the names of the shards"
        )
    return config.dataset


def _default_workers(total_bytes: int) -> int:
    """One per core this process may use, within reason for the size of the input (0: unknown)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    useful = 1 + total_bytes // _BYTES_PER_WORKER if total_bytes else cores
    return min(cores, useful, _MOST_WORKERS)


def _processor_seconds() -> float:
    """Of this process and of those children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def report(done: Prepared, out_dir: str) -> str:
    """What the command prints at its end."""
    documents, tokens = done.meta["documents"], done.meta["tokens"]
    megabytes, characters = done.text_bytes / 1e6, done.characters / sum(tokens.values())
    left_out = [
        *([f"{done.empty:,} empty documents"] if done.empty else []),
        *([f"{len(done.tally.skipped):,} files that are not UTF-8 text"] if done.tally.skipped else []),
        *([f"{done.tally.unknown:,} files with other endings"] if done.tally.unknown else []),
    ]
    lines = [
        f"documents  {documents['train']:,} train, {documents['val']:,} val",
        f"tokens     {tokens['train']:,} train, {tokens['val']:,} val"
        f" ({done.meta['tokenizer']}, {done.meta['dtype']}, {characters:.2f} characters per token)",
        f"speed      {megabytes:,.1f} MB of text in {done.seconds:.1f} s: {megabytes / done.seconds:.1f} MB/s with"
        f" {done.workers} worker{'s' * (done.workers > 1)},"
        f" {megabytes / done.processor_seconds:.1f} MB per second of processor time (one core)",
    ]
    if left_out:
        lines.append(f"left out   {', '.join(left_out)}")
        lines += [f"           {name}" for name in done.tally.skipped[:5]]
        if len(done.tally.skipped) > 5:
            lines.append(f"           … and {len(done.tally.skipped) - 5:,} more")
    return "\n".join([*lines, f"written    {out_dir}"])


def _command(config: PrepareConfig) -> None:
    print(report(prepare(config), config.out_dir))


def main(argv: list[str] | None = None) -> int:
    """The command `moe-prepare`. Returns the exit status."""
    from moe_engine.train.cli import run_command

    return run_command("moe-prepare", PrepareConfig, _command, argv, _DOC)
