"""From token shards to batches: the windows of a split, their shuffled order, two loaders.

A *window* is `block_size + 1` consecutive tokens of one shard; windows start every `block_size` tokens, so a shard of
n tokens has `(n - 1) // block_size` of them and only its final partial window is never read. The inputs of a window
are its first `block_size` tokens and the targets its last: targets are shifted by one, here and nowhere else.

An *order position* p counts windows since the start of training: it stands for place `p % W` of the permutation of
epoch `p // W`, where W is the number of windows. In one micro-step rank r of R reads positions
`[cursor + r·B, cursor + (r+1)·B)` and the cursor then moves by R·B. The order knows nothing of R, and the cursor is
all the state there is: a run resumes exactly, also with another number of ranks.
"""

import hashlib
import json
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from moe_engine.train.errors import InputError
from moe_engine.train.shards import Meta, Shard, Split, find_shards, read_meta, read_shard

Batch = tuple[torch.Tensor, torch.Tensor]

IGNORED_TARGET = -1
"""Target of a padding row; the loss leaves it out."""

_MAX_OPEN_SHARDS = 128  # each mapping holds a file descriptor, and 1024 is a common limit on those


class TokenDataset:
    """The windows of one split. Shards are mapped when first read; nothing is copied but the batch.

    Attributes:
        num_tokens, num_windows: totals over the shards.
        fingerprint: changes with any shard's name, length, dtype or recorded checksum, and with `block_size`.
        notes: what the user should be told though it is no error (shards too short for a single window).
    """

    def __init__(self, meta: Meta, split: Split, block_size: int, shards: Sequence[Shard]):
        """`shards` in the order in which windows are numbered. Raises InputError when no shard holds a window."""
        if block_size < 1:
            raise InputError(f"--block_size: expected at least 1, got {block_size}")
        self.meta, self.split, self.block_size, self.shards = meta, split, block_size, tuple(shards)
        windows = np.array([max(shard.tokens - 1, 0) // block_size for shard in shards], dtype=np.int64)
        self._last = np.cumsum(windows)  # number of windows up to and including each shard
        self._first = self._last - windows
        self.num_tokens = sum(shard.tokens for shard in shards)
        self.num_windows = int(self._last[-1])
        if self.num_windows == 0:
            longest = max(shards, key=lambda shard: shard.tokens)
            raise InputError(
                f"--block_size {block_size}: needs {split} shards of at least {block_size + 1} tokens;"
                f" the longest, {longest.path}, has {longest.tokens}"
            )
        self.notes: list[str] = []
        if short := [shard for shard, n in zip(shards, windows, strict=True) if n == 0]:
            self.notes.append(
                f"{len(short)} of {len(shards)} {split} shards have fewer than block_size + 1 = {block_size + 1} tokens"
                f" and are not read (first: {short[0].path}, {short[0].tokens} tokens)"
            )
        identity = [block_size, [(s.name, s.tokens, s.dtype.str, s.sha256) for s in shards]]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
        self._maps: dict[int, np.ndarray] = {}  # shard number -> tokens, least recently used first
        self._lock = threading.Lock()

    @classmethod
    def open(cls, data_dir: str | os.PathLike, split: Split, block_size: int) -> "TokenDataset":
        """Finds and checks a split's shards. Raises InputError for everything that can be wrong with them."""
        meta = read_meta(data_dir)
        names = find_shards(data_dir, split, meta)
        return cls(meta, split, block_size, [read_shard(data_dir, name, meta) for name in names])

    def window(self, index: int) -> np.ndarray:
        """Window `index` as a view `(block_size + 1,)` of the shard, in the shard's dtype.

        Raises InputError when the shard has gone or shrunk, or holds a token outside the vocabulary.
        """
        number, start = self._place(index)
        tokens = self._tokens(number)[start : start + self.block_size + 1]
        # Checked here because an embedding lookup outside its table is a device assert that names nothing.
        if tokens.max() >= self.meta.vocab_size or tokens.min() < 0:
            position = int(np.argmax((tokens >= self.meta.vocab_size) | (tokens < 0)))
            raise InputError(
                f"{self.shards[number].path}: token id {tokens[position]} at position {start + position} is outside"
                f" the vocabulary of {self.meta.vocab_size} (vocab_size in meta.json)"
            )
        return tokens

    def locate(self, index: int) -> tuple[Shard, int]:
        """The shard of window `index`, and the position in it of the window's first token."""
        number, start = self._place(index)
        return self.shards[number], start

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.num_windows:
            raise IndexError(f"window {index} of {self.num_windows}")
        number = int(np.searchsorted(self._last, index, side="right"))
        return number, (index - int(self._first[number])) * self.block_size

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the given windows, both `(len(indices), block_size)` int64. Raises as `window`."""
        inputs = np.empty((len(indices), self.block_size), dtype=np.int64)
        targets = np.empty_like(inputs)
        for row, index in enumerate(indices):
            window = self.window(int(index))
            inputs[row] = window[:-1]
            targets[row] = window[1:]
        return inputs, targets

    def _tokens(self, number: int) -> np.ndarray:
        shard = self.shards[number]
        shard.check_size()
        with self._lock:
            tokens = self._maps.pop(number, None)
            self._maps[number] = shard.map() if tokens is None else tokens
            if len(self._maps) > _MAX_OPEN_SHARDS:
                del self._maps[next(iter(self._maps))]
            return self._maps[number]


class Permutation:
    """A bijection on `range(n)` chosen by (seed, epoch) that needs no memory proportional to n.

    A Feistel network (Luby, Rackoff 1988) on pairs (left, right) of Z_a x Z_b with a·b just over n, addition in place
    of xor, and cycle walking: a value that lands outside `range(n)` is sent through again (Black, Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains", whose generalised Feistel cipher this is).
    """

    ROUNDS = 8

    def __init__(self, n: int, seed: int, epoch: int):
        if not 1 <= n < 2**62:
            raise ValueError(f"n: expected 1 <= n < 2**62, got {n}")
        self.n = n
        self._columns = math.isqrt(n - 1) + 1
        self._rows = -(-n // self._columns)
        # Keys from a hash: neighbouring seeds and epochs share nothing, and no library's generator can change them.
        key = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * self.ROUNDS).digest()
        self._keys = np.frombuffer(key, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: np.ndarray | Sequence[int]) -> np.ndarray:
        """Images of `positions`, each in `range(n)`, as int64 of the same length."""
        values = self._encipher(np.asarray(positions, dtype=np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._encipher(values[outside])
        return values.astype(np.int64)

    def _encipher(self, values: np.ndarray) -> np.ndarray:
        columns, rows = np.uint64(self._columns), np.uint64(self._rows)
        left, right = values // columns, values % columns
        for step in range(0, self.ROUNDS, 2):
            left = (left + _mix(right + self._keys[step]) % rows) % rows
            right = (right + _mix(left + self._keys[step + 1]) % columns) % columns
        return left * columns + right


class TrainLoader:
    """Endless shuffled batches of one rank, read ahead by a thread. See the module's docstring for the order.

    `wait_seconds` is the time that the last `next_batch()` waited for data.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 1337,
        device: str | torch.device = "cpu",
        prefetch: int = 2,
    ):
        """`prefetch` is the number of batches kept ready; 0 reads in `next_batch()` itself, without a thread."""
        _check_batching(batch_size, rank, world_size)
        if prefetch < 0:
            raise ValueError(f"prefetch: expected at least 0, got {prefetch}")
        self.dataset, self.batch_size, self.seed, self.wait_seconds = dataset, batch_size, seed, 0.0
        self._device, self._prefetch = _exact_device(device), prefetch
        self._cursor, self._stride = 0, batch_size * world_size  # the cursor: the order position consumed so far
        self._read = partial(_read_training_batch, dataset, seed, rank * batch_size, batch_size, self._device)
        self._reader: _Prefetcher | None = None
        self._stop_reader: weakref.finalize | None = None

    def next_batch(self) -> Batch:
        """Inputs and targets `(batch_size, block_size)`, int64, on the loader's device.

        Raises InputError for what went wrong while reading this very batch; calling again tries the same batch again.
        """
        start = time.perf_counter()
        if self._prefetch == 0:
            batch = self._read(self._cursor)
        else:
            if self._reader is None:
                self._reader = _Prefetcher(self._read, self._cursor, self._stride, self._prefetch)
                # Runs at the latest at interpreter exit, where a thread inside a torch call would abort the process.
                self._stop_reader = weakref.finalize(self, self._reader.close)
            try:
                batch = self._reader.get()
            except BaseException:
                self.close()
                raise
        self.wait_seconds = time.perf_counter() - start
        self._cursor += self._stride
        return _to_device(batch, self._device)

    def read_by(self, rank: int, micro_steps_ago: int) -> tuple[int, np.ndarray]:
        """What a rank read in one micro-step: the first order position, and the windows `(batch_size,)` int64.

        Args:
            rank: any of the ranks.
            micro_steps_ago: 1 is the last one.
        """
        position = self._cursor - micro_steps_ago * self._stride + rank * self.batch_size
        return position, epoch_windows(self.dataset.num_windows, self.seed, position, self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts: `epoch`, `window` (place in the epoch's order), `seed`, `fingerprint`.

        Counts the windows that all ranks have consumed, never what was only read ahead.
        """
        epoch, window = divmod(self._cursor, self.dataset.num_windows)
        return {"epoch": epoch, "window": window, "seed": self.seed, "fingerprint": self.dataset.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of the same data, block size and seed; InputError names what differs."""
        if missing := {"epoch", "window", "seed", "fingerprint"} - set(state):
            raise InputError(f"loader state: missing {', '.join(sorted(missing))}")
        if state["seed"] != self.seed:
            raise InputError(f"--seed {self.seed}: the checkpoint's data order was made with seed {state['seed']}")
        if state["fingerprint"] != self.dataset.fingerprint:
            raise InputError(
                f"--data_dir or --block_size {self.dataset.block_size}: the checkpoint was made with other windows"
                f" (fingerprint {state['fingerprint']}, here {self.dataset.fingerprint})"
            )
        if state["epoch"] < 0 or not 0 <= state["window"] < self.dataset.num_windows:
            raise InputError(
                f"loader state: epoch {state['epoch']}, window {state['window']} is not within the"
                f" {self.dataset.num_windows} windows of an epoch"
            )
        self.close()
        self._cursor = state["epoch"] * self.dataset.num_windows + state["window"]

    def close(self) -> None:
        """Stops the thread. A later `next_batch()` starts a new one at the same place."""
        if self._stop_reader is not None:
            self._stop_reader()
            self._reader = self._stop_reader = None


class ValLoader:
    """The same windows on every pass, evenly spaced over the split, whatever the number of ranks.

    `min(num_batches * batch_size, num_windows)` windows are dealt out over the ranks. Every rank yields
    `len(loader)` batches; rows without a window have input 0 and target `IGNORED_TARGET`.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        num_batches: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
    ):
        _check_batching(batch_size, rank, world_size)
        if num_batches < 1:
            raise InputError(f"--eval_iters: expected at least 1, got {num_batches}")
        self.dataset, self.batch_size = dataset, batch_size
        self._device = _exact_device(device)
        count = min(num_batches * batch_size, dataset.num_windows)
        self._windows = (np.arange(count, dtype=np.int64) * dataset.num_windows // count)[rank::world_size]
        self._batches = -(-count // (batch_size * world_size))

    def __len__(self) -> int:
        """Batches per pass, the same on every rank."""
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        """Inputs and targets `(batch_size, block_size)`, int64, on the loader's device. Raises as `next_batch`."""
        shape = (self.batch_size, self.dataset.block_size)
        for number in range(self._batches):
            windows = self._windows[number * self.batch_size : (number + 1) * self.batch_size]
            inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED_TARGET, np.int64)
            inputs[: len(windows)], targets[: len(windows)] = self.dataset.batch(windows)
            yield _to_device(_to_host_tensors(inputs, targets, self._device), self._device)


class _Prefetcher:
    """A daemon thread that keeps `depth` results of `read(cursor)` ready, the cursor moving by `stride`."""

    def __init__(self, read: Callable[[int], Batch], cursor: int, stride: int, depth: int):
        self._read, self._stride = read, stride
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(cursor,), name="train-loader", daemon=True)
        self._thread.start()

    def _run(self, cursor: int) -> None:
        while not self._stop.is_set():
            try:
                result: Batch | BaseException = self._read(cursor)
            except BaseException as error:  # whatever it is, the consumer must hear of it rather than wait for ever
                result = error
            self._queue.put(result)
            if isinstance(result, BaseException):
                return
            cursor += self._stride

    def get(self) -> Batch:
        """The next result; raises what reading it raised, after which there are no more."""
        result = self._queue.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        self._stop.set()
        while not self._queue.empty():  # makes room for a thread that waits to put its last result
            self._queue.get_nowait()
        self._thread.join(timeout=5)  # a read that hangs (a dead network disk) must not hang the exit too


def epoch_windows(num_windows: int, seed: int, position: int, count: int) -> np.ndarray:
    """The windows at order positions `[position, position + count)`, `(count,)` int64, across ends of epochs."""
    parts = []
    while count > 0:
        epoch, first = divmod(position, num_windows)
        taken = min(count, num_windows - first)
        parts.append(Permutation(num_windows, seed, epoch)(np.arange(first, first + taken)))
        position, count = position + taken, count - taken
    return np.concatenate(parts)


def _read_training_batch(
    dataset: TokenDataset, seed: int, lead: int, batch_size: int, device: torch.device, cursor: int
) -> Batch:
    """A rank's batch in host memory; `lead` is the distance of its first row from the cursor."""
    windows = epoch_windows(dataset.num_windows, seed, cursor + lead, batch_size)
    return _to_host_tensors(*dataset.batch(windows), device)


def _to_host_tensors(inputs: np.ndarray, targets: np.ndarray, device: torch.device) -> Batch:
    batch = torch.from_numpy(inputs), torch.from_numpy(targets)
    if device.type != "cuda":
        return batch
    with torch.cuda.device(device):  # a new thread stands on device 0, and pinning would make a context there
        return batch[0].pin_memory(), batch[1].pin_memory()


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)


def _exact_device(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_batching(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"--batch_size: expected at least 1, got {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 <= rank < world_size = {world_size}, got {rank}")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit. Wraps."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
