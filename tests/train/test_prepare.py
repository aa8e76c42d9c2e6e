"""Preparation: every source, both formats, the split, the same output for any number of workers, errors, crashes."""

import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import psutil
import pytest

from moe_engine.train import prepare as command
from moe_engine.train import prepare_input, prepare_output, prepare_sources, prepare_split
from moe_engine.train.errors import InputError
from moe_engine.train.prepare import PrepareConfig, prepare
from moe_engine.train.prepare_encode import EncodeOptions, encode_batches
from moe_engine.train.prepare_input import Batch
from moe_engine.train.tokenizer import load_tokenizer

SPEC = "o200k_base:1024"


@pytest.fixture(scope="module", autouse=True)
def ranks():
    """GPU hosts may have neither the ranks nor a network."""
    try:
        load_tokenizer(SPEC)
    except InputError as error:
        pytest.skip(str(error))


def texts(count, words=40):
    """Different documents of random words."""
    random = np.random.default_rng(count)
    vocabulary = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "12", "naïve", "世界", "birds.\n"]
    return [f"{i} " + " ".join(random.choice(vocabulary, words)) for i in range(count)]


def run(out_dir, *inputs, **options):
    """Prepare with a small vocabulary in this process; returns (meta, documents of train, documents of val)."""
    options = {"tokenizer": SPEC, "workers": 1, **options}
    prepare(PrepareConfig(out_dir=str(out_dir), input=[str(i) for i in inputs], **options))
    return read(out_dir)


