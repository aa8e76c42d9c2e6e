"""Windows, the shuffled order, the loaders and their state."""

import gc
import json
import os
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_engine.train.data import IGNORED_TARGET, Permutation, TokenDataset, TrainLoader, ValLoader, epoch_windows
from moe_engine.train.errors import InputError
from moe_engine.train.prepare import PrepareConfig, prepare
from moe_engine.train.shards import read_meta

BLOCK = 8


@pytest.fixture
def dataset(data_dir):
    return TokenDataset.open(data_dir, "train", BLOCK)


@pytest.fixture
def loader_of(dataset):
    """Makes training loaders and closes them after the test."""
    made = []

    def make(batch_size=2, **options):
        made.append(TrainLoader(dataset, batch_size, **options))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def error_of(folder, block_size):
    """The message of the InputError that opening the folder raises; always one line."""
    with pytest.raises(InputError) as caught:
        TokenDataset.open(folder, "train", block_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


def first_tokens(batch):
    """The first token of every row: it identifies the window."""
    return batch[0][:, 0].tolist()


# --- windows ----------------------------------------------------------------------------------------------------------


@given(tokens=st.lists(st.integers(0, 60), min_size=1, max_size=5), block_size=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_windows_lose_only_the_final_partial_one(tmp_path_factory, tokens, block_size, write_meta):
    folder = tmp_path_factory.mktemp("shards")
    write_meta(folder)
    for number, n in enumerate(tokens):
        np.save(folder / f"toy_train_{number}.npy", np.arange(100 * number, 100 * number + n, dtype=np.uint16))
    if max(tokens) <= block_size:
        assert f"--block_size {block_size}" in error_of(folder, block_size=block_size)
        return
    dataset = TokenDataset.open(folder, "train", block_size)
    inputs, targets = dataset.batch(range(dataset.num_windows))
    # every target position of every shard, once, up to the last whole window
    expected = [
        100 * number + i for number, n in enumerate(tokens) for i in range(1, 1 + (n - 1) // block_size * block_size)
    ]
    assert targets.ravel().tolist() == expected
    assert (targets == inputs + 1).all()  # tokens count upwards: shifted by exactly one, once
    assert inputs.dtype == targets.dtype == np.int64


def test_block_size_larger_than_every_shard(data_dir):
    assert error_of(data_dir, block_size=100) == (
        "--block_size 100: needs train shards of at least 101 tokens; the longest,"
        f" {data_dir / 'toy_train_000000.npy'}, has 100"
    )
    assert TokenDataset.open(data_dir, "train", 99).num_windows == 1


@pytest.mark.parametrize("block_size", [0, -1])
def test_block_size_too_small(data_dir, block_size):
    assert error_of(data_dir, block_size=block_size) == f"--block_size: expected at least 1, got {block_size}"


def test_short_shards_are_noted_once(data_dir, dataset):
    assert dataset.notes == []
    np.save(data_dir / "toy_train_000002.npy", np.zeros(0, np.uint16))
    np.save(data_dir / "toy_train_000003.npy", np.zeros(BLOCK, np.uint16))
    longer = TokenDataset.open(data_dir, "train", BLOCK)
    assert longer.num_windows == dataset.num_windows
    assert [len(shard.map()) for shard in longer.shards] == [100, 57, 0, BLOCK]
    (note,) = longer.notes
    assert "2 of 4 train shards have fewer than block_size + 1 = 9 tokens" in note and "toy_train_000002.npy" in note


@pytest.mark.parametrize("index", [-1, 19])
def test_window_outside(dataset, index):
    assert dataset.num_windows == 19
    with pytest.raises(IndexError, match=f"window {index} of 19"):
        dataset.window(index)


@pytest.mark.parametrize(("dtype", "bad"), [("uint16", 1000), ("uint32", 2**32 - 1), ("int32", -1), ("int64", 2**40)])
def test_token_outside_the_vocabulary(data_dir, dtype, bad):
    for path in data_dir.glob("*.npy"):
        np.save(path, np.load(path).astype(dtype))
    tokens = np.load(data_dir / "toy_train_000001.npy")
    tokens[30] = bad  # window 12 + 3, its seventh token; and a second one that must not be the one named
    tokens[31] = bad
    np.save(data_dir / "toy_train_000001.npy", tokens)
    dataset = TokenDataset.open(data_dir, "train", BLOCK)
    dataset.batch([0, 14, 16])
    with pytest.raises(InputError) as caught:
        dataset.batch([0, 15])
    assert str(caught.value) == (
        f"{data_dir / 'toy_train_000001.npy'}: token id {bad} at position 30 is outside the vocabulary of 1000"
        " (vocab_size in meta.json)"
    )


def test_largest_token_of_the_vocabulary_is_accepted(data_dir):
    np.save(data_dir / "toy_train_000000.npy", np.full(100, 999, np.uint16))
    assert TokenDataset.open(data_dir, "train", BLOCK).window(0).max() == 999


def test_fingerprint(data_dir, write_meta):
    def fingerprint(block_size=BLOCK):
        return TokenDataset.open(data_dir, "train", block_size).fingerprint

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    seen.append(fingerprint(BLOCK + 1))
    sizes = [{"file": "toy_train_000000.npy", "tokens": 100}, {"file": "toy_train_000001.npy", "tokens": 57}]
    write_meta(data_dir, shards=sizes)
    assert fingerprint() == seen[0]  # listing the same shards changes nothing
    sizes[0]["sha256"] = "0" * 64
    write_meta(data_dir, shards=sizes)
    seen.append(fingerprint())
    sizes[0]["sha256"] = "1" * 64
    write_meta(data_dir, shards=sizes)
    seen.append(fingerprint())
    write_meta(data_dir)
    np.save(data_dir / "toy_train_000001.npy", np.zeros(58, np.uint16))
    seen.append(fingerprint())
    (data_dir / "toy_train_000001.npy").rename(data_dir / "toy_train_000002.npy")
    seen.append(fingerprint())
    for path in data_dir.glob("*.npy"):
        np.save(path, np.load(path).astype(np.uint32))
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


def test_nothing_is_copied_but_the_batch(tmp_path, write_meta):
    """An 8 GB (sparse) file: opening it and reading a batch allocates no more than the batch and its order need."""
    write_meta(tmp_path, dtype="uint32")
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(8 * 2**30)
    dataset = TokenDataset.open(tmp_path, "train", 128)
    loader = TrainLoader(dataset, 4, prefetch=0)
    loader.next_batch()
    tracemalloc.start()
    TokenDataset.open(tmp_path, "train", 128)
    for _ in range(3):
        loader.next_batch()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.num_windows == (2**31 - 1) // 128
    assert peak < 300_000


def test_many_shards_do_not_hold_many_file_descriptors(tmp_path, write_meta):
    write_meta(tmp_path)
    for number in range(300):
        np.save(tmp_path / f"toy_train_{number:03d}.npy", np.full(2 * BLOCK, number, np.uint16))
    dataset = TokenDataset.open(tmp_path, "train", BLOCK)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for _ in range(2):
        assert dataset.batch(range(300))[0][:, 0].tolist() == list(range(300))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) - before <= 130


@pytest.mark.parametrize("format", ["npy", "bin"])
def test_what_prepare_writes(tmp_path, spec, format):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"Document {number}. " + "The cat sat on the mat. " * (number + 1))
    out = tmp_path / "out"
    options = {"tokenizer": spec, "shard_tokens": 2000, "val_fraction": 0.2, "workers": 1}
    recorded = prepare(PrepareConfig(out_dir=str(out), input=[str(tmp_path)], format=format, **options)).meta
    meta = read_meta(out)
    assert (meta.vocab_size, meta.eot, meta.dtype) == (recorded["vocab_size"], recorded["eot"], np.uint16)
    for split in ("train", "val"):
        dataset = TokenDataset.open(out, split, 16)
        assert dataset.num_tokens == recorded["tokens"][split]
        assert all(shard.sha256 for shard in dataset.shards) and not dataset.notes
        inputs, _ = dataset.batch(range(dataset.num_windows))
        assert (inputs == meta.eot).any()
    assert (len(TokenDataset.open(out, "train", 16).shards) > 1) == (format == "npy")


# --- the order --------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 600), seed=st.integers(), epoch=st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_permutation_is_a_bijection_and_repeatable(n, seed, epoch):
    image = Permutation(n, seed, epoch)(np.arange(n))
    assert sorted(image.tolist()) == list(range(n))
    again = Permutation(n, seed, epoch)
    assert [int(again([position])[0]) for position in range(min(n, 5))] == image[:5].tolist()


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_permutation_changes_with_seed_and_epoch(seed, epoch):
    def image(seed, epoch):
        return Permutation(200, seed, epoch)(np.arange(200)).tolist()

    images = [image(seed, epoch), image(seed + 1, epoch), image(seed, epoch + 1), image(seed + 1, epoch + 1)]
    assert len({tuple(i) for i in images}) == 4 and list(range(200)) not in images


@pytest.mark.parametrize("n", [2, 3, 7, 24])
def test_permutation_is_uniform(n):
    """Over 4000 epochs every value comes to every place equally often: within six standard deviations."""
    images = np.stack([Permutation(n, 1337, epoch)(np.arange(n)) for epoch in range(4000)])
    counts = np.stack([np.bincount(images[:, place], minlength=n) for place in range(n)])
    expected = 4000 / n
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected * (1 - 1 / n))


