"""meta.json, the shards of a split, and every way in which they can be damaged."""

import os
import subprocess
import sys

import numpy as np
import pytest

from moe_engine.train.errors import InputError
from moe_engine.train.shards import find_shards, read_meta, read_shard


def listing(**tokens):
    """The shards entry of meta.json for names given as `toy_train_0=100`."""
    return [{"file": f"{name}.npy", "tokens": n} for name, n in tokens.items()]


def shards_of(folder, split="train"):
    """The shards of a split, checked."""
    meta = read_meta(folder)
    return [read_shard(folder, name, meta) for name in find_shards(folder, split, meta)]


def tokens_of(folder, split="train"):
    """All tokens of a split, in order."""
    return [token for shard in shards_of(folder, split) for token in shard.map().tolist()]


def error_of(folder, split="train"):
    """The message of the InputError that reading a split raises; always one line."""
    with pytest.raises(InputError) as caught:
        shards_of(folder, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- meta.json --------------------------------------------------------------------------------------------------------


def test_guide_meta_takes_dtype_from_the_npy_header(data_dir):
    meta = read_meta(data_dir)
    assert (meta.tokenizer, meta.vocab_size, meta.dataset) == ("gpt2", 1000, "toy")
    assert meta.dtype == np.uint16 and meta.eot is None and meta.shards is None


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32), (200000, np.uint32)])
def test_guide_meta_takes_dtype_of_bin_from_the_vocabulary(tmp_path, vocab_size, dtype, write_meta):
    write_meta(tmp_path, vocab_size=vocab_size)
    np.arange(100, dtype=dtype).tofile(tmp_path / "train.bin")
    assert read_meta(tmp_path).dtype == dtype
    assert len(tokens_of(tmp_path)) == 100


def test_own_meta(data_dir, write_meta):
    shards = [
        {"file": "toy_train_000000.npy", "split": "train", "tokens": 100, "sha256": "0" * 64},
        {"file": "toy_val_000000.npy", "tokens": 100},
    ]
    write_meta(data_dir, dtype="uint16", eot=0, shards=shards, documents=3, tokens={"train": 100, "val": 100})
    meta = read_meta(data_dir)
    assert meta.dtype == np.uint16 and meta.eot == 0
    assert meta.shards["toy_train_000000.npy"].sha256 == "0" * 64
    assert meta.shards["toy_val_000000.npy"].sha256 is None
    # what meta.json lists is what is read: the second training shard is there but not listed
    assert len(tokens_of(data_dir)) == 100


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
def test_bad_meta_values(data_dir, changes, expected, write_meta):
    write_meta(data_dir, **changes)
    message = error_of(data_dir)
    assert str(data_dir / "meta.json") in message and expected in message


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
def test_meta_that_is_no_json_object(data_dir, content, expected):
    (data_dir / "meta.json").write_bytes(content)
    message = error_of(data_dir)
    assert str(data_dir / "meta.json") in message and expected in message


def test_meta_missing(data_dir):
    (data_dir / "meta.json").unlink()
    assert f"{data_dir / 'meta.json'}: missing; expected a JSON object with tokenizer" in error_of(data_dir)


def test_meta_is_a_folder(data_dir):
    (data_dir / "meta.json").unlink()
    (data_dir / "meta.json").mkdir()
    assert f"{data_dir / 'meta.json'}: cannot be read" in error_of(data_dir)


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", ">u2"])
def test_build_nanogpt_shards(tmp_path, dtype, write_meta):
    write_meta(tmp_path)
    for number in (2, 1):  # read in the order of their names
        tokens = np.arange(100 * number, 100 * number + 50, dtype=dtype)
        np.save(tmp_path / f"edufineweb_train_{number:06d}.npy", tokens)
    assert tokens_of(tmp_path) == [*range(100, 150), *range(200, 250)]


def test_bin_files(tmp_path, write_meta):
    write_meta(tmp_path, dtype="uint32")
    np.arange(50, dtype=np.uint32).tofile(tmp_path / "train.bin")
    np.arange(50, 100, dtype=np.uint32).tofile(tmp_path / "val.bin")
    assert tokens_of(tmp_path) == list(range(50))
    assert tokens_of(tmp_path, "val") == list(range(50, 100))


def test_npy_format_version_2(data_dir):
    with open(data_dir / "toy_train_000001.npy", "wb") as file:
        np.lib.format.write_array(file, np.arange(100, 157, dtype=np.uint16), version=(2, 0))
    assert tokens_of(data_dir) == list(range(157))


def test_split_is_the_last_word_of_the_name(tmp_path, write_meta):
    """`*_val_*` alone would take the training shards of a data set called my_val_set for validation."""
    write_meta(tmp_path)
    np.save(tmp_path / "my_val_set_train_0.npy", np.arange(0, 20, dtype=np.uint16))
    np.save(tmp_path / "my_val_set_val_0.npy", np.arange(20, 60, dtype=np.uint16))
    np.save(tmp_path / "._my_val_set_val_0.npy", np.zeros(5))  # what some file systems leave beside a file
    assert len(tokens_of(tmp_path)) == 20
    assert len(tokens_of(tmp_path, "val")) == 40


def test_data_dir_missing(tmp_path):
    assert error_of(tmp_path / "nowhere") == f"--data_dir {tmp_path / 'nowhere'}: no such folder"


def test_data_dir_not_a_folder(data_dir):
    assert error_of(data_dir / "meta.json") == f"--data_dir {data_dir / 'meta.json'}: not a folder"


