"""Reading shards, the shuffled order, the loaders and their state."""

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

from moe_engine.train.data import (
    IGNORED_TARGET,
    Permutation,
    TokenDataset,
    TrainLoader,
    ValLoader,
    epoch_windows,
    read_meta,
)
from moe_engine.train.errors import InputError
from moe_engine.train.prepare import PrepareConfig, prepare
from moe_engine.train.tokenizer import load_tokenizer

BLOCK = 8


def write_meta(folder, **changes):
    """The guide's three keys, changed or (with ...) removed."""
    meta = {"tokenizer": "gpt2", "vocab_size": 1000, "dataset": "toy"} | changes
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if v is not ...}))


def listing(**tokens):
    """The shards entry of meta.json for names given as `toy_train_0=100`."""
    return [{"file": f"{name}.npy", "tokens": n} for name, n in tokens.items()]


@pytest.fixture
def folder(tmp_path):
    """Two training shards and one validation shard; token i of the data set is i, so that order can be read off."""
    write_meta(tmp_path)
    np.save(tmp_path / "toy_train_000000.npy", np.arange(0, 100, dtype=np.uint16))  # 12 windows, 3 tokens in the tail
    np.save(tmp_path / "toy_train_000001.npy", np.arange(100, 157, dtype=np.uint16))  # 7 windows, no tail
    np.save(tmp_path / "toy_val_000000.npy", np.arange(500, 600, dtype=np.uint16))
    return tmp_path


@pytest.fixture
def dataset(folder):
    return TokenDataset.open(folder, "train", BLOCK)


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


def error_of(folder, split="train", block_size=BLOCK):
    """The message of the InputError that opening the folder raises; always one line."""
    with pytest.raises(InputError) as caught:
        TokenDataset.open(folder, split, block_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


def first_tokens(batch):
    """The first token of every row: it identifies the window."""
    return batch[0][:, 0].tolist()


# --- meta.json --------------------------------------------------------------------------------------------------------


def test_guide_meta_takes_dtype_from_the_npy_header(folder):
    meta = read_meta(folder)
    assert (meta.tokenizer, meta.vocab_size, meta.dataset) == ("gpt2", 1000, "toy")
    assert meta.dtype == np.uint16 and meta.eot is None and meta.shards is None


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32), (200000, np.uint32)])
def test_guide_meta_takes_dtype_of_bin_from_the_vocabulary(tmp_path, vocab_size, dtype):
    write_meta(tmp_path, vocab_size=vocab_size)
    np.arange(100, dtype=dtype).tofile(tmp_path / "train.bin")
    assert read_meta(tmp_path).dtype == dtype
    assert TokenDataset.open(tmp_path, "train", BLOCK).num_tokens == 100


def test_own_meta(folder):
    shards = [
        {"file": "toy_train_000000.npy", "split": "train", "tokens": 100, "sha256": "0" * 64},
        {"file": "toy_val_000000.npy", "tokens": 100},
    ]
    write_meta(folder, dtype="uint16", eot=0, shards=shards, documents=3, tokens={"train": 100, "val": 100})
    meta = read_meta(folder)
    assert meta.dtype == np.uint16 and meta.eot == 0
    assert meta.shards["toy_train_000000.npy"].sha256 == "0" * 64
    assert meta.shards["toy_val_000000.npy"].sha256 is None
    # what meta.json lists is what is read: the second training shard is there but not listed
    assert TokenDataset.open(folder, "train", BLOCK).num_tokens == 100


