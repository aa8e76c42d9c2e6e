"""What is written: formats, the folder that never looks complete and is not, full disks and kills."""

import errno
import hashlib
import itertools
import json
import os
from pathlib import Path

import pytest

from moe_engine.train.errors import InputError
from moe_engine.train.prepare import PrepareConfig, inputs, output, prepare

# -- formats --


def test_shards_are_cut_and_their_headers_tell_their_size(tmp_path, run_prepare, random_texts, write_jsonl):
    path = write_jsonl(tmp_path / "d.jsonl", random_texts(300))
    whole, train, val = run_prepare(tmp_path / "one", path)
    meta, *documents = run_prepare(tmp_path / "many", path, shard_tokens=1000, dataset="web-1")
    assert documents == [train, val] and meta["tokens"] == whole["tokens"]
    names = [shard["file"] for shard in meta["shards"] if shard["split"] == "train"]
    assert names == [f"web-1_train_{i:06d}.npy" for i in range(len(names))] and len(names) > 5
    assert all(shard["tokens"] == 1000 for shard in meta["shards"][: len(names) - 1])
    exact, *_ = run_prepare(tmp_path / "exact", path, shard_tokens=whole["tokens"]["train"])
    assert [s["tokens"] for s in exact["shards"]] == [whole["tokens"]["train"], whole["tokens"]["val"]]


def test_memory_mapped_format_holds_the_same_tokens(tmp_path, run_prepare, random_texts, write_jsonl):
    path = write_jsonl(tmp_path / "d.jsonl", random_texts(100))
    _, train, val = run_prepare(tmp_path / "npy", path)
    meta, bin_train, bin_val = run_prepare(tmp_path / "bin", path, format="bin", shard_tokens=10)
    assert (bin_train, bin_val) == (train, val)
    assert [shard["file"] for shard in meta["shards"]] == ["train.bin", "val.bin"]
    assert (tmp_path / "bin" / "train.bin").stat().st_size == 2 * meta["tokens"]["train"]


def test_a_large_vocabulary_takes_32_bits(tmp_path, run_prepare, random_texts, write_jsonl):
    meta, *_ = run_prepare(
        tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", random_texts(50)), tokenizer="o200k_base"
    )
    assert meta["dtype"] == "uint32"
    assert list(meta)[:7] == ["tokenizer", "vocab_size", "dtype", "dataset", "documents", "tokens", "eot"]
    assert list(meta)[7:] == ["format", "seed", "val_fraction", "shards"]


@pytest.mark.parametrize(("ranks", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_the_largest_vocabulary_of_16_bits(tmp_path, ranks, dtype, run_prepare, write_jsonl):
    meta, *_ = run_prepare(
        tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", ["a", "b"]), tokenizer=f"o200k_base:{ranks}"
    )
    assert (meta["dtype"], meta["vocab_size"]) == (dtype, ranks + 1)


# -- the output folder --


def test_a_finished_data_set_is_kept_unless_told_otherwise(tmp_path, run_prepare, read_prepared, write_jsonl):
    a, b = write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), write_jsonl(tmp_path / "b.jsonl", ["c", "d"])
    first, *_ = run_prepare(tmp_path / "out", a)
    with pytest.raises(InputError, match="holds a finished data set; give --overwrite"):
        run_prepare(tmp_path / "out", b)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        run_prepare(tmp_path / "out", bad, overwrite=True)
    assert read_prepared(tmp_path / "out")[0] == first, "a failed run leaves the old data set as it was"
    _, train, val = run_prepare(tmp_path / "out", b, overwrite=True, format="bin")
    assert sorted(train + val) == ["c", "d"]


@pytest.mark.parametrize("meta", [None, '{"tokenizer": "o200k_base", "vocab_size": 200000, "dataset": "x"}'])
def test_token_files_of_others_are_never_touched(tmp_path, meta, run_prepare, write_jsonl):
    path, out = write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), tmp_path / "out"
    out.mkdir()
    (out / "edu_train_000001.npy").write_bytes(b"precious")
    if meta:
        (out / "meta.json").write_text(meta)
    with pytest.raises(InputError, match=r"token files that moe-prepare did not write \(edu_train_000001\.npy\)"):
        run_prepare(out, path, overwrite=True)
    assert {p.name for p in out.iterdir()} == {"edu_train_000001.npy", *(["meta.json"] if meta else [])}


def test_other_files_in_the_folder_are_no_hindrance(tmp_path, write_jsonl, spec):
    (tmp_path / "README.md").write_text("keep me")
    run_dir = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    prepare(PrepareConfig(out_dir=str(tmp_path), input=[str(run_dir)], tokenizer=spec, workers=1))
    assert (tmp_path / "README.md").read_text() == "keep me" and (tmp_path / "meta.json").exists()


