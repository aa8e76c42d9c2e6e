"""Text to token ids and back: tiktoken's encodings, whole or cut to their first ranks.

A *spec* names a tokenizer and is all that is needed to build it again: `o200k_base`, `gpt2`, any other encoding that
tiktoken knows, or `NAME:8192`: the first 8192 ranks of NAME, plus the end-of-text token as id 8192. A prefix of a
byte-pair vocabulary is itself one, because a merge only ever uses pieces of lower rank.

The ranks come from the `bpe-openai` package where it carries them (no network needed), else from tiktoken's cache, else
tiktoken downloads them; tiktoken verifies their hash in each case. If none of these works that is an error, never
another tokenizer.
"""

import difflib
import functools
import gzip
import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tiktoken.registry

from moe_engine.train.errors import InputError

_END_OF_TEXT = "<|endoftext|>"
_UNKNOWN_ID = "\ufffd".encode()
# tiktoken's pattern matcher overflows its stack on runs of white space of about a million characters.
_MAX_PIECE = 200_000
_DOWNLOAD_SECONDS = 60.0

_O200K = ("o200k_base", "fb374d419588a4632f3f557e76b4b70aebbca790")
_CL100K = ("cl100k_base", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4")
# Encoding -> (its file in bpe-openai, the name under which tiktoken's cache looks for it: the SHA-1 of a URL).
_PACKAGED = {"o200k_base": _O200K, "o200k_harmony": _O200K, "cl100k_base": _CL100K}


@dataclass(frozen=True)
class Tokenizer:
    """A byte-pair encoding with an end-of-text token. Pickles as its name and is rebuilt by the receiver.

    Attributes:
        name: the spec that `load_tokenizer` builds this tokenizer from.
        vocab_size: one more than the largest id.
        eot: id of the end-of-text token, which no text encodes to.
    """

    name: str
    vocab_size: int
    eot: int
    _encoding: tiktoken.Encoding = field(repr=False, compare=False)

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text` as a uint32 array. Text that looks like a special token is ordinary text.

        Lone surrogates (JSON can hold them) become U+FFFD. Texts over 200,000 characters are encoded in pieces, cut
        after a line where there is one.
        """
        try:
            parts = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in _pieces(text)]
        except UnicodeEncodeError:
            return self.encode_array(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; the same as `encode_array`."""
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Broken UTF-8, and ids this vocabulary has no token for, read as U+FFFD."""
        return b"".join(self._token_bytes(int(token)) for token in ids).decode("utf-8", errors="replace")

    def _token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            return _UNKNOWN_ID
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:  # some vocabularies have gaps
            return _UNKNOWN_ID

    def __reduce__(self) -> tuple[Callable[[str], "Tokenizer"], tuple[str]]:
        return load_tokenizer, (self.name,)


def _pieces(text: str) -> list[str]:
    pieces, start = [], 0
    while len(text) - start > _MAX_PIECE:
        end = text.rfind("\n", start, start + _MAX_PIECE) + 1 or start + _MAX_PIECE
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def check_spec(spec: str) -> tuple[str, int | None]:
    """The encoding and the number of ranks that `spec` names, without loading anything.

    Raises:
        InputError: unknown name, or N not a number.
    """
    name, cut, number = spec.partition(":")
    known = tiktoken.list_encoding_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
        raise InputError(f"tokenizer {spec!r}: no such encoding {name!r}; {hint}")
    if cut and not (number.isascii() and number.isdigit() and len(number) < 20):
        raise InputError(f"tokenizer {spec!r}: expected NAME or NAME:N with a whole number N, e.g. {name}:8192")
    return name, int(number) if cut else None


@functools.lru_cache(maxsize=8)
def load_tokenizer(spec: str) -> Tokenizer:
    """Build the tokenizer that `spec` names.

    Args:
        spec: an encoding of tiktoken, or `NAME:N` for its first N ranks and the end-of-text token.

    Raises:
        InputError: unknown name, N not a usable number, or the ranks cannot be had.
    """
    name, count = check_spec(spec)
    parts = _encoding_parts(name)
    if _END_OF_TEXT not in parts["special_tokens"]:
        raise InputError(f"tokenizer {spec!r}: this encoding has no {_END_OF_TEXT} token to put between documents")
    if count is not None:
        parts = _first_ranks(spec, parts, count)
    encoding = tiktoken.Encoding(**parts)
    return Tokenizer(parts["name"], encoding.max_token_value + 1, encoding.eot_token, encoding)


def _first_ranks(spec: str, parts: dict[str, Any], count: int) -> dict[str, Any]:
    ranks = {piece: rank for piece, rank in parts["mergeable_ranks"].items() if rank < count}
    if len(ranks) != count or sum(len(piece) == 1 for piece in ranks) != 256:
        # Without all 256 single bytes some text could not be encoded at all.
        available = len(parts["mergeable_ranks"])
        raise InputError(f"tokenizer {spec!r}: expected a number of ranks from 256 to {available}, got {count}")
    return {
        "name": f"{parts['name']}:{count}",
        "pat_str": parts["pat_str"],
        "mergeable_ranks": ranks,
        "special_tokens": {_END_OF_TEXT: count},
    }


_environment_lock = threading.Lock()


def _encoding_parts(name: str) -> dict[str, Any]:
    """The arguments of `tiktoken.Encoding` for an encoding that tiktoken knows."""
    packaged = _packaged_ranks(name)
    if packaged is None:
        return _downloaded_parts(name)
    # tiktoken takes ranks from no place but its cache, and checks their SHA-256 itself. A folder of our own always
    # works, where the user's cache may be switched off, read-only or another user's.
    with tempfile.TemporaryDirectory(prefix="moe-tokenizer-") as folder, _environment_lock:
        Path(folder, _PACKAGED[name][1]).write_bytes(packaged)
        with _environment("TIKTOKEN_CACHE_DIR", folder):
            return _construct(name)


def _packaged_ranks(name: str) -> bytes | None:
    """The unpacked ranks of an encoding from bpe-openai; None where that is not installed or does not carry them."""
    package = importlib.util.find_spec("bpe_openai")  # its import would load 70 MB of code that is not needed
    if package is None or name not in _PACKAGED:
        return None
    path = Path(package.submodule_search_locations[0], "data", f"{_PACKAGED[name][0]}.tiktoken.gz")
    return gzip.decompress(path.read_bytes()) if path.is_file() else None


def _downloaded_parts(name: str) -> dict[str, Any]:
    """The same from tiktoken's cache or, the first time, from the network; InputError if that fails or hangs."""
    outcome: list[dict[str, Any] | Exception] = []

    def work() -> None:
        try:
            outcome.append(_construct(name))
        except Exception as error:  # handed to the caller's thread, which knows which kinds it expects
            outcome.append(error)

    # tiktoken downloads without a time limit; behind a firewall that drops packets it would seem to hang.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_DOWNLOAD_SECONDS)
    result = outcome[0] if outcome else TimeoutError(f"no answer in {_DOWNLOAD_SECONDS:.0f} s")
    if isinstance(result, dict):
        return result
    if not isinstance(result, (OSError, ValueError, ImportError)):
        raise result
    reason = type(result).__name__ if isinstance(result, OSError) else str(result).partition("\n")[0]
    remedy = "install them with `pip install bpe-openai` (`moe-engine[offline]`), or " if name in _PACKAGED else ""
    raise InputError(
        f"tokenizer {name!r}: its ranks are not in tiktoken's cache and could not be downloaded ({reason}); {remedy}"
        "load it once where there is a network and copy tiktoken's cache folder here (TIKTOKEN_CACHE_DIR)"
    ) from result


def _construct(name: str) -> dict[str, Any]:
    assert tiktoken.registry.ENCODING_CONSTRUCTORS is not None  # list_encoding_names has filled it
    return tiktoken.registry.ENCODING_CONSTRUCTORS[name]()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable for the length of a block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