def test_permutation_scatters_neighbours():
    """Runs of the text must not survive: neighbouring places are as far apart as random ones (a third of n)."""
    image = Permutation(100_000, 1, 0)(np.arange(2000))
    assert 0.3 < np.abs(np.diff(image)).mean() / 100_000 < 0.37


def test_permutation_is_fixed_for_good():
    """A change here would change the order under every existing checkpoint."""
    assert Permutation(10, 1337, 0)(np.arange(10)).tolist() == [9, 0, 8, 4, 5, 3, 7, 6, 1, 2]
    assert Permutation(10**12, 1337, 3)([0, 10**12 - 1]).tolist() == [737025671591, 342697257855]


def test_permutation_of_a_trillion_needs_no_memory():
    tracemalloc.start()
    image = Permutation(10**12, 7, 0)(np.arange(10**12 - 1000, 10**12))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(image.tolist())) == 1000 and image.min() >= 0 and image.max() < 10**12
    assert image.max() > 9 * 10**11 and peak < 2**20


@pytest.mark.parametrize("n", [0, -3, 2**62])
def test_permutation_size_outside(n):
    with pytest.raises(ValueError, match="n: expected 1 <= n"):
        Permutation(n, 0, 0)


def test_epoch_windows_cross_ends_of_epochs():
    whole = epoch_windows(5, 3, 0, 17)
    assert [sorted(whole[i : i + 5].tolist()) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert epoch_windows(5, 3, 4, 9).tolist() == whole[4:13].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 25])  # 25 rows are more than an epoch of 19 windows