def read(out_dir):
    """meta.json and the decoded documents, after checking every record in it against the files."""
    meta = json.loads((out_dir / "meta.json").read_text())
    tokenizer = load_tokenizer(meta["tokenizer"])
    assert (meta["vocab_size"], meta["eot"]) == (tokenizer.vocab_size, tokenizer.eot)
    streams = {"train": [], "val": []}
    for shard in meta["shards"]:
        path = out_dir / shard["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        if meta["format"] == "npy":
            array = np.load(path, mmap_mode="r")
        else:
            array = np.fromfile(path, dtype=np.dtype(meta["dtype"]).newbyteorder("<"))
        assert array.ndim == 1 and array.dtype == meta["dtype"] and len(array) == shard["tokens"]
        streams[shard["split"]].append(np.array(array))
    files = {p.name for p in out_dir.iterdir()}
    assert files == {"meta.json", *(shard["file"] for shard in meta["shards"])}, "leftovers"
    documents = {}
    for split, arrays in streams.items():
        stream = np.concatenate(arrays)
        ends = np.flatnonzero(stream == tokenizer.eot)
        assert ends[-1] == len(stream) - 1, "every document ends with the end-of-text token"
        assert len(ends) == meta["documents"][split] and len(stream) == meta["tokens"][split]
        documents[split] = [tokenizer.decode(part) for part in np.split(stream, ends + 1)[:-1]]
        documents[split] = [text.removesuffix("<|endoftext|>") for text in documents[split]]
    return meta, documents["train"], documents["val"]


def write_jsonl(path, documents, key="text"):
    data = "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(documents)).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(data) // 2  # two frames, as concatenated files have
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    path.write_bytes(data)
    return path


def write_parquet(path, documents, column="text", row_group=7):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": list(range(len(documents))), column: documents}), path, row_group_size=row_group)
    return path


# -- sources --


@pytest.mark.parametrize("name", ["d.jsonl", "d.ndjson", "d.jsonl.gz", "d.jsonl.zst"])
def test_json_lines(tmp_path, name):
    documents = texts(200)
    meta, train, val = run(tmp_path / "out", write_jsonl(tmp_path / name, documents, "body"), text_key="body")
    assert sorted(train + val) == sorted(documents)
    assert [d for d in documents if d in set(train)] == train, "the order is kept"
    assert meta["dataset"] == "d" and meta["dtype"] == "uint16"


def test_parquet_streams_row_batches(tmp_path):
    documents = texts(200)
    path = write_parquet(tmp_path / "d.parquet", documents, "body")
    _, train, val = run(tmp_path / "out", path, text_column="body")
    assert sorted(train + val) == sorted(documents)


def test_fineweb_edu_is_read_as_local_parquet_is(tmp_path, monkeypatch):
    """The hub's stream yields pieces of tables as lists by column; the rest is the code that reads parquet."""
    documents = texts(200)
    path = write_parquet(tmp_path / "d.parquet", documents)
    _, train, val = run(tmp_path / "local", path)
    calls = []

    class Stream:
        column_names = ("id", "text")

        def iter(self, batch_size):
            import pyarrow.parquet as pq

            for batch in pq.ParquetFile(path).iter_batches(batch_size=batch_size):
                yield batch.to_pydict()

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Stream()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    meta, hub_train, hub_val = run(tmp_path / "hub", source="fineweb-edu")
    assert (hub_train, hub_val) == (train, val) and meta["dataset"] == "fineweb-edu"
    assert calls == [(("HuggingFaceFW/fineweb-edu",), {"name": "sample-10BT", "split": "train", "streaming": True})]
    with pytest.raises(InputError, match=r"--text_column body: fineweb-edu has no such column, only id, text"):
        run(tmp_path / "none", source="fineweb-edu", text_column="body")


def test_a_source_tree(tmp_path):
    tree = tmp_path / "tree"
    kept = {"a.py": "print(1)\n", "docs/b.md": "# title\n", "docs/c.txt": "\ufeffwith a mark", "z.rs": "fn main() {}\n"}
    left = {".git/config.toml": "x", "__pycache__/a.py": "x", ".hidden.py": "x", "node_modules/m.js": "x", "p.png": "x"}
    for name, text in {**kept, **left, "empty.py": "", "blank.py": " \n\n"}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text, encoding="utf-8")
    (tree / "latin.py").write_bytes(b"x = 'caf\xe9'\n")
    (tree / "binary.txt").write_bytes(b"abc\0def")
    (tree / "late.txt").write_bytes(b"good line\n" * 40_000 + b"\xff")  # long enough to be cut into sections
    write_jsonl(tree / "more.jsonl", ["in JSON"])
    config = PrepareConfig(str(tree / "out"), [str(tree)], tokenizer=SPEC, workers=1, overwrite=True)
    done = prepare(config)
    _, train, val = read(tree / "out")
    expected = sorted(text.removeprefix("\ufeff") for text in [*kept.values(), "in JSON"])
    assert sorted(train + val) == expected
    assert done.empty == 2 and done.tally.unknown == 1
    assert [s.replace(str(tree), "") for s in done.tally.skipped] == [
        "/binary.txt (binary: a zero byte at byte 3)",
        "/late.txt (byte 0xff at byte 400000)",
        "/latin.py (byte 0xe9 at byte 8)",
    ]
    # The folder that is written into is no input, whatever else stands there.
    (tree / "out" / "notes.txt").write_text("not me")
    again = prepare(config)
    assert (again.meta, again.tally.unknown) == (done.meta, done.tally.unknown)


def test_a_file_given_twice_counts_once(tmp_path):
    for i, text in enumerate(texts(5)):
        (tmp_path / f"{i}.txt").write_text(text)
    meta, *_ = run(tmp_path / "out", tmp_path, tmp_path / "1.txt", tmp_path)
    assert sum(meta["documents"].values()) == 5


def test_standard_input(tmp_path, monkeypatch):
    text = "".join(f"line {i} of a long text\n" for i in range(30_000))
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode())))
    meta, train, val = run(tmp_path / "out", "-", val_fraction=0.2)
    assert "".join(sorted(train + val, key=lambda part: int(part.split()[1]))) == text
    assert meta["dataset"] == "stdin"