def test_data_dir_empty(tmp_path):
    assert f"--data_dir {tmp_path}: the folder is empty" in error_of(tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_files_of_a_split(data_dir, split):
    for path in data_dir.glob(f"*_{split}_*"):
        path.unlink()
    assert f"--data_dir {data_dir}: no {split} files; expected *_{split}_*.npy or {split}.bin" in error_of(
        data_dir, split
    )


def test_no_listed_files_of_a_split(data_dir, write_meta):
    write_meta(data_dir, shards=listing(toy_train_000000=100))
    assert f"no val files; expected *_val_*.npy or val.bin, and {data_dir / 'meta.json'} lists neither" in error_of(
        data_dir, "val"
    )


def test_both_formats(data_dir, write_meta):
    np.arange(50, dtype=np.uint16).tofile(data_dir / "train.bin")
    assert "both train.bin and *_train_*.npy are present" in error_of(data_dir)
    write_meta(data_dir, shards=[{"file": "train.bin", "tokens": 50}])  # meta.json decides
    assert len(tokens_of(data_dir)) == 50
    write_meta(data_dir, shards=[{"file": "train.bin", "tokens": 50}, *listing(toy_train_000000=100)])
    assert len(tokens_of(data_dir)) == 150


def test_listed_shard_missing(data_dir, write_meta):
    write_meta(data_dir, shards=listing(toy_train_000000=100, toy_train_000007=100))
    assert error_of(data_dir) == f"{data_dir / 'toy_train_000007.npy'}: missing, but listed in meta.json"


@pytest.mark.parametrize("listed", [99, 101])
def test_listed_shard_of_other_length(data_dir, listed, write_meta):
    write_meta(data_dir, shards=listing(toy_train_000000=listed))
    assert (
        error_of(data_dir) == f"{data_dir / 'toy_train_000000.npy'}: meta.json lists {listed} tokens, the file has 100"
    )


def test_truncated_npy(data_dir):
    path = data_dir / "toy_train_000001.npy"
    os.truncate(path, path.stat().st_size - 1)
    assert error_of(data_dir) == f"{path}: truncated: 57 tokens need 242 bytes, the file has 241"


def test_huge_promise_in_npy_header(data_dir):
    path = data_dir / "toy_train_000001.npy"
    path.write_bytes(path.read_bytes().replace(b"(57,), }              ", b"(5700000000000000000,),}"))
    assert f"{path}: truncated: 5700000000000000000 tokens" in error_of(data_dir)


@pytest.mark.parametrize("content", [b"", b"\x93NUM", b"PK\x03\x04" + bytes(200), b"\x93NUMPY\x07\x00" + bytes(200)])
def test_not_an_npy(data_dir, content):
    (data_dir / "toy_train_000001.npy").write_bytes(content)
    assert f"{data_dir / 'toy_train_000001.npy'}: not a readable .npy file" in error_of(data_dir)


def test_first_shard_not_an_npy(data_dir):
    """The first shard's header is also where read_meta takes the dtype from."""
    (data_dir / "toy_train_000000.npy").write_bytes(b"text")
    assert f"{data_dir / 'toy_train_000000.npy'}: not a readable .npy file" in error_of(data_dir)


def test_shard_is_a_folder(data_dir):
    for name in ("toy_train_000000.npy", "toy_train_000001.npy"):
        (data_dir / name).unlink()
        (data_dir / name).mkdir()
        assert f"{data_dir / name}: cannot be read" in error_of(data_dir)
        (data_dir / name).rmdir()
        np.save(data_dir / name, np.zeros(20, np.uint16))


@pytest.mark.filterwarnings("ignore")
def test_damaged_npy_headers_never_escape_as_another_error(data_dir):
    path = data_dir / "toy_train_000000.npy"
    good, rng = path.read_bytes(), np.random.default_rng(0)
    outcomes = set()
    for _ in range(1500):
        damaged = bytearray(good)
        for _ in range(rng.integers(1, 6)):
            damaged[rng.integers(0, 128)] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            shards_of(data_dir)
            outcomes.add("read")
        except InputError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_header_with_keys_that_cannot_be_sorted(data_dir):
    """numpy itself raises TypeError here."""
    path = data_dir / "toy_train_000000.npy"
    path.write_bytes(path.read_bytes().replace(b"'fortran_order'", b"b'ortran_order'"))
    assert f"{path}: not a readable .npy file" in error_of(data_dir)


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
def test_npy_of_wrong_kind(data_dir, array, expected):
    np.save(data_dir / "toy_train_000001.npy", array, allow_pickle=True)
    message = error_of(data_dir)
    assert str(data_dir / "toy_train_000001.npy") in message and expected in message


def test_bin_of_broken_length(tmp_path, write_meta):
    write_meta(tmp_path, vocab_size=200000)
    (tmp_path / "train.bin").write_bytes(bytes(4 * 100 + 2))
    assert f"{tmp_path / 'train.bin'}: 402 bytes is not a whole number of uint32 tokens" in error_of(tmp_path)


def test_unmappable_shard(data_dir, monkeypatch):
    def refuse(*arguments):
        raise OSError(12, "Cannot allocate memory")

    first, _ = shards_of(data_dir)
    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(InputError, match=r"toy_train_000000.npy: cannot be mapped into memory"):
        first.map()


def test_reading_shards_needs_no_torch():
    code = "import sys, moe_engine.train.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