BAD_META = {
    "no tokenizer": ({"tokenizer": ...}, "tokenizer must be a non-empty string, got None"),
    "tokenizer of wrong type": ({"tokenizer": 3}, "tokenizer must be a non-empty string, got 3"),
    "no dataset": ({"dataset": ...}, "dataset must be a non-empty string"),
    "no vocab_size": ({"vocab_size": ...}, "vocab_size must be a whole number from 1 to 4294967296, got None"),
    "vocab_size zero": ({"vocab_size": 0}, "vocab_size must be a whole number"),
    "vocab_size text": ({"vocab_size": "1000"}, "vocab_size must be a whole number from 1 to 4294967296, got '1000'"),
    "vocab_size float": ({"vocab_size": 1000.0}, "vocab_size must be a whole number"),
    "vocab_size true": ({"vocab_size": True}, "vocab_size must be a whole number"),
    "eot outside the vocabulary": ({"eot": 1000}, "eot must be a whole number from 0 to 999, got 1000"),
    "dtype unknown": ({"dtype": "float32"}, "dtype must be one of uint8, uint16"),
    "dtype no text": ({"dtype": [2]}, "dtype must be one of uint8, uint16"),
    "shards an object": ({"shards": {"a_train_0.npy": 7}}, "shards must be a list of objects with file and tokens"),
    "shard entry a name": ({"shards": ["a_train_0.npy"]}, "shards must be a list of objects with file and tokens"),
    "shard without file": ({"shards": [{"tokens": 1}]}, "file must be a non-empty string, got None"),
    "shard without tokens": (
        {"shards": [{"file": "a_train_0.npy"}]},
        "a_train_0.npy: tokens must be a whole number of",
    ),
    "absolute path": ({"shards": listing(**{"/a_train_0": 1})}, "'/a_train_0.npy' must be a path inside"),
    "path that leaves": ({"shards": listing(**{"b/../../a_train_0": 1})}, "must be a path inside the data folder"),
    "path with NUL": ({"shards": listing(**{"a_train_\0": 1})}, "must be a path inside the data folder"),
    "name of no split": ({"shards": listing(a_test_0=1)}, "'a_test_0.npy' is neither *_train_*.npy"),
    "listed twice": ({"shards": 2 * listing(a_train_0=1)}, "a_train_0.npy is listed twice"),
    "other split": (
        {"shards": [{"file": "a_train_0.npy", "split": "val", "tokens": 1}]},
        "a_train_0.npy has split 'val', which its name contradicts",
    ),
    "bad sha256": (
        {"shards": [{"file": "a_train_0.npy", "tokens": 1, "sha256": "x"}]},
        "a_train_0.npy: sha256 must be 64 hexadecimal digits",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), BAD_META.values(), ids=BAD_META.keys())
def test_bad_meta_values(folder, changes, expected):
    write_meta(folder, **changes)
    message = error_of(folder)
    assert str(folder / "meta.json") in message and expected in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "expected a JSON object, got list"),
    ],
)
def test_meta_that_is_no_json_object(folder, content, expected):
    (folder / "meta.json").write_bytes(content)
    message = error_of(folder)
    assert str(folder / "meta.json") in message and expected in message


def test_meta_missing(folder):
    (folder / "meta.json").unlink()
    assert f"{folder / 'meta.json'}: missing; expected a JSON object with tokenizer" in error_of(folder)


def test_meta_is_a_folder(folder):
    (folder / "meta.json").unlink()
    (folder / "meta.json").mkdir()
    assert f"{folder / 'meta.json'}: cannot be read" in error_of(folder)


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", ">u2"])
def test_build_nanogpt_shards(tmp_path, dtype):
    write_meta(tmp_path)
    for number in (2, 1):  # read in the order of their names
        tokens = np.arange(100 * number, 100 * number + 50, dtype=dtype)
        np.save(tmp_path / f"edufineweb_train_{number:06d}.npy", tokens)
    dataset = TokenDataset.open(tmp_path, "train", 10)
    assert (dataset.num_tokens, dataset.num_windows) == (100, 8)
    assert [int(dataset.window(i)[0]) for i in range(8)] == [100, 110, 120, 130, 200, 210, 220, 230]


def test_bin_files(tmp_path):
    write_meta(tmp_path, dtype="uint32")
    np.arange(50, dtype=np.uint32).tofile(tmp_path / "train.bin")
    np.arange(50, 100, dtype=np.uint32).tofile(tmp_path / "val.bin")
    assert TokenDataset.open(tmp_path, "train", 10).window(3).tolist() == list(range(30, 41))
    assert TokenDataset.open(tmp_path, "val", 10).window(0).tolist() == list(range(50, 61))


@pytest.mark.parametrize("format", ["npy", "bin"])
def test_what_prepare_writes(tmp_path, format):
    try:
        load_tokenizer("o200k_base:1024")
    except InputError as error:
        pytest.skip(str(error))  # a host without the ranks and without a network
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"Document {number}. " + "The cat sat on the mat. " * (number + 1))
    out = tmp_path / "out"
    options = {"tokenizer": "o200k_base:1024", "shard_tokens": 2000, "val_fraction": 0.2, "workers": 1}
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