def test_the_standard_library(tmp_path, monkeypatch):
    folder = tmp_path / "lib"
    for name in ("b.py", "a.py", "test/c.py", "site-packages/numpy.py", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}")
    monkeypatch.setattr(prepare_sources.sysconfig, "get_path", lambda name: str(folder))
    meta, train, val = run(tmp_path / "out", source="stdlib")
    assert sorted(train + val) == ["# a.py", "# b.py", "# test/c.py"] and meta["dataset"] == "stdlib"
    monkeypatch.setattr(prepare_sources.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"--source stdlib: no \.py file"):
        run(tmp_path / "none", source="stdlib")


# -- plain texts are cut into sections --


@pytest.mark.parametrize("chunk", [1000, 70_000, 1 << 20])
def test_sections_do_not_depend_on_the_chunks(chunk):
    text = "".join(f"{i} naïve 世界 🦊\n" for i in range(40_000)).encode()
    whole = list(prepare_input._documents([text]))
    assert b"".join(whole) == text and len(whole) > 5
    assert all(part.endswith(b"\n") for part in whole)
    assert max(map(len, whole)) < prepare_input.SECTION_BYTES + 100
    assert list(prepare_input._documents(text[i : i + chunk] for i in range(0, len(text), chunk))) == whole


def test_a_text_up_to_the_limit_stays_whole():
    text = b"x" * (prepare_input.WHOLE_BYTES - 1) + b"\n"
    assert list(prepare_input._documents([text])) == [text]


def test_a_long_line_is_cut_between_characters():
    text = "a" + "世" * 500_000
    parts = [part.decode() for part in prepare_input._documents([text.encode()])]
    assert "".join(parts) == text and max(map(len, parts)) <= prepare_input.WHOLE_BYTES


def test_one_long_text_yields_both_parts(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} of a long text\n" for i in range(40_000)))
    meta, train, val = run(tmp_path / "out", path)
    assert len(val) == 1 and len(train) > 5 and meta["dataset"] == "book"


# -- the split --


def test_split_is_a_function_of_seed_and_text(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_split, "HELD_TOKENS", 1)
    documents = texts(3000, words=3)
    forward = write_jsonl(tmp_path / "a.jsonl", documents)
    backward = write_jsonl(tmp_path / "b.jsonl", documents[::-1])
    meta, train, val = run(tmp_path / "1", forward, val_fraction=0.1)
    assert 0.07 < len(val) / len(documents) < 0.13
    assert not set(train) & set(val)
    assert set(run(tmp_path / "2", backward, val_fraction=0.1)[2]) == set(val)
    assert run(tmp_path / "3", forward, val_fraction=0.1)[0] == meta
    assert set(run(tmp_path / "4", forward, val_fraction=0.1, seed=7)[2]) != set(val)


def test_few_documents_yield_a_validation_part_in_any_order(tmp_path):
    documents = texts(20)
    results = []
    for name, order in (("a", documents), ("b", documents[::-1])):
        meta, train, val = run(tmp_path / name, write_jsonl(tmp_path / f"{name}.jsonl", order), val_fraction=0.2)
        assert 0.1 < meta["tokens"]["val"] / sum(meta["tokens"].values()) < 0.35
        results.append((set(train), set(val)))
    assert results[0] == results[1]


@pytest.mark.parametrize("seed", range(8))
def test_two_documents_go_to_different_parts(tmp_path, seed):
    """With a fraction of a half, four seeds in eight would put both on one side."""
    path = write_jsonl(tmp_path / "d.jsonl", ["one", "two"])
    _, train, val = run(tmp_path / "out", path, seed=seed, val_fraction=0.5)
    assert sorted(train + val) == ["one", "two"] and len(val) == 1


