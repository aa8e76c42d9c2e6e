"""The checks of `moe-doctor` that look at the data folder: meta.json, tokenizer, shards, token ids, windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial

import numpy as np

from moe_engine.train.data import TokenDataset
from moe_engine.train.doctor.check import Check, NotChecked, Outcome, Setup, fail, passed, warn
from moe_engine.train.shards import Shard, Split

# A look at a shard is that many spans of that many tokens, fewer where there are many shards.
_SPAN, _SPANS, _MOST_TOKENS = 1 << 14, 16, 1 << 25
_CHUNK = 1 << 22  # tokens at once with --deep
_MOST_NAMED = 5  # faulty files that a result names one by one
_TEXT = "Hello, wörld! 世界 🙂\n\tfor i in range(10): x += 1.5e-3  # <|endoftext|> is text here\r\n   \u00a0end "


def data_checks(deep: bool) -> list[Check]:
    """All of them, in the order in which they are reported; the checksums only with `deep`."""
    checks = [
        Check("meta.json", _meta, "make the data with moe-prepare, or write a meta.json as the guide shows"),
        Check("tokenizer", _tokenizer, "name the tokenizer that made the data, and install its ranks"),
        Check("vocabulary", _vocabulary),
    ]
    bodies = {"shards": _shards, **({"checksums": _checksums} if deep else {}), "tokens": _tokens, "windows": _windows}
    remedies = {
        "shards": "make the data with moe-prepare, or name the files as the guide does",
        "windows": "lower --block_size, or prepare the data in larger shards (moe-prepare --shard_tokens)",
    }
    for kind, body in bodies.items():
        for split in ("train", "val"):
            checks.append(Check(f"{split} {kind}", partial(body, split=split), remedies.get(kind, "")))
    return checks


def _meta(setup: Setup) -> Outcome:
    if setup.meta_error:
        raise setup.meta_error
    meta = setup.meta
    listed = "no shards listed" if meta.shards is None else f"{len(meta.shards)} shards listed"
    return passed(
        f"{setup.data_dir}: dataset {meta.dataset}, tokenizer {meta.tokenizer}, vocab_size {meta.vocab_size},"
        f" {meta.dtype}, {listed}"
    )


def _tokenizer(setup: Setup) -> Outcome:
    tokenizer, meta = setup.tokenizer, setup.meta
    ids = tokenizer.encode(_TEXT)
    if tokenizer.decode(ids) != _TEXT:
        return fail(
            f"{tokenizer.name}: a test text does not come back as it was", "install tiktoken and bpe-openai anew"
        )
    if meta.eot is not None and meta.eot != tokenizer.eot:
        return warn(
            f"{tokenizer.name}: its end-of-text token is {tokenizer.eot}, meta.json says eot {meta.eot}",
            "samples would begin with a token that ends no document; correct tokenizer or eot in meta.json",
        )
    return passed(f"{tokenizer.name}: {tokenizer.vocab_size} ids, a test text of {len(ids)} tokens comes back exactly")


def _vocabulary(setup: Setup) -> Outcome:
    """vocab_size of meta.json against the shards' dtype, the tokenizer's vocabulary and the model's."""
    if setup.meta_error:
        raise NotChecked("meta.json cannot be read")
    tokenizer, preset = setup.tokenizer_if_any(), setup.config.preset
    size, dtype, model = setup.meta.vocab_size, setup.meta.dtype, setup.preset_model.vocab_size
    known = size if tokenizer is None else tokenizer.vocab_size
    if min(size, known) - 1 > np.iinfo(dtype).max:
        return fail(
            f"{dtype} shards cannot hold ids up to {min(size, known) - 1}: larger ones were cut off when written",
            "tokenize again with uint32, or correct tokenizer and vocab_size in meta.json",
        )
    if size > known:
        found = f"meta.json has vocab_size {size}, but {setup.meta.tokenizer} has {known} ids"
        remedy = f"correct tokenizer or vocab_size in meta.json (to {known})"
        if size > model:
            return fail(f"{found} and the model of preset {preset} {model}", remedy)
        return warn(found, remedy)
    if size > model:
        return warn(
            f"{size} ids in the data, {model} in preset {preset}: the model grows to {setup.model.vocab_size}",
            "fine if meant; else take a larger --preset, or a smaller tokenizer such as o200k_base:4096",
        )
    if size < known:
        return warn(
            f"meta.json has vocab_size {size}, {setup.meta.tokenizer} has {known}: a token from {size} on would stop"
            " training",
            f"fine while the checks of tokens find none; else set vocab_size to {known}",
        )
    return passed(f"{size} ids in the data, {setup.model.vocab_size} in the model (preset {preset})")


def _shards(setup: Setup, split: Split) -> Outcome:
    readable, errors = setup.shards(split)
    if errors:
        return fail(_listed(errors), "copy the files again from where they are whole, or prepare the data again")
    tokens, size = sum(shard.tokens for shard in readable), sum(shard.end for shard in readable)
    return passed(f"{len(readable)} of {readable[0].dtype.name}, {tokens:,} tokens, {size / 1e6:,.1f} MB")


