"""The split, the worker processes, and the command from its options to its exit status."""

import itertools
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from moe_engine.train.errors import InputError
from moe_engine.train.prepare import PrepareConfig, command, inputs, prepare, progress, split
from moe_engine.train.prepare.encode import EncodeOptions, encode_batches
from moe_engine.train.prepare.inputs import Batch

# -- the split --


def test_split_is_a_function_of_seed_and_text(tmp_path, monkeypatch, run_prepare, random_texts, write_jsonl):
    monkeypatch.setattr(split, "HELD_TOKENS", 1)
    documents = random_texts(3000, words=3)
    forward = write_jsonl(tmp_path / "a.jsonl", documents)
    backward = write_jsonl(tmp_path / "b.jsonl", documents[::-1])
    meta, train, val = run_prepare(tmp_path / "1", forward, val_fraction=0.1)
    assert 0.07 < len(val) / len(documents) < 0.13
    assert not set(train) & set(val)
    assert set(run_prepare(tmp_path / "2", backward, val_fraction=0.1)[2]) == set(val)
    assert run_prepare(tmp_path / "3", forward, val_fraction=0.1)[0] == meta
    assert set(run_prepare(tmp_path / "4", forward, val_fraction=0.1, seed=7)[2]) != set(val)


def test_few_documents_yield_a_validation_part_in_any_order(tmp_path, run_prepare, random_texts, write_jsonl):
    documents = random_texts(20)
    results = []
    for name, order in (("a", documents), ("b", documents[::-1])):
        meta, train, val = run_prepare(
            tmp_path / name, write_jsonl(tmp_path / f"{name}.jsonl", order), val_fraction=0.2
        )
        assert 0.1 < meta["tokens"]["val"] / sum(meta["tokens"].values()) < 0.35
        results.append((set(train), set(val)))
    assert results[0] == results[1]


@pytest.mark.parametrize("seed", range(8))
def test_two_documents_go_to_different_parts(tmp_path, seed, run_prepare, write_jsonl):
    """With a fraction of a half, four seeds in eight would put both on one side."""
    path = write_jsonl(tmp_path / "d.jsonl", ["one", "two"])
    _, train, val = run_prepare(tmp_path / "out", path, seed=seed, val_fraction=0.5)
    assert sorted(train + val) == ["one", "two"] and len(val) == 1