def test_equal_documents_stand_on_one_side(tmp_path):
    _, train, val = run(tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", ["one", "two"] * 30))
    assert sorted([train, val]) == [["one"] * 30, ["two"] * 30]


def test_one_document_is_taken_when_the_held_part_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_split, "HELD_TOKENS", 500)
    path = write_jsonl(tmp_path / "d.jsonl", texts(200))
    monkeypatch.setattr(prepare_input, "BATCH_BYTES", 1000)
    monkeypatch.setattr(prepare_input, "_CHUNK", 1000)
    _, train, val = run(tmp_path / "out", path, val_fraction=1e-9)
    assert len(val) == 1 and len(train) == 199
    assert val[0] in texts(200)[:20]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "the document list is empty: no text was found"),
        (["", "  \n", None], "the document list is empty: no text was found"),
        (["alone"], "only one document, so the validation part is empty; give more documents"),
        (["same", "same"], "2 documents, but not two different ones"),
    ],
)
def test_too_few_documents(tmp_path, documents, message):
    path = write_jsonl(tmp_path / "d.jsonl", documents)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "deep" / "out", path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl"]


# -- formats --


def test_shards_are_cut_and_their_headers_tell_their_size(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", texts(300))
    whole, train, val = run(tmp_path / "one", path)
    meta, *documents = run(tmp_path / "many", path, shard_tokens=1000, dataset="web-1")
    assert documents == [train, val] and meta["tokens"] == whole["tokens"]
    names = [shard["file"] for shard in meta["shards"] if shard["split"] == "train"]
    assert names == [f"web-1_train_{i:06d}.npy" for i in range(len(names))] and len(names) > 5
    assert all(shard["tokens"] == 1000 for shard in meta["shards"][: len(names) - 1])
    exact, *_ = run(tmp_path / "exact", path, shard_tokens=whole["tokens"]["train"])
    assert [s["tokens"] for s in exact["shards"]] == [whole["tokens"]["train"], whole["tokens"]["val"]]


def test_memory_mapped_format_holds_the_same_tokens(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", texts(100))
    _, train, val = run(tmp_path / "npy", path)
    meta, bin_train, bin_val = run(tmp_path / "bin", path, format="bin", shard_tokens=10)
    assert (bin_train, bin_val) == (train, val)
    assert [shard["file"] for shard in meta["shards"]] == ["train.bin", "val.bin"]
    assert (tmp_path / "bin" / "train.bin").stat().st_size == 2 * meta["tokens"]["train"]


def test_a_large_vocabulary_takes_32_bits(tmp_path):
    meta, *_ = run(tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", texts(50)), tokenizer="o200k_base")
    assert meta["dtype"] == "uint32"
    assert list(meta)[:7] == ["tokenizer", "vocab_size", "dtype", "dataset", "documents", "tokens", "eot"]
    assert list(meta)[7:] == ["format", "seed", "val_fraction", "shards"]


@pytest.mark.parametrize(("ranks", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_the_largest_vocabulary_of_16_bits(tmp_path, ranks, dtype):
    meta, *_ = run(tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", ["a", "b"]), tokenizer=f"o200k_base:{ranks}")
    assert (meta["dtype"], meta["vocab_size"]) == (dtype, ranks + 1)


def test_max_tokens_stops_early(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_input, "BATCH_BYTES", 1000)
    monkeypatch.setattr(prepare_input, "_CHUNK", 1000)
    meta, *_ = run(tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", texts(500)), max_tokens=3000)
    assert 3000 <= sum(meta["tokens"].values()) < 5000


# -- processes --


def test_output_does_not_depend_on_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_input, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(prepare_input, "_CHUNK", 10_000)
    path = write_jsonl(tmp_path / "d.jsonl", texts(2000))
    one, *_ = run(tmp_path / "one", path)
    two, *_ = run(tmp_path / "two", path, workers=2)
    assert one == two


@pytest.mark.parametrize(
    ("cores", "megabytes", "expected"), [(1, 9999, 1), (4, 9999, 4), (64, 9999, 5), (4, 20, 1), (4, 40, 2), (4, 0, 4)]
)
def test_default_number_of_workers(monkeypatch, cores, megabytes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    assert command._default_workers(megabytes << 20) == expected


def test_reading_stays_a_few_batches_ahead():
    read_so_far, options = [], EncodeOptions(SPEC, "uint16", 1, "text", "text")

    def batches(size):
        for i in itertools.count():
            read_so_far.append(i)
            yield Batch("rows", "endless", 1, [f"document {i}"], size)

    for size, most in ((10, 7), (5 << 20, 3), (100 << 20, 2)):  # the last: one giant document at a time
        read_so_far.clear()
        results = encode_batches(batches(size), options, workers=2)
        for step in range(5):
            next(results)
            assert len(read_so_far) <= step + most
        results.close()


def test_a_workers_error_reaches_the_caller(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "good"}\nbad\n')
    with pytest.raises(InputError, match=r"d\.jsonl:2: not valid JSON"):
        run(tmp_path / "out", path, workers=2)
    assert not (tmp_path / "out").exists()


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_dead_worker_is_an_error_and_not_a_hang():
    batches = [Batch("rows", "x", 1, [Deadly()], 4)]
    with pytest.raises(InputError, match="a worker process ended unexpectedly"):
        list(encode_batches(batches, EncodeOptions(SPEC, "uint16", 1, "text", "text"), workers=2))


def test_workers_need_no_torch():
    """Its import would cost each of them seconds and hundreds of megabytes."""
    code = "import sys, moe_engine.train.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- bad input --


def bad_input(tmp_path, name, data, message, **options):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as info:
        run(tmp_path / "out", path, **options)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "out").exists(), "nothing half-written"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", r"d\.jsonl:4: not valid JSON"),
        (b'{"text": "\xff"}', r"d\.jsonl:4: not valid JSON"),
        (b"[" * 100_000, r"d\.jsonl:4: not valid JSON"),
        (b'["text"]', r"d\.jsonl:4: expected a JSON object on each line, got list"),
        (b'{"body": "x", "id": 2}', r"d\.jsonl:4: --text_key text: no such key; keys present: body, id"),
        (b'{"text": 7}', r"d\.jsonl:4: --text_key text: expected text, got int"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    bad_input(tmp_path, "d.jsonl", b'{"text": "a"}\n{"text": "b"}\n\n' + line + b"\n", message)


def test_line_numbers_go_on_over_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_input, "BATCH_BYTES", 100)
    monkeypatch.setattr(prepare_input, "_CHUNK", 37)
    bad_input(tmp_path, "d.jsonl", b'{"text": "a"}\n' * 1233 + b"!\n" + b'{"text": "a"}\n' * 50, r"d\.jsonl:1234: ")


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_input, "MAX_LINE_BYTES", 3 << 20)
    data = b'{"text": "a"}\n' * 100_000 + b"[" + b" " * (6 << 20)
    bad_input(tmp_path, "d.jsonl", data, r"d\.jsonl:\d+: a line of more than 3 MB; is this JSON lines\?")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9 au lait", r"d\.txt: not UTF-8 text \(byte 0xe9 at byte 3\)"),
        (b"ab\0c", r"d\.txt: not UTF-8 text \(binary: a zero byte at byte 2\)"),
        (b"line\n" * 100_000 + b"\x80", r"d\.txt: not UTF-8 text \(byte 0x80 at byte 500000\)"),
        (b"\x80" * 600_000, r"d\.txt: not UTF-8 text \(byte 0x80 at byte 0\)"),
        (b"cut off \xe4\xb8", r"\(byte 0xe4 at byte 8\)"),
    ],
)
def test_a_named_file_that_is_no_text(tmp_path, data, message):
    bad_input(tmp_path, "d.txt", data, message)


def test_damaged_archives(tmp_path):
    text = "".join(texts(500)).encode()
    bad_input(tmp_path, "d.txt.gz", gzip.compress(text)[:-20], r"d\.txt\.gz: damaged or truncated gzip")
    bad_input(tmp_path, "d.jsonl.gz", text, r"d\.jsonl\.gz: damaged or truncated gzip")
    zstandard = pytest.importorskip("zstandard")
    bad_input(tmp_path, "d.txt.zst", zstandard.compress(text)[:-20], r"d\.txt\.zst: truncated zstd")
    bad_input(tmp_path, "e.txt.zst", text, r"e\.txt\.zst: damaged zstd")


def test_bad_parquet(tmp_path):
    path = write_parquet(tmp_path / "good.parquet", ["a", "b"], "body")
    data = path.read_bytes()
    bad_input(tmp_path, "d.parquet", data, r"--text_column text: .*d\.parquet has no such column, only id, body")
    bad_input(
        tmp_path, "d.parquet", data, r"d\.parquet, row 1: --text_column id: expected text, got int", text_column="id"
    )
    bad_input(tmp_path, "d.parquet", data[:-30], r"d\.parquet: not a readable parquet file")
    bad_input(tmp_path, "d.parquet", b"nonsense" * 100, r"d\.parquet: not a readable parquet file")


@pytest.mark.parametrize(
    ("package", "name", "remedy"),
    [("zstandard", "d.jsonl.zst", "pip install zstandard"), ("pyarrow", "d.parquet", "pip install pyarrow")],
)
def test_missing_packages(tmp_path, monkeypatch, package, name, remedy):
    monkeypatch.setitem(sys.modules, package, None)
    bad_input(tmp_path, name, b"x", rf"{name}: .* need the {package} package: {remedy}")


def test_missing_datasets_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"--source fineweb-edu needs .* pip install datasets"):
        run(tmp_path / "out", source="fineweb-edu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": []}, "expected --input PATH… or --source stdlib|fineweb-edu, got neither"),
        ({"source": "stdlib"}, "got both"),
        ({"input": ["missing.txt"]}, "--input missing.txt: no such file or folder"),
        ({"val_fraction": 0.0}, "--val_fraction: expected a number between 0 and 1, got 0.0"),
        ({"val_fraction": float("nan")}, "--val_fraction: expected a number between 0 and 1, got nan"),
        ({"shard_tokens": 0}, "--shard_tokens: expected at least 1, got 0"),
        ({"workers": -1}, "--workers: expected at least 0, got -1"),
        ({"max_tokens": -1}, "--max_tokens: expected at least 0, got -1"),
        ({"dataset": "my_val"}, "--dataset 'my_val': expected letters"),
        ({"dataset": "../x"}, "--dataset '../x': expected letters"),
        ({"tokenizer": "o20k"}, "no such encoding 'o20k'"),
    ],
)
def test_bad_options(tmp_path, options, message):
    path = write_jsonl(tmp_path / "d.jsonl", ["a", "b"])
    with pytest.raises(InputError) as info:
        prepare(PrepareConfig(out_dir=str(tmp_path / "out"), **{"input": [str(path)], "tokenizer": SPEC, **options}))
    assert message in str(info.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_text(tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "picture.png").write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"the document list is empty: --input .*tree has no text .*\(1 files with other"
    ):
        run(tmp_path / "out", tmp_path / "tree")