def _checksums(setup: Setup, split: Split) -> Outcome:
    shards = setup.readable(split)
    recorded = [shard for shard in shards if shard.sha256]
    errors = [
        f"{shard.path}: sha256 is {found}, meta.json has {shard.sha256}"
        for shard in recorded
        if (found := _sha256(shard)) != shard.sha256
    ]
    if errors:
        return fail(_listed(errors), "the file was changed or damaged: copy it again, or prepare the data again")
    if len(recorded) < len(shards):
        return warn(
            f"{len(recorded)} of {len(shards)} shards have a sha256 in meta.json"
            + (", and those agree" if recorded else ""),
            "damage to the others would go unseen; moe-prepare records checksums",
        )
    return passed(f"{len(shards)} agree with meta.json")


def _sha256(shard: Shard) -> str:
    with open(shard.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokens(setup: Setup, split: Split) -> Outcome:
    shards, size = setup.readable(split), setup.meta.vocab_size
    spans = min(max(_MOST_TOKENS // (len(shards) * _SPAN), 2), _SPANS)
    errors, seen, largest = [], 0, 0
    for shard in shards:
        for begin, end in _every(shard.tokens) if setup.deep else _sample(shard.tokens, spans):
            part = _read(shard, begin, end)
            seen, largest = seen + len(part), max(largest, int(part.max()))
            if part.max() >= size or part.min() < 0:
                place = int(np.argmax((part >= size) | (part < 0)))
                errors.append(f"{shard.path}: token id {part[place]} at position {begin + place}")
                break
    if errors:
        source = "of the preset, for want of a meta.json" if setup.meta_error else "(vocab_size in meta.json)"
        return fail(
            f"outside the vocabulary of {size} {source}: {_listed(errors)}",
            "correct vocab_size or dtype in meta.json if it is wrong, else prepare the data again",
        )
    total = sum(shard.tokens for shard in shards)
    extent = "every token" if seen == total else f"{seen:,} of {total:,} tokens looked at (--deep: all)"
    found = f"largest id {largest} of {size}, {extent}{_beginning(setup, shards[0])}"
    tokenizer = setup.tokenizer_if_any()
    if tokenizer is not None and largest >= tokenizer.vocab_size:
        return warn(
            f"{found}; {tokenizer.name} has no ids from {tokenizer.vocab_size} on",
            "another tokenizer made these tokens: name it in meta.json",
        )
    return passed(found)


def _every(tokens: int) -> Iterator[tuple[int, int]]:
    """All positions, in chunks `(begin, end)`."""
    return ((begin, min(begin + _CHUNK, tokens)) for begin in range(0, tokens, _CHUNK))


def _sample(tokens: int, spans: int) -> Iterator[tuple[int, int]]:
    """Evenly spaced spans `(begin, end)`, the first and the last tokens among them; everything if that is less."""
    if tokens <= spans * _SPAN:
        return _every(tokens)
    return ((begin, begin + _SPAN) for begin in (i * (tokens - _SPAN) // (spans - 1) for i in range(spans)))


def _read(shard: Shard, begin: int, end: int) -> np.ndarray:
    """Tokens `[begin, end)`. Not through a memory map: each look at a new place of one may read megabytes ahead."""
    shard.check_size()
    return np.fromfile(shard.path, shard.dtype, end - begin, offset=shard.offset + begin * shard.dtype.itemsize)


def _beginning(setup: Setup, shard: Shard) -> str:
    """How the data begins, as text: the user sees at once whether the tokenizer is the one that made it."""
    tokenizer = setup.tokenizer_if_any()
    return f"; begins with {tokenizer.decode(_read(shard, 0, min(12, shard.tokens)))!r}" if tokenizer else ""


def _windows(setup: Setup, split: Split) -> Outcome:
    config = setup.config
    data = TokenDataset(setup.meta, split, config.block_size, setup.readable(split))
    windows = f"{data.num_windows:,} windows of {config.block_size} + 1 tokens"
    if data.notes:
        return warn(f"{windows}; {data.notes[0]}", "lower --block_size, or prepare the data in larger shards")
    if split == "val":
        used = min(data.num_windows, config.eval_iters * config.batch_size)
        return passed(f"{windows}, {used:,} of them in an evaluation of {config.eval_iters} batches")
    batch = config.batch_size * config.grad_accum_steps * setup.ranks
    product = f"batch_size {config.batch_size} × grad_accum_steps {config.grad_accum_steps} × {setup.ranks} device(s)"
    if data.num_windows < batch:
        return warn(
            f"{windows}: fewer than the {batch:,} that one iteration takes ({product})",
            "prepare more text, or lower --batch_size, --grad_accum_steps or --block_size",
        )
    iterations = data.num_windows / batch
    return passed(
        f"{windows}: one epoch is {iterations:,.1f} iterations of {batch:,} ({product});"
        f" the {config.max_iters:,} iterations of a run are {config.max_iters / iterations:,.1f} epochs"
    )


def _listed(errors: list[str]) -> str:
    more = len(errors) - _MOST_NAMED
    return "; ".join(errors[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