def test_npy_format_version_2(folder):
    with open(folder / "toy_train_000001.npy", "wb") as file:
        np.lib.format.write_array(file, np.arange(100, 157, dtype=np.uint16), version=(2, 0))
    assert TokenDataset.open(folder, "train", BLOCK).window(12).tolist() == list(range(100, 109))


def test_split_is_the_last_word_of_the_name(tmp_path):
    """`*_val_*` alone would take the training shards of a data set called my_val_set for validation."""
    write_meta(tmp_path)
    np.save(tmp_path / "my_val_set_train_0.npy", np.arange(0, 20, dtype=np.uint16))
    np.save(tmp_path / "my_val_set_val_0.npy", np.arange(20, 60, dtype=np.uint16))
    np.save(tmp_path / "._my_val_set_val_0.npy", np.zeros(5))  # what some file systems leave beside a file
    assert TokenDataset.open(tmp_path, "train", BLOCK).num_tokens == 20
    assert TokenDataset.open(tmp_path, "val", BLOCK).num_tokens == 40


def test_data_dir_missing(tmp_path):
    assert error_of(tmp_path / "nowhere") == f"--data_dir {tmp_path / 'nowhere'}: no such folder"


def test_data_dir_not_a_folder(folder):
    assert error_of(folder / "meta.json") == f"--data_dir {folder / 'meta.json'}: not a folder"


def test_data_dir_empty(tmp_path):
    assert f"--data_dir {tmp_path}: the folder is empty" in error_of(tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_files_of_a_split(folder, split):
    for path in folder.glob(f"*_{split}_*"):
        path.unlink()
    assert f"--data_dir {folder}: no {split} files; expected *_{split}_*.npy or {split}.bin" in error_of(folder, split)


def test_no_listed_files_of_a_split(folder):
    write_meta(folder, shards=listing(toy_train_000000=100))
    assert f"no val files; expected *_val_*.npy or val.bin, and {folder / 'meta.json'} lists neither" in error_of(
        folder, "val"
    )


def test_both_formats(folder):
    np.arange(50, dtype=np.uint16).tofile(folder / "train.bin")
    assert "both train.bin and *_train_*.npy are present" in error_of(folder)
    write_meta(folder, shards=[{"file": "train.bin", "tokens": 50}])  # meta.json decides
    assert TokenDataset.open(folder, "train", BLOCK).num_tokens == 50
    write_meta(folder, shards=[{"file": "train.bin", "tokens": 50}, *listing(toy_train_000000=100)])
    assert TokenDataset.open(folder, "train", BLOCK).num_tokens == 150


def test_listed_shard_missing(folder):
    write_meta(folder, shards=listing(toy_train_000000=100, toy_train_000007=100))
    assert error_of(folder) == f"{folder / 'toy_train_000007.npy'}: missing, but listed in meta.json"


@pytest.mark.parametrize("listed", [99, 101])
def test_listed_shard_of_other_length(folder, listed):
    write_meta(folder, shards=listing(toy_train_000000=listed))
    assert error_of(folder) == f"{folder / 'toy_train_000000.npy'}: meta.json lists {listed} tokens, the file has 100"


def test_truncated_npy(folder):
    path = folder / "toy_train_000001.npy"
    os.truncate(path, path.stat().st_size - 1)
    assert error_of(folder) == f"{path}: truncated: 57 tokens need 242 bytes, the file has 241"


def test_huge_promise_in_npy_header(folder):
    path = folder / "toy_train_000001.npy"
    path.write_bytes(path.read_bytes().replace(b"(57,), }              ", b"(5700000000000000000,),}"))
    assert f"{path}: truncated: 5700000000000000000 tokens" in error_of(folder)


@pytest.mark.parametrize("content", [b"", b"\x93NUM", b"PK\x03\x04" + bytes(200), b"\x93NUMPY\x07\x00" + bytes(200)])
def test_not_an_npy(folder, content):
    (folder / "toy_train_000001.npy").write_bytes(content)
    assert f"{folder / 'toy_train_000001.npy'}: not a readable .npy file" in error_of(folder)


def test_first_shard_not_an_npy(folder):
    """The first shard's header is also where read_meta takes the dtype from."""
    (folder / "toy_train_000000.npy").write_bytes(b"text")
    assert f"{folder / 'toy_train_000000.npy'}: not a readable .npy file" in error_of(folder)


def test_shard_is_a_folder(folder):
    for name in ("toy_train_000000.npy", "toy_train_000001.npy"):
        (folder / name).unlink()
        (folder / name).mkdir()
        assert f"{folder / name}: cannot be read" in error_of(folder)
        (folder / name).rmdir()
        np.save(folder / name, np.zeros(20, np.uint16))


@pytest.mark.filterwarnings("ignore")
def test_damaged_npy_headers_never_escape_as_another_error(folder):
    path = folder / "toy_train_000000.npy"
    good, rng = path.read_bytes(), np.random.default_rng(0)
    outcomes = set()
    for _ in range(1500):
        damaged = bytearray(good)
        for _ in range(rng.integers(1, 6)):
            damaged[rng.integers(0, 128)] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            TokenDataset.open(folder, "train", BLOCK)
            outcomes.add("read")
        except InputError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_header_with_keys_that_cannot_be_sorted(folder):
    """numpy itself raises TypeError here."""
    path = folder / "toy_train_000000.npy"
    path.write_bytes(path.read_bytes().replace(b"'fortran_order'", b"b'ortran_order'"))
    assert f"{path}: not a readable .npy file" in error_of(folder)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((5, 20), np.uint16), "expected a one-dimensional array of tokens, got shape (5, 20)"),
        (np.uint16(3), "expected a one-dimensional array of tokens, got shape ()"),
        (np.zeros(100, np.float32), "expected integer tokens (uint8, uint16"),
        (np.zeros(100, bool), "got dtype bool"),
        (np.zeros(100, object), "got dtype object"),
        (np.zeros(100, np.uint32), "expected dtype uint16 (from meta.json or the first shard), got uint32"),
    ],
)
def test_npy_of_wrong_kind(folder, array, expected):
    np.save(folder / "toy_train_000001.npy", array, allow_pickle=True)
    message = error_of(folder)
    assert str(folder / "toy_train_000001.npy") in message and expected in message