def test_equal_documents_stand_on_one_side(tmp_path, run_prepare, write_jsonl):
    _, train, val = run_prepare(tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", ["one", "two"] * 30))
    assert sorted([train, val]) == [["one"] * 30, ["two"] * 30]


def test_one_document_is_taken_when_the_held_part_has_none(
    tmp_path, monkeypatch, run_prepare, random_texts, write_jsonl
):
    monkeypatch.setattr(split, "HELD_TOKENS", 500)
    path = write_jsonl(tmp_path / "d.jsonl", random_texts(200))
    monkeypatch.setattr(inputs, "BATCH_BYTES", 1000)
    monkeypatch.setattr(inputs, "_CHUNK", 1000)
    _, train, val = run_prepare(tmp_path / "out", path, val_fraction=1e-9)
    assert len(val) == 1 and len(train) == 199
    assert val[0] in random_texts(200)[:20]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "the document list is empty: no text was found"),
        (["", "  \n", None], "the document list is empty: no text was found"),
        (["alone"], "only one document, so the validation part is empty; give more documents"),
        (["same", "same"], "2 documents, but not two different ones"),
    ],
)
def test_too_few_documents(tmp_path, documents, message, run_prepare, write_jsonl):
    path = write_jsonl(tmp_path / "d.jsonl", documents)
    with pytest.raises(InputError, match=message):
        run_prepare(tmp_path / "deep" / "out", path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl"]


# -- processes --


def test_output_does_not_depend_on_the_workers(tmp_path, monkeypatch, run_prepare, random_texts, write_jsonl):
    monkeypatch.setattr(inputs, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(inputs, "_CHUNK", 10_000)
    path = write_jsonl(tmp_path / "d.jsonl", random_texts(2000))
    one, *_ = run_prepare(tmp_path / "one", path)
    two, *_ = run_prepare(tmp_path / "two", path, workers=2)
    assert one == two


@pytest.mark.parametrize(
    ("cores", "megabytes", "expected"), [(1, 9999, 1), (4, 9999, 4), (64, 9999, 5), (4, 20, 1), (4, 40, 2), (4, 0, 4)]
)
def test_default_number_of_workers(monkeypatch, cores, megabytes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    assert command._default_workers(megabytes << 20) == expected


def test_reading_stays_a_few_batches_ahead(spec):
    read_so_far, options = [], EncodeOptions(spec, "uint16", 1, "text", "text")

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


def test_a_workers_error_reaches_the_caller(tmp_path, run_prepare):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "good"}\nbad\n')
    with pytest.raises(InputError, match=r"d\.jsonl:2: not valid JSON"):
        run_prepare(tmp_path / "out", path, workers=2)
    assert not (tmp_path / "out").exists()


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_dead_worker_is_an_error_and_not_a_hang(spec):
    batches = [Batch("rows", "x", 1, [Deadly()], 4)]
    with pytest.raises(InputError, match="a worker process ended unexpectedly"):
        list(encode_batches(batches, EncodeOptions(spec, "uint16", 1, "text", "text"), workers=2))


def test_workers_need_no_torch():
    """Its import would cost each of them seconds and hundreds of megabytes."""
    code = "import sys, moe_engine.train.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- options --


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
def test_bad_options(tmp_path, options, message, write_jsonl, spec):
    path = write_jsonl(tmp_path / "d.jsonl", ["a", "b"])
    with pytest.raises(InputError) as info:
        prepare(PrepareConfig(out_dir=str(tmp_path / "out"), **{"input": [str(path)], "tokenizer": spec, **options}))
    assert message in str(info.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "expected"), [("my_train_data.jsonl", "my-train-data"), ("a b&c.jsonl.gz", "a_b_c"), ("&.jsonl", "text")]
)
def test_names_of_data_sets(tmp_path, name, expected, run_prepare, write_jsonl):
    assert run_prepare(tmp_path / "out", write_jsonl(tmp_path / name, ["a", "b"]))[0]["dataset"] == expected


def test_max_tokens_stops_early(tmp_path, monkeypatch, run_prepare, random_texts, write_jsonl):
    monkeypatch.setattr(inputs, "BATCH_BYTES", 1000)
    monkeypatch.setattr(inputs, "_CHUNK", 1000)
    meta, *_ = run_prepare(tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", random_texts(500)), max_tokens=3000)
    assert 3000 <= sum(meta["tokens"].values()) < 5000


# -- the command --


@pytest.fixture
def start(spec):
    """Starts the command in its own process group: two workers, standard input as a pipe, more than one batch sent."""

    def run(out_dir):
        options = ["--input=-", f"--out-dir={out_dir}", f"--tokenizer={spec}", "--workers=2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "moe_engine.train.prepare", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            # A shell has its background jobs ignore it, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        process.stdin.write("".join(f"line {i}\n" for i in range(500_000)).encode())
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while len(children := psutil.Process(process.pid).children(recursive=True)) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        return process, children

    return run


def test_interrupted(tmp_path, start):
    process, children = start(tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to all processes of the group
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == (b"", b"interrupted\n")
    assert not (tmp_path / "out").exists()
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_killed_and_run_again(tmp_path, run_prepare, write_jsonl, start):
    process, children = start(tmp_path / "out")
    process.kill()
    process.communicate(timeout=60)
    assert psutil.wait_procs(children, timeout=10)[1] == [], "workers end with their parent"
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".preparing"]
    run_prepare(tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", ["a", "b"]))  # checks for leftovers


def test_the_command_reports_and_exits_with_its_status(tmp_path, capsys, random_texts, write_jsonl, spec):
    write_jsonl(tmp_path / "d.jsonl", [*random_texts(100), ""])
    for i in range(7):
        (tmp_path / f"bad{i}.txt").write_bytes(b"\xff")
    arguments = ["--input", str(tmp_path), "--out_dir", str(tmp_path / "out"), "--tokenizer", spec, "--workers=1"]
    assert command.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "characters per token" in out and "MB/s" in out and f"written    {tmp_path / 'out'}" in out
    assert "1 empty documents, 7 files that are not UTF-8 text" in out and "bad4.txt" in out and "… and 2 more" in out
    assert err == ""
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: --out_dir")


def test_help_tells_what_a_document_is(capsys):
    assert command.main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "more than 256 KB is cut at line ends into sections of about 64 KB" in text
    assert "into sections of about 4 KB: it needs 8 KB or more" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(tmp_path, monkeypatch, capsys, terminal, run_prepare, random_texts, write_jsonl):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(progress, "_SECONDS_PER_LINE", 0.0)
    monkeypatch.setattr(inputs, "BATCH_BYTES", 1000)
    monkeypatch.setattr(inputs, "_CHUNK", 1000)
    run_prepare(tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", random_texts(20)))
    err = capsys.readouterr().err
    assert "MB/s" in err and "preparing" in err
    assert terminal or ("% read, ETA 0:00:" in err and err.count("\n") > 3)