def test_every_window_once_per_epoch_over_ranks(dataset, loader_of, world_size, batch_size):
    loaders = [loader_of(batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    steps = -(-3 * dataset.num_windows // (batch_size * world_size))
    order = [first for _ in range(steps) for loader in loaders for first in first_tokens(loader.next_batch())]
    windows = sorted(int(dataset.window(i)[0]) for i in range(dataset.num_windows))
    epochs = [order[19 * e : 19 * (e + 1)] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [windows] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # the same sequence whatever the number of ranks
    single = loader_of(len(order))
    assert first_tokens(single.next_batch()) == order


def test_batches(loader_of):
    inputs, targets = loader_of(3).next_batch()
    assert inputs.shape == targets.shape == (3, BLOCK)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)


# --- state ------------------------------------------------------------------------------------------------------------


@given(data=st.data(), prefetch=st.sampled_from([0, 2]))
@settings(max_examples=40, deadline=None)
def test_resume_anywhere_also_with_other_ranks(tmp_path_factory, data, prefetch, write_meta):
    """Steps of 12 windows as ranks x batch x accumulation in any factorisation, changed at a checkpoint."""
    folder = tmp_path_factory.mktemp("data")
    write_meta(folder)
    np.save(folder / "toy_train_0.npy", np.arange(20 * BLOCK + 1, dtype=np.uint16))
    dataset = TokenDataset.open(folder, "train", BLOCK)
    shapes = [(r, b, 12 // (r * b)) for r in (1, 2, 3, 4) for b in (1, 2, 3, 6, 12) if 12 % (r * b) == 0]

    def run(shape, steps, state=None):
        ranks, batch_size, accumulation = shape
        loaders = [TrainLoader(dataset, batch_size, rank=r, world_size=ranks, prefetch=prefetch) for r in range(ranks)]
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(state)
        seen = []
        for _ in range(steps * accumulation):
            for loader in loaders:
                seen += first_tokens(loader.next_batch())
        states = [loader.state_dict() for loader in loaders]
        for loader in loaders:
            loader.close()
        assert all(s == states[0] for s in states)
        return seen, json.loads(json.dumps(states[0]))

    before, after = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 5))
    uninterrupted, _ = run(data.draw(st.sampled_from(shapes)), before + after)
    first, state = run(data.draw(st.sampled_from(shapes)), before)
    second, _ = run(data.draw(st.sampled_from(shapes)), after, state)
    assert first + second == uninterrupted
    assert set(state) == {"epoch", "window", "seed", "fingerprint"}
    assert (state["epoch"], state["window"]) == divmod(12 * before, 20)


def test_state_counts_what_was_consumed_not_what_was_read_ahead(loader_of):
    ahead, plain = loader_of(2, prefetch=4), loader_of(2, prefetch=0)
    for step in range(12):
        assert ahead.state_dict() == plain.state_dict()
        assert (ahead.state_dict()["epoch"], ahead.state_dict()["window"]) == divmod(2 * step, 19)
        assert torch.equal(ahead.next_batch()[0], plain.next_batch()[0])


def test_load_state_dict_goes_back(loader_of):
    loader = loader_of(2)
    state = loader.state_dict()
    first = [first_tokens(loader.next_batch()) for _ in range(5)]
    loader.load_state_dict(state)
    assert [first_tokens(loader.next_batch()) for _ in range(5)] == first


def test_state_of_another_run_is_refused(data_dir, loader_of):
    loader = loader_of(2, seed=5)
    loader.next_batch()
    state = loader.state_dict()
    other_block = TrainLoader(TokenDataset.open(data_dir, "train", BLOCK + 1), 2, seed=5)
    with pytest.raises(InputError, match=r"--seed 6: the checkpoint's data order was made with seed 5"):
        loader_of(2, seed=6).load_state_dict(state)
    with pytest.raises(InputError, match=r"--data_dir or --block_size 9: .*fingerprint"):
        other_block.load_state_dict(state)
    with pytest.raises(InputError, match="loader state: missing seed, window"):
        loader.load_state_dict({"epoch": 0, "fingerprint": state["fingerprint"]})
    for broken in ({"window": 19}, {"window": -1}, {"epoch": -1}):
        with pytest.raises(InputError, match="not within the 19 windows"):
            loader.load_state_dict(state | broken)
    assert loader.state_dict() == state  # a refused state changes nothing


# --- prefetch and faults ----------------------------------------------------------------------------------------------


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "train-loader"]


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("fault", ["vanishes", "shrinks"])
def test_shard_lost_during_the_run(data_dir, prefetch, fault):
    dataset = TokenDataset.open(data_dir, "train", BLOCK)
    loader = TrainLoader(dataset, 2, prefetch=prefetch)
    for _ in range(10):
        loader.next_batch()  # an epoch: both shards are mapped
    path = data_dir / "toy_train_000000.npy"
    content = path.read_bytes()
    if fault == "vanishes":
        path.unlink()
        expected = f"{path}: cannot be read any more"
    else:
        os.truncate(path, 150)
        expected = f"{path}: truncated: 100 tokens need 328 bytes, the file has 150"
    with pytest.raises(InputError, match=expected):
        for _ in range(10):
            loader.next_batch()
    state = loader.state_dict()
    with pytest.raises(InputError, match=expected):  # not a hang, nor a silent step over the batch
        loader.next_batch()
    assert loader.state_dict() == state
    path.write_bytes(content)
    loader.next_batch()
    assert loader.state_dict() != state
    loader.close()


def test_bad_token_arrives_with_its_batch_and_not_earlier(data_dir):
    """The fault is read ahead; the good batches before it are still delivered."""
    probe = TrainLoader(TokenDataset.open(data_dir, "train", BLOCK), 1, prefetch=0)
    fourth = [first_tokens(probe.next_batch()) for _ in range(4)][3][0]
    path = data_dir / ("toy_train_000000.npy" if fourth < 100 else "toy_train_000001.npy")
    tokens = np.load(path)
    position = fourth % 100 + 1
    tokens[position] = 1000
    np.save(path, tokens)
    loader = TrainLoader(TokenDataset.open(data_dir, "train", BLOCK), 1, prefetch=8)
    for _ in range(3):
        loader.next_batch()
    with pytest.raises(InputError, match=f"token id 1000 at position {position} is outside the vocabulary of 1000"):
        loader.next_batch()
    assert loader.state_dict()["window"] == 3
    loader.close()


def test_any_fault_of_the_thread_reaches_the_caller(dataset, loader_of, monkeypatch):
    def fail(indices):
        raise KeyboardInterrupt("in the thread")

    monkeypatch.setattr(dataset, "batch", fail)
    with pytest.raises(KeyboardInterrupt, match="in the thread"):
        loader_of(2).next_batch()


def test_reads_ahead_up_to_the_depth_and_no_further(dataset, loader_of, monkeypatch):
    reads = []
    batch = dataset.batch
    monkeypatch.setattr(dataset, "batch", lambda indices: reads.append(1) or batch(indices))
    loader = loader_of(2, prefetch=3)
    assert not reads  # nothing is read before it is asked for: a state may still be loaded
    loader.next_batch()
    assert wait_until(lambda: len(reads) == 5)  # one consumed, three waiting, one in the thread's hand
    time.sleep(0.05)
    assert len(reads) == 5


def test_wait_seconds_is_the_time_of_the_read(dataset, loader_of, monkeypatch):
    batch = dataset.batch

    def slow(indices):
        time.sleep(0.1)
        return batch(indices)

    monkeypatch.setattr(dataset, "batch", slow)
    loader = loader_of(2, prefetch=0)
    assert loader.wait_seconds == 0.0
    loader.next_batch()
    assert 0.1 <= loader.wait_seconds < 1
    ahead = loader_of(2, prefetch=2)
    ahead.next_batch()
    assert 0.1 <= ahead.wait_seconds < 1
    time.sleep(0.5)  # the next two are ready by now
    ahead.next_batch()
    assert ahead.wait_seconds < 0.1


def test_close_stops_the_thread_and_can_be_undone(loader_of):
    before = len(reader_threads())
    loader = loader_of(2)
    loader.next_batch()
    assert len(reader_threads()) == before + 1 and reader_threads()[-1].daemon
    loader.close()
    loader.close()
    assert len(reader_threads()) == before
    state = loader.state_dict()
    after = first_tokens(loader.next_batch())
    again = loader_of(2)
    again.load_state_dict(state)
    assert first_tokens(again.next_batch()) == after


def test_forgotten_loader_leaves_no_thread(dataset):
    before = len(reader_threads())
    loader = TrainLoader(dataset, 2)
    loader.next_batch()
    del loader
    gc.collect()
    assert wait_until(lambda: len(reader_threads()) == before)


@pytest.mark.parametrize("batch_size", [0, -2])
def test_batch_size_too_small(dataset, batch_size):
    for make in (lambda: TrainLoader(dataset, batch_size), lambda: ValLoader(dataset, batch_size, 1)):
        with pytest.raises(InputError, match=f"--batch_size: expected at least 1, got {batch_size}"):
            make()


def test_impossible_ranks_and_depths(dataset):
    with pytest.raises(ValueError, match=r"rank: expected 0 <= rank < world_size = 2, got 2"):
        TrainLoader(dataset, 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"rank: expected 0 <= rank < world_size = 2, got -1"):
        ValLoader(dataset, 1, 1, rank=-1, world_size=2)
    with pytest.raises(ValueError, match="prefetch: expected at least 0, got -1"):
        TrainLoader(dataset, 1, prefetch=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_the_gpu(dataset, loader_of):
    on_gpu, on_cpu = loader_of(4, device="cuda"), loader_of(4)
    for _ in range(10):
        for there, here in zip(on_gpu.next_batch(), on_cpu.next_batch(), strict=True):
            assert there.device == torch.device("cuda", torch.cuda.current_device())
            assert torch.equal(there.cpu(), here)
    assert on_gpu._reader.get()[0].is_pinned()


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_batches", [1, 3, 100])
def test_validation_windows_are_the_same_for_every_pass_and_world_size(data_dir, world_size, num_batches):
    dataset = TokenDataset.open(data_dir, "val", BLOCK)  # 12 windows
    count = min(2 * num_batches, 12)
    expected = [500 + BLOCK * (i * 12 // count) for i in range(count)]
    ranks = [ValLoader(dataset, 2, num_batches, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(2):
        seen, lengths = [], set()
        for loader in ranks:
            batches = list(loader)
            lengths.add(len(batches))
            assert len(batches) == len(loader)
            for inputs, targets in batches:
                assert inputs.shape == targets.shape == (2, BLOCK)
                assert inputs.dtype == targets.dtype == torch.int64
                used = (targets != IGNORED_TARGET).all(dim=1)
                assert torch.equal(targets[used], inputs[used] + 1)
                assert (targets[~used] == IGNORED_TARGET).all() and (inputs[~used] == 0).all()
                seen += inputs[used, 0].tolist()
        assert sorted(seen) == expected
        assert len(lengths) == 1
        assert lengths == {-(-count // (2 * world_size))}  # no more padding than needed


def test_validation_of_bad_tokens(data_dir):
    np.save(data_dir / "toy_val_000000.npy", np.full(100, 1000, np.uint16))
    with pytest.raises(InputError, match="token id 1000 at position 0 is outside the vocabulary"):
        next(iter(ValLoader(TokenDataset.open(data_dir, "val", BLOCK), 2, 1)))


def test_validation_without_batches(dataset):
    with pytest.raises(InputError, match="--eval_iters: expected at least 1, got 0"):
        ValLoader(dataset, 2, 0)