def test_bin_of_broken_length(tmp_path):
    write_meta(tmp_path, vocab_size=200000)
    (tmp_path / "train.bin").write_bytes(bytes(4 * 100 + 2))
    assert f"{tmp_path / 'train.bin'}: 402 bytes is not a whole number of uint32 tokens" in error_of(tmp_path)


# --- windows ----------------------------------------------------------------------------------------------------------


@given(tokens=st.lists(st.integers(0, 60), min_size=1, max_size=5), block_size=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_windows_lose_only_the_final_partial_one(tmp_path_factory, tokens, block_size):
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


def test_block_size_larger_than_every_shard(folder):
    assert error_of(folder, block_size=100) == (
        f"--block_size 100: needs train shards of at least 101 tokens; the longest, {folder / 'toy_train_000000.npy'},"
        " has 100"
    )
    assert TokenDataset.open(folder, "train", 99).num_windows == 1


@pytest.mark.parametrize("block_size", [0, -1])
def test_block_size_too_small(folder, block_size):
    assert error_of(folder, block_size=block_size) == f"--block_size: expected at least 1, got {block_size}"


def test_short_shards_are_noted_once(folder, dataset):
    assert dataset.notes == []
    np.save(folder / "toy_train_000002.npy", np.zeros(0, np.uint16))
    np.save(folder / "toy_train_000003.npy", np.zeros(BLOCK, np.uint16))
    longer = TokenDataset.open(folder, "train", BLOCK)
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
def test_token_outside_the_vocabulary(folder, dtype, bad):
    for path in folder.glob("*.npy"):
        np.save(path, np.load(path).astype(dtype))
    tokens = np.load(folder / "toy_train_000001.npy")
    tokens[30] = bad  # window 12 + 3, its seventh token; and a second one that must not be the one named
    tokens[31] = bad
    np.save(folder / "toy_train_000001.npy", tokens)
    dataset = TokenDataset.open(folder, "train", BLOCK)
    dataset.batch([0, 14, 16])
    with pytest.raises(InputError) as caught:
        dataset.batch([0, 15])
    assert str(caught.value) == (
        f"{folder / 'toy_train_000001.npy'}: token id {bad} at position 30 is outside the vocabulary of 1000"
        " (vocab_size in meta.json)"
    )


def test_largest_token_of_the_vocabulary_is_accepted(folder):
    np.save(folder / "toy_train_000000.npy", np.full(100, 999, np.uint16))
    assert TokenDataset.open(folder, "train", BLOCK).window(0).max() == 999


def test_fingerprint(folder):
    def fingerprint(block_size=BLOCK):
        return TokenDataset.open(folder, "train", block_size).fingerprint

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    seen.append(fingerprint(BLOCK + 1))
    sizes = listing(toy_train_000000=100, toy_train_000001=57)
    write_meta(folder, shards=sizes)
    assert fingerprint() == seen[0]  # listing the same shards changes nothing
    sizes[0]["sha256"] = "0" * 64
    write_meta(folder, shards=sizes)
    seen.append(fingerprint())
    sizes[0]["sha256"] = "1" * 64
    write_meta(folder, shards=sizes)
    seen.append(fingerprint())
    write_meta(folder)
    np.save(folder / "toy_train_000001.npy", np.zeros(58, np.uint16))
    seen.append(fingerprint())
    (folder / "toy_train_000001.npy").rename(folder / "toy_train_000002.npy")
    seen.append(fingerprint())
    for path in folder.glob("*.npy"):
        np.save(path, np.load(path).astype(np.uint32))
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


def test_nothing_is_copied_but_the_batch(tmp_path):
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


def test_many_shards_do_not_hold_many_file_descriptors(tmp_path):
    write_meta(tmp_path)
    for number in range(300):
        np.save(tmp_path / f"toy_train_{number:03d}.npy", np.full(2 * BLOCK, number, np.uint16))
    dataset = TokenDataset.open(tmp_path, "train", BLOCK)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for _ in range(2):
        assert dataset.batch(range(300))[0][:, 0].tolist() == list(range(300))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) - before <= 130


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
def test_resume_anywhere_also_with_other_ranks(tmp_path_factory, data, prefetch):
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