@pytest.mark.parametrize(
    ("name", "expected"), [("my_train_data.jsonl", "my-train-data"), ("a b&c.jsonl.gz", "a_b_c"), ("&.jsonl", "text")]
)
def test_names_of_data_sets(tmp_path, name, expected):
    assert run(tmp_path / "out", write_jsonl(tmp_path / name, ["a", "b"]))[0]["dataset"] == expected


# -- the output folder --


def test_a_finished_data_set_is_kept_unless_told_otherwise(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), write_jsonl(tmp_path / "b.jsonl", ["c", "d"])
    first, *_ = run(tmp_path / "out", a)
    with pytest.raises(InputError, match="holds a finished data set; give --overwrite"):
        run(tmp_path / "out", b)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        run(tmp_path / "out", bad, overwrite=True)
    assert read(tmp_path / "out")[0] == first, "a failed run leaves the old data set as it was"
    _, train, val = run(tmp_path / "out", b, overwrite=True, format="bin")
    assert sorted(train + val) == ["c", "d"]


@pytest.mark.parametrize("meta", [None, '{"tokenizer": "o200k_base", "vocab_size": 200000, "dataset": "x"}'])
def test_token_files_of_others_are_never_touched(tmp_path, meta):
    path, out = write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), tmp_path / "out"
    out.mkdir()
    (out / "edu_train_000001.npy").write_bytes(b"precious")
    if meta:
        (out / "meta.json").write_text(meta)
    with pytest.raises(InputError, match=r"token files that moe-prepare did not write \(edu_train_000001\.npy\)"):
        run(out, path, overwrite=True)
    assert {p.name for p in out.iterdir()} == {"edu_train_000001.npy", *(["meta.json"] if meta else [])}


