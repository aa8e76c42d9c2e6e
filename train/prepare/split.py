"""Which documents are held back for validation."""

import numpy as np

from moe_engine.train.errors import InputError
from moe_engine.train.prepare.encode import Encoded
from moe_engine.train.prepare.inputs import LONE_BYTES
from moe_engine.train.prepare.output import ShardWriter

# The first documents are kept in memory up to here (16 to 32 MB), to see whether the data set ends among them.
HELD_TOKENS = 8_000_000


class SplitWriter:
    """Sends each document to the training or the validation shards.

    A document belongs to validation if its hash, as a number in [0, 1), is below `val_fraction`. That depends on seed
    and text alone: not on order, number of workers or file names, and equal documents never stand on both sides.

    Of few documents this may leave none for validation. So the first HELD_TOKENS are held in memory. If the data set
    ends within them and validation has less than half of its share (or training has nothing), documents of lowest
    hash are taken until it has its share. If it does not end and validation has nothing yet, one document is taken.

    Attributes:
        documents, tokens: how many went to "train" and "val"; complete after `finish`.
    """

    def __init__(self, train: ShardWriter, val: ShardWriter, val_fraction: float):
        self._train, self._val, self._fraction = train, val, val_fraction
        self._threshold = np.uint64(min(int(val_fraction * 2**64), 2**64 - 1))
        self._chosen = np.empty(0, np.uint64)  # hashes that belong to validation whatever the threshold says
        self._held: list[Encoded] | None = []
        self.received = 0  # tokens
        self.documents = {"train": 0, "val": 0}
        self.tokens = {"train": 0, "val": 0}

    def add(self, encoded: Encoded) -> None:
        """Take the documents of one batch, in the order in which they are to stand."""
        self.received += len(encoded.tokens)
        if self._held is None:
            self._write(encoded)
        elif len(encoded.lengths):
            self._held.append(encoded)
            if self.received > HELD_TOKENS and sum(len(e.lengths) for e in self._held) > 1:
                self._release(complete=False)

    def finish(self) -> None:
        """Write what is held, close all files.

        Raises:
            InputError: no document for training, or none for validation.
        """
        if self._held:
            self._release(complete=True)
        self._train.close()
        self._val.close()
        count = sum(self.documents.values())
        if count == 0:
            raise InputError("the document list is empty: no text was found in the input")
        if 0 in self.documents.values():
            side = "validation" if self.documents["val"] == 0 else "training"
            many = "only one document" if count == 1 else f"{count} documents, but not two different ones"
            raise InputError(
                f"{many}, so the {side} part is empty; give more documents, or a text file of at least"
                f" {2 * LONE_BYTES >> 10} KB (a lone one is cut into sections that count as documents)"
            )

    def _release(self, complete: bool) -> None:
        held, self._held = self._held or [], None
        hashes, place = np.unique(np.concatenate([e.hashes for e in held]), return_inverse=True)
        tokens = np.bincount(place, weights=np.concatenate([e.lengths for e in held]))  # per hash, ascending
        below = hashes < self._threshold
        share = self._fraction * tokens.sum()
        if complete:
            choose = tokens[below].sum() < share / 2 or below.all()
        else:
            choose, share = not below.any(), 0.0
        if choose and len(hashes) > 1:
            count = 1 + int(np.searchsorted(np.cumsum(tokens), share))
            self._chosen = hashes[: min(count, len(hashes) - 1)]
            if complete:
                self._threshold = np.uint64(0)
        for encoded in held:
            self._write(encoded)

    def _write(self, encoded: Encoded) -> None:
        val = (encoded.hashes < self._threshold) | np.isin(encoded.hashes, self._chosen)
        token_in_val = np.repeat(val, encoded.lengths)
        for name, writer, documents, tokens in (
            ("train", self._train, ~val, ~token_in_val),
            ("val", self._val, val, token_in_val),
        ):
            self.documents[name] += int(documents.sum())
            part = encoded.tokens[tokens]
            self.tokens[name] += len(part)
            writer.write(part)
