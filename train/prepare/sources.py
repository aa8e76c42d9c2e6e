"""Which files `moe-prepare` reads: those that were named, and those found in folders."""

import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from moe_engine.train.errors import InputError

STDIN = "-"
_COMPRESSED = (".gz", ".zst")
TABLES = (".jsonl", ".ndjson", ".parquet")
_TEXT_SUFFIXES = """
    .txt .text .md .markdown .rst .adoc .org .tex .html .htm .xml .css .scss .py .pyi .pyx .c .h .cc .cpp .cxx .hpp
    .cu .cuh .rs .go .java .kt .scala .js .mjs .ts .jsx .tsx .vue .rb .php .pl .pm .lua .r .jl .swift .m .cs .fs .hs
    .ml .mli .ex .exs .erl .clj .lisp .el .scm .sh .bash .zsh .fish .ps1 .sql .proto .cmake .yaml .yml .toml .ini
    .cfg .f90 .f .asm .s .v .vhd .zig .nim .d .dart
"""
_TEXT = frozenset(_TEXT_SUFFIXES.split())
_SKIPPED_FOLDERS = ("__pycache__", "node_modules", "site-packages", "dist-packages")


@dataclass(frozen=True)
class Source:
    """One file to read. `found`: met in a folder, so that it may be left out if it is no text; else it was named."""

    path: str
    found: bool = False


@dataclass
class Tally:
    """What was read and what was left out; the reader writes it, the progress bar and the report read it.

    Attributes:
        total_bytes: size of all files on disk; 0 when it is not known.
        done_bytes: of which read so far.
        skipped: files found in folders that hold no UTF-8 text, with the reason.
        unknown: files found in folders whose name does not end like a text's.
    """

    total_bytes: int = 0
    done_bytes: int = 0
    skipped: list[str] = field(default_factory=list)
    unknown: int = 0


def find_sources(inputs: Iterable[str], out_dir: Path, tally: Tally) -> list[Source]:
    """The files that the arguments of `--input` stand for, in their order, folders walked in sorted order.

    Args:
        inputs: files, folders, or `-`. A file met twice counts once.
        out_dir: not looked into, where a folder contains it.
        tally: receives `total_bytes`, `unknown` and folders that cannot be read.

    Raises:
        InputError: no such file or folder.
    """
    sources: dict[str, Source] = {}
    for name in inputs:
        if name == STDIN or not os.path.isdir(name):
            if name != STDIN and not os.path.exists(name):
                raise InputError(f"--input {name}: no such file or folder")
            found = [Source(name)]
        else:
            found = _walk(name, out_dir, tally)
        for source in found:
            sources.setdefault(os.path.realpath(source.path) if source.path != STDIN else STDIN, source)
    if STDIN not in sources:
        tally.total_bytes = sum(os.path.getsize(source.path) for source in sources.values())
    return list(sources.values())


def stdlib_sources(tally: Tally) -> list[Source]:
    """The .py files of the running Python's standard library, without what was installed beside them."""
    root = sysconfig.get_path("stdlib")
    sources = [source for source in _walk(root, None, Tally()) if source.path.endswith(".py")]
    if not sources:
        raise InputError(f"--source stdlib: no .py file under {root}; this Python has no readable standard library")
    tally.total_bytes = sum(os.path.getsize(source.path) for source in sources)
    return sources


def _walk(root: str, out_dir: Path | None, tally: Tally) -> list[Source]:
    def unreadable(error: OSError) -> None:
        tally.skipped.append(f"{error.filename} ({error.strerror})")

    sources = []
    for folder, subfolders, files in os.walk(root, onerror=unreadable):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".")
            and name not in _SKIPPED_FOLDERS
            and (out_dir is None or os.path.realpath(os.path.join(folder, name)) != os.path.realpath(out_dir))
        )
        for name in sorted(files):
            path = os.path.join(folder, name)
            if name.startswith(".") or not os.path.isfile(path):
                continue
            suffix = suffixes(name)[0]
            if suffix in _TEXT or suffix in TABLES:
                sources.append(Source(path, found=True))
            else:
                tally.unknown += 1
    return sources


def suffixes(name: str) -> tuple[str, str]:
    """`x.jsonl.gz` → (".jsonl", ".gz"); the second is empty where nothing is compressed."""
    stem, last = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1], last) if last in _COMPRESSED else (last, "")