def test_names_in_a_meta_json_never_lead_out_of_the_folder(tmp_path, write_jsonl, spec):
    path, out, precious = write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), tmp_path / "out", tmp_path / "precious.npy"
    precious.write_bytes(b"x")
    out.mkdir()
    (out / "meta.json").write_text(json.dumps({"shards": [{"file": "../precious.npy"}, {"file": "notes.txt"}]}))
    (out / "notes.txt").write_text("keep")
    prepare(PrepareConfig(out_dir=str(out), input=[str(path)], tokenizer=spec, workers=1, overwrite=True))
    assert precious.exists() and (out / "notes.txt").exists()


def test_out_dir_that_cannot_be_written(tmp_path, run_prepare, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(InputError, match=r"--out_dir .*a\.jsonl: is a file"):
        run_prepare(path, path)
    with pytest.raises(InputError, match=r"--out_dir .*: cannot write there \(Not a directory\)"):
        run_prepare(path / "below", path)


def test_two_runs_do_not_write_into_one_folder(tmp_path, run_prepare, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with output.DatasetFolder(tmp_path / "out", overwrite=False) as folder:
        with pytest.raises(InputError, match="another moe-prepare is writing there"):
            run_prepare(tmp_path / "out", path)
        assert folder.staging.exists()
    run_prepare(tmp_path / "out", path)


def test_a_file_system_without_locks(tmp_path, monkeypatch, run_prepare, write_jsonl):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(output.fcntl, "flock", refuse)
    run_prepare(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", ["a", "b"]))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("shard", ["d_train_000000.npy", "d_val_000000.npy"])
def test_a_full_disk(tmp_path, monkeypatch, shard, run_prepare, random_texts, write_jsonl):
    def opened(path, mode):
        return open("/dev/full" if Path(path).name == shard else path, mode)

    monkeypatch.setattr(output, "open", opened, raising=False)
    with pytest.raises(InputError, match="no space left on the device; what was written has been removed") as info:
        run_prepare(tmp_path / "new" / "out", write_jsonl(tmp_path / "d.jsonl", random_texts(3000)), val_fraction=0.5)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "new").exists()


def test_an_input_that_cannot_be_read_midway(tmp_path, monkeypatch, run_prepare, write_jsonl):
    path = write_jsonl(tmp_path / "d.jsonl", ["a", "b"])

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        yield

    monkeypatch.setattr(inputs, "_unpacked", broken)
    with pytest.raises(InputError, match=r"d\.jsonl: Input/output error"):
        run_prepare(tmp_path / "out", path)
    assert not (tmp_path / "out").exists()


class Killed(BaseException):
    """Stands for the end of the process: nothing is cleaned up after it."""


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_step_of_the_last_moves(tmp_path, monkeypatch, overwrite, run_prepare, random_texts, write_jsonl):
    """Whatever is on disk afterwards: a meta.json only beside the files it lists, and the next run ends well."""
    old = write_jsonl(tmp_path / "old.jsonl", random_texts(40))
    new = write_jsonl(tmp_path / "new.jsonl", random_texts(60))
    outcomes = set()
    for step in itertools.count():
        out = tmp_path / f"out{step}"
        if overwrite:
            run_prepare(out, old, shard_tokens=1000)
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

            def commit(self, meta, counted=counted, original=output.DatasetFolder.commit):
                counted("rename")
                counted("unlink")
                original(self, meta)

            patch.setattr(output.DatasetFolder, "commit", commit)
            patch.setattr(output.DatasetFolder, "_leave", lambda self: self._lock.close())
            try:
                run_prepare(out, new, shard_tokens=1000, overwrite=overwrite)
            except Killed:
                killed = True
            except AssertionError:  # `read_prepared` found .preparing: the commit itself went through
                killed = False
            if (out / "meta.json").exists():
                meta = json.loads((out / "meta.json").read_text())
                outcomes.add(meta["dataset"])
                for shard in meta["shards"]:
                    data = (out / shard["file"]).read_bytes()
                    assert hashlib.sha256(data).hexdigest() == shard["sha256"]
            else:
                outcomes.add("none")
        _, train, val = run_prepare(out, new, shard_tokens=1000, overwrite=True)
        assert sorted(train + val) == sorted(random_texts(60))
        if not killed:
            break
    assert step > 5
    assert outcomes == ({"old", "none", "new"} if overwrite else {"none", "new"})
