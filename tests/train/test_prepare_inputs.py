"""What is read: every kind of source, the sections of long and of lone texts, and input that cannot be used."""

import gzip
import io
import sys
import types

import pytest

from moe_engine.train.errors import InputError
from moe_engine.train.prepare import PrepareConfig, inputs, prepare, sources

# -- sources --


@pytest.mark.parametrize("name", ["d.jsonl", "d.ndjson", "d.jsonl.gz", "d.jsonl.zst"])
def test_json_lines(tmp_path, name, run_prepare, random_texts, write_jsonl):
    documents = random_texts(200)
    meta, train, val = run_prepare(tmp_path / "out", write_jsonl(tmp_path / name, documents, "body"), text_key="body")
    assert sorted(train + val) == sorted(documents)
    assert [d for d in documents if d in set(train)] == train, "the order is kept"
    assert meta["dataset"] == "d" and meta["dtype"] == "uint16"


def test_parquet_streams_row_batches(tmp_path, run_prepare, random_texts, write_parquet):
    documents = random_texts(200)
    path = write_parquet(tmp_path / "d.parquet", documents, "body")
    _, train, val = run_prepare(tmp_path / "out", path, text_column="body")
    assert sorted(train + val) == sorted(documents)


def test_fineweb_edu_is_read_as_local_parquet_is(tmp_path, monkeypatch, run_prepare, random_texts, write_parquet):
    """The hub's stream yields pieces of tables as lists by column; the rest is the code that reads parquet."""
    documents = random_texts(200)
    path = write_parquet(tmp_path / "d.parquet", documents)
    _, train, val = run_prepare(tmp_path / "local", path)
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
    meta, hub_train, hub_val = run_prepare(tmp_path / "hub", source="fineweb-edu")
    assert (hub_train, hub_val) == (train, val) and meta["dataset"] == "fineweb-edu"
    assert calls == [(("HuggingFaceFW/fineweb-edu",), {"name": "sample-10BT", "split": "train", "streaming": True})]
    with pytest.raises(InputError, match=r"--text_column body: fineweb-edu has no such column, only id, text"):
        run_prepare(tmp_path / "none", source="fineweb-edu", text_column="body")


def test_a_source_tree(tmp_path, read_prepared, write_jsonl, spec):
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
    config = PrepareConfig(str(tree / "out"), [str(tree)], tokenizer=spec, workers=1, overwrite=True)
    done = prepare(config)
    _, train, val = read_prepared(tree / "out")
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


def test_a_file_given_twice_counts_once(tmp_path, run_prepare, random_texts):
    for i, text in enumerate(random_texts(5)):
        (tmp_path / f"{i}.txt").write_text(text)
    meta, *_ = run_prepare(tmp_path / "out", tmp_path, tmp_path / "1.txt", tmp_path)
    assert sum(meta["documents"].values()) == 5


def test_standard_input(tmp_path, monkeypatch, run_prepare):
    text = "".join(f"line {i} of a long text\n" for i in range(30_000))
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode())))
    meta, train, val = run_prepare(tmp_path / "out", "-", val_fraction=0.2)
    assert "".join(sorted(train + val, key=lambda part: int(part.split()[1]))) == text
    assert meta["dataset"] == "stdin"


def test_the_standard_library(tmp_path, monkeypatch, run_prepare):
    folder = tmp_path / "lib"
    for name in ("b.py", "a.py", "test/c.py", "site-packages/numpy.py", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(folder))
    meta, train, val = run_prepare(tmp_path / "out", source="stdlib")
    assert sorted(train + val) == ["# a.py", "# b.py", "# test/c.py"] and meta["dataset"] == "stdlib"
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"--source stdlib: no \.py file"):
        run_prepare(tmp_path / "none", source="stdlib")


# -- plain texts are cut into sections --