def test_other_files_in_the_folder_are_no_hindrance(tmp_path):
    (tmp_path / "README.md").write_text("keep me")
    run_dir = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    prepare(PrepareConfig(out_dir=str(tmp_path), input=[str(run_dir)], tokenizer=SPEC, workers=1))
    assert (tmp_path / "README.md").read_text() == "keep me" and (tmp_path / "meta.json").exists()


def test_names_in_a_meta_json_never_lead_out_of_the_folder(tmp_path):
    path, out, precious = write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), tmp_path / "out", tmp_path / "precious.npy"
    precious.write_bytes(b"x")
    out.mkdir()
    (out / "meta.json").write_text(json.dumps({"shards": [{"file": "../precious.npy"}, {"file": "notes.txt"}]}))
    (out / "notes.txt").write_text("keep")
    prepare(PrepareConfig(out_dir=str(out), input=[str(path)], tokenizer=SPEC, workers=1, overwrite=True))
    assert precious.exists() and (out / "notes.txt").exists()


def test_out_dir_that_cannot_be_written(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(InputError, match=r"--out_dir .*a\.jsonl: is a file"):
        run(path, path)
    with pytest.raises(InputError, match=r"--out_dir .*: cannot write there \(Not a directory\)"):
        run(path / "below", path)


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with prepare_output.DatasetFolder(tmp_path / "out", overwrite=False) as folder:
        with pytest.raises(InputError, match="another moe-prepare is writing there"):
            run(tmp_path / "out", path)
        assert folder.staging.exists()
    run(tmp_path / "out", path)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(prepare_output.fcntl, "flock", refuse)
    run(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", ["a", "b"]))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("shard", ["d_train_000000.npy", "d_val_000000.npy"])
def test_a_full_disk(tmp_path, monkeypatch, shard):
    def opened(path, mode):
        return open("/dev/full" if Path(path).name == shard else path, mode)

    monkeypatch.setattr(prepare_output, "open", opened, raising=False)
    with pytest.raises(InputError, match="no space left on the device; what was written has been removed") as info:
        run(tmp_path / "new" / "out", write_jsonl(tmp_path / "d.jsonl", texts(3000)), val_fraction=0.5)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "new").exists()


def test_an_input_that_cannot_be_read_midway(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "d.jsonl", ["a", "b"])

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        yield

    monkeypatch.setattr(prepare_input, "_unpacked", broken)
    with pytest.raises(InputError, match=r"d\.jsonl: Input/output error"):
        run(tmp_path / "out", path)
    assert not (tmp_path / "out").exists()


class Killed(BaseException):
    """Stands for the end of the process: nothing is cleaned up after it."""


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_step_of_the_last_moves(tmp_path, monkeypatch, overwrite):
    """Whatever is on disk afterwards: a meta.json only beside the files it lists, and the next run ends well."""
    old = write_jsonl(tmp_path / "old.jsonl", texts(40))
    new = write_jsonl(tmp_path / "new.jsonl", texts(60))
    outcomes = set()
    for step in itertools.count():
        out = tmp_path / f"out{step}"
        if overwrite:
            run(out, old, shard_tokens=1000)
        with monkeypatch.context() as patch:
            left = [step]

            def counted(name, patch=patch, left=left):
                original = getattr(Path, name)

                def call(self, *args, **kwargs):
                    if left[0] == 0:
                        raise Killed
                    left[0] -= 1
                    return original(self, *args, **kwargs)

                patch.setattr(Path, name, call)

            def commit(self, meta, counted=counted, original=prepare_output.DatasetFolder.commit):
                counted("rename")
                counted("unlink")
                original(self, meta)

            patch.setattr(prepare_output.DatasetFolder, "commit", commit)
            patch.setattr(prepare_output.DatasetFolder, "_leave", lambda self: self._lock.close())
            try:
                run(out, new, shard_tokens=1000, overwrite=overwrite)
            except Killed:
                killed = True
            except AssertionError:  # `read` found .preparing: the commit itself went through
                killed = False
            if (out / "meta.json").exists():
                meta = json.loads((out / "meta.json").read_text())
                outcomes.add(meta["dataset"])
                for shard in meta["shards"]:
                    data = (out / shard["file"]).read_bytes()
                    assert hashlib.sha256(data).hexdigest() == shard["sha256"]
            else:
                outcomes.add("none")
        _, train, val = run(out, new, shard_tokens=1000, overwrite=True)
        assert sorted(train + val) == sorted(texts(60))
        if not killed:
            break
    assert step > 5
    assert outcomes == ({"old", "none", "new"} if overwrite else {"none", "new"})


# -- the command --


def start(out_dir):
    """The command in a process group of its own, reading standard input, two workers, more than one batch sent."""
    options = ["--input=-", f"--out-dir={out_dir}", f"--tokenizer={SPEC}", "--workers=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_engine.train.prepare", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    process.stdin.write("".join(f"line {i}\n" for i in range(500_000)).encode())
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while len(children := psutil.Process(process.pid).children(recursive=True)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process, children


def test_interrupted(tmp_path):
    process, children = start(tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to all processes of the group
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == (b"", b"interrupted\n")
    assert not (tmp_path / "out").exists()
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_killed_and_run_again(tmp_path):
    process, children = start(tmp_path / "out")
    process.kill()
    process.communicate(timeout=60)
    assert psutil.wait_procs(children, timeout=10)[1] == [], "workers end with their parent"
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".preparing"]
    run(tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", ["a", "b"]))  # checks for leftovers


def test_the_command_reports_and_exits_with_its_status(tmp_path, capsys):
    write_jsonl(tmp_path / "d.jsonl", [*texts(100), ""])
    for i in range(7):
        (tmp_path / f"bad{i}.txt").write_bytes(b"\xff")
    arguments = ["--input", str(tmp_path), "--out_dir", str(tmp_path / "out"), "--tokenizer", SPEC, "--workers=1"]
    assert command.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "characters per token" in out and "MB/s" in out and f"written    {tmp_path / 'out'}" in out
    assert "1 empty documents, 7 files that are not UTF-8 text" in out and "bad4.txt" in out and "… and 2 more" in out
    assert err == ""
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: --out_dir")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr("moe_engine.train.prepare_progress._SECONDS_PER_LINE", 0.0)
    monkeypatch.setattr(prepare_input, "BATCH_BYTES", 1000)
    monkeypatch.setattr(prepare_input, "_CHUNK", 1000)
    run(tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", texts(20)))
    err = capsys.readouterr().err
    assert "MB/s" in err and "preparing" in err
    assert terminal or ("% read, ETA 0:00:" in err and err.count("\n") > 3)