def test_state_of_another_run_is_refused(folder, loader_of):
    loader = loader_of(2, seed=5)
    loader.next_batch()
    state = loader.state_dict()
    other_block = TrainLoader(TokenDataset.open(folder, "train", BLOCK + 1), 2, seed=5)
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
def test_shard_lost_during_the_run(folder, prefetch, fault):
    dataset = TokenDataset.open(folder, "train", BLOCK)
    loader = TrainLoader(dataset, 2, prefetch=prefetch)
    for _ in range(10):
        loader.next_batch()  # an epoch: both shards are mapped
    path = folder / "toy_train_000000.npy"
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


def test_unmappable_shard(folder, dataset, monkeypatch):
    def refuse(*arguments):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(InputError, match=r"toy_train_000000.npy: cannot be mapped into memory"):
        dataset.window(0)


def test_bad_token_arrives_with_its_batch_and_not_earlier(folder):
    """The fault is read ahead; the good batches before it are still delivered."""
    probe = TrainLoader(TokenDataset.open(folder, "train", BLOCK), 1, prefetch=0)
    fourth = [first_tokens(probe.next_batch()) for _ in range(4)][3][0]
    path = folder / ("toy_train_000000.npy" if fourth < 100 else "toy_train_000001.npy")
    tokens = np.load(path)
    position = fourth % 100 + 1
    tokens[position] = 1000
    np.save(path, tokens)
    loader = TrainLoader(TokenDataset.open(folder, "train", BLOCK), 1, prefetch=8)
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
def test_validation_windows_are_the_same_for_every_pass_and_world_size(folder, world_size, num_batches):
    dataset = TokenDataset.open(folder, "val", BLOCK)  # 12 windows
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


def test_validation_of_bad_tokens(folder):
    np.save(folder / "toy_val_000000.npy", np.full(100, 1000, np.uint16))
    with pytest.raises(InputError, match="token id 1000 at position 0 is outside the vocabulary"):
        next(iter(ValLoader(TokenDataset.open(folder, "val", BLOCK), 2, 1)))


def test_validation_without_batches(dataset):
    with pytest.raises(InputError, match="--eval_iters: expected at least 1, got 0"):
        ValLoader(dataset, 2, 0)