@pytest.mark.parametrize("chunk", [1000, 70_000, 1 << 20])
def test_sections_do_not_depend_on_the_chunks(chunk):
    text = "".join(f"{i} naïve 世界 🦊\n" for i in range(40_000)).encode()
    whole = list(inputs._documents([text]))
    assert b"".join(whole) == text and len(whole) > 5
    assert all(part.endswith(b"\n") for part in whole)
    assert max(map(len, whole)) < inputs.SECTION_BYTES + 100
    assert list(inputs._documents(text[i : i + chunk] for i in range(0, len(text), chunk))) == whole


def test_a_text_up_to_the_limit_stays_whole():
    text = b"x" * (inputs.WHOLE_BYTES - 1) + b"\n"
    assert list(inputs._documents([text])) == [text]


def test_a_long_line_is_cut_between_characters():
    text = "a" + "世" * 500_000
    parts = [part.decode() for part in inputs._documents([text.encode()])]
    assert "".join(parts) == text and max(map(len, parts)) <= inputs.WHOLE_BYTES


def test_one_long_text_yields_both_parts(tmp_path, run_prepare):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} of a long text\n" for i in range(40_000)))
    meta, train, val = run_prepare(tmp_path / "out", path)
    assert len(val) == 1 and len(train) > 5 and meta["dataset"] == "book"


# -- a lone short text is cut too --


def lines(size, word="mat"):
    """Different lines of English, `size` bytes in all."""
    text = "".join(f"{i}: the cat sat on the {word} and looked at the birds.\n" for i in range(size // 40))
    return text[:size]


@pytest.mark.parametrize("size", [2 * inputs.LONE_BYTES, 20_000, inputs.WHOLE_BYTES])
def test_one_short_text_yields_both_parts(tmp_path, run_prepare, size):
    """With the default tokenizer, and enough of both for windows of 256 tokens."""
    path, text = tmp_path / "book.txt", lines(size)
    path.write_text(text)
    meta, train, val = run_prepare(tmp_path / "out", path, tokenizer="o200k_base")
    assert len(train) + len(val) == size // inputs.LONE_BYTES
    assert "".join(sorted(train + val, key=lambda part: int(part.split(":")[0]))) == text
    assert min(meta["tokens"].values()) > 256
    assert run_prepare(tmp_path / "again", path, tokenizer="o200k_base")[0] == meta


@pytest.mark.parametrize("text", [lines(8191), "世" * 2730])
def test_a_lone_text_that_is_too_short(bad_input, text):
    bad_input("d.txt", text.encode(), "only one document, so the validation part is empty; .* at least 8 KB")


def test_a_lone_text_from_standard_input(tmp_path, monkeypatch, run_prepare):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(lines(20_000).encode())))
    assert run_prepare(tmp_path / "out", "-")[0]["documents"] == {"train": 3, "val": 1}


def test_a_lone_text_with_copies_and_empty_files(tmp_path, run_prepare):
    (tmp_path / "tree").mkdir()
    for name, text in {"a": " \n", "b": lines(20_000), "c": "", "d": lines(20_000)}.items():
        (tmp_path / "tree" / f"{name}.txt").write_text(text)
    _, train, val = run_prepare(tmp_path / "out", tmp_path / "tree")
    assert len(train) + len(val) == 8 and not set(train) & set(val)


@pytest.mark.parametrize("other", ["other.txt", "a.jsonl", "z.jsonl"])
def test_a_short_text_that_is_not_alone_stays_whole(tmp_path, run_prepare, write_jsonl, other):
    (tmp_path / "book.txt").write_text(lines(20_000))
    if other == "other.txt":
        (tmp_path / other).write_text("another text")
    else:
        write_jsonl(tmp_path / other, ["another text"])
    _, train, val = run_prepare(tmp_path / "out", tmp_path)
    assert sorted(train + val) == sorted([lines(20_000), "another text"])


def test_a_lone_record_of_a_table_stays_whole(tmp_path, run_prepare, write_jsonl):
    with pytest.raises(InputError, match="only one document"):
        run_prepare(tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", [lines(20_000)]))


@pytest.mark.parametrize("size", [8192, 50_000])
@pytest.mark.parametrize("text", ["the cat\n", "naïve 世界 " * 300 + "\n", "世", "🦊"])
def test_sections_of_a_lone_text(text, size):
    whole = (text * (size // len(text) + 1)).encode()
    parts = inputs._sections(whole)
    assert b"".join(part.decode().encode() for part in parts) == whole, "no character is cut"
    assert len(parts) == len(whole) // inputs.LONE_BYTES
    assert min(map(len, parts)) > inputs.LONE_BYTES // 2 - 4
    assert text != "the cat\n" or all(part.endswith(b"\n") for part in parts)


# -- bad input --


@pytest.fixture
def bad_input(tmp_path, run_prepare):
    """Checks that a file of such bytes is refused with such a message, in one line, and that nothing is written."""

    def check(name, data, message, **options):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InputError, match=message) as info:
            run_prepare(tmp_path / "out", path, **options)
        assert "\n" not in str(info.value)
        assert not (tmp_path / "out").exists(), "nothing half-written"

    return check


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
def test_bad_json_lines(line, message, bad_input):
    bad_input("d.jsonl", b'{"text": "a"}\n{"text": "b"}\n\n' + line + b"\n", message)


def test_line_numbers_go_on_over_batches(monkeypatch, bad_input):
    monkeypatch.setattr(inputs, "BATCH_BYTES", 100)
    monkeypatch.setattr(inputs, "_CHUNK", 37)
    bad_input("d.jsonl", b'{"text": "a"}\n' * 1233 + b"!\n" + b'{"text": "a"}\n' * 50, r"d\.jsonl:1234: ")


def test_a_line_without_end(monkeypatch, bad_input):
    monkeypatch.setattr(inputs, "MAX_LINE_BYTES", 3 << 20)
    data = b'{"text": "a"}\n' * 100_000 + b"[" + b" " * (6 << 20)
    bad_input("d.jsonl", data, r"d\.jsonl:\d+: a line of more than 3 MB; is this JSON lines\?")


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
def test_a_named_file_that_is_no_text(data, message, bad_input):
    bad_input("d.txt", data, message)


def test_damaged_archives(random_texts, bad_input):
    text = "".join(random_texts(500)).encode()
    bad_input("d.txt.gz", gzip.compress(text)[:-20], r"d\.txt\.gz: damaged or truncated gzip")
    bad_input("d.jsonl.gz", text, r"d\.jsonl\.gz: damaged or truncated gzip")
    zstandard = pytest.importorskip("zstandard")
    bad_input("d.txt.zst", zstandard.compress(text)[:-20], r"d\.txt\.zst: truncated zstd")
    bad_input("e.txt.zst", text, r"e\.txt\.zst: damaged zstd")


def test_bad_parquet(tmp_path, write_parquet, bad_input):
    path = write_parquet(tmp_path / "good.parquet", ["a", "b"], "body")
    data = path.read_bytes()
    bad_input("d.parquet", data, r"--text_column text: .*d\.parquet has no such column, only id, body")
    bad_input("d.parquet", data, r"d\.parquet, row 1: --text_column id: expected text, got int", text_column="id")
    bad_input("d.parquet", data[:-30], r"d\.parquet: not a readable parquet file")
    bad_input("d.parquet", b"nonsense" * 100, r"d\.parquet: not a readable parquet file")


@pytest.mark.parametrize(
    ("package", "name", "remedy"),
    [("zstandard", "d.jsonl.zst", "pip install zstandard"), ("pyarrow", "d.parquet", "pip install pyarrow")],
)
def test_missing_packages(monkeypatch, package, name, remedy, bad_input):
    monkeypatch.setitem(sys.modules, package, None)
    bad_input(name, b"x", rf"{name}: .* need the {package} package: {remedy}")


def test_missing_datasets_package(tmp_path, monkeypatch, run_prepare):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"--source fineweb-edu needs .* pip install datasets"):
        run_prepare(tmp_path / "out", source="fineweb-edu")


def test_a_folder_without_text(tmp_path, run_prepare):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "picture.png").write_bytes(b"x")
    message = r"the document list is empty: --input .*tree has no text .*\(1 files with other"
    with pytest.raises(InputError, match=message):
        run_prepare(tmp_path / "out", tmp_path / "tree")
