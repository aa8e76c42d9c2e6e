"""The run folder's logs: notes, metrics.jsonl to the last bit, exact continuation, TensorBoard."""

import errno
import json
import math
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_engine.train import records
from moe_engine.train.errors import InputError
from moe_engine.train.metrics import WALL_CLOCK, RunLog, deterministic, read_metrics
from moe_engine.train.records import Records


def train_values(i: int) -> dict:
    rng = random.Random(i)
    return {
        "loss": 4 + 4 * math.exp(-i / 40) + rng.gauss(0, 0.05),
        "lr": 3e-4 * min(1, i / 20),
        "grad_norm": 0.8 + rng.random() * 0.2,
        "router_aux": 0.0003,
        "balance_per_layer": [1.0 + rng.random() / i, 1.0 + rng.random() / i],
        "expert_share": [[0.25, 0.25, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]],
        "tokens_per_second": 6000.0 + rng.random(),
        "mfu": 0.12,
        "data_wait": 0.004,
    }


def write_run(folder: Path, start: int, stop: int, *, truncate: bool = False) -> None:
    with RunLog(folder, console=False) as log:
        if truncate:
            log.truncate_after(start)
        for i in range(start + 1, stop + 1):
            log.metrics("train", i, **train_values(i))
            if i % 5 == 0:
                log.metrics("eval", i, loss=4 + 4 * math.exp(-i / 40))


# logs.txt and the terminal


def test_notes_go_to_the_file_and_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run") as log:
        log.note("first")
        assert (tmp_path / "run/logs.txt").read_text().endswith("first\n"), "flushed at once"
        log.warn("odd")
        log.note("two\nlines — ünïcode")
    with RunLog(tmp_path / "run", console=False) as log:
        log.note("only in the file")
    lines = (tmp_path / "run/logs.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[1] for line in lines] == [
        "first",
        "warning: odd",
        "two",
        "lines — ünïcode",
        "only in the file",
    ]
    assert capsys.readouterr().out.splitlines() == lines[:4]


def test_a_terminal_without_unicode_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "terminal", "w", encoding="ascii") as terminal, RunLog(tmp_path / "run") as log:
        monkeypatch.setattr("sys.stdout", terminal)
        log.note("straße \udc80")
        monkeypatch.undo()
    assert "stra\\xdfe \\udc80" in (tmp_path / "terminal").read_text()
    assert "straße \\udc80" in (tmp_path / "run/logs.txt").read_text(encoding="utf-8")


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run", is_main=False) as log:
        log.note("a")
        log.warn("b")
        log.metrics("train", 1, loss=1.0)
        log.truncate_after(0)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


# metrics.jsonl


def test_floats_survive_to_the_last_bit(tmp_path: Path) -> None:
    rng = random.Random(0)
    floats = [struct.unpack("d", rng.randbytes(8))[0] for _ in range(2000)]
    floats = [f for f in floats if math.isfinite(f)] + [0.1, -0.0, 5e-324, 1.7976931348623157e308]
    with RunLog(tmp_path, console=False) as log:
        log.metrics("train", 1, loss=torch.tensor(0.1), share=np.float32(0.3), all=floats, count=torch.tensor([1, 2]))
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert struct.pack("d", record["loss"]) == struct.pack("d", torch.tensor(0.1).item())
    assert record["share"] == float(np.float32(0.3))
    assert [struct.pack("d", f) for f in record["all"]] == [struct.pack("d", f) for f in floats]
    assert record["count"] == [1, 2]


def test_nan_and_infinity_are_valid_json_and_come_back(tmp_path: Path) -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    with RunLog(tmp_path, console=False) as log:
        log.metrics("train", 3, loss=math.nan, grad_norm=torch.tensor(math.inf), nested={"x": [[-math.inf, 1.0]]})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    raw = json.loads(line, parse_constant=no_constant)
    assert (raw["loss"], raw["grad_norm"], raw["nested"]) == ("NaN", "Infinity", {"x": [["-Infinity", 1.0]]})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["loss"])
    assert (record["grad_norm"], record["nested"]) == (math.inf, {"x": [[-math.inf, 1.0]]})


def test_lines_are_flushed_and_carry_kind_iteration_and_time(tmp_path: Path) -> None:
    log = RunLog(tmp_path, console=False)
    log.metrics("save", 7, path="ckpt", save_seconds=0.25)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    log.close()
    assert list(record) == ["kind", "iter", "path", "save_seconds", "time"]
    assert deterministic(record) == {"kind": "save", "iter": 7, "path": "ckpt"}
    assert {"tokens_per_second", "mfu", "data_wait", "memory", "eta", "time"} <= WALL_CLOCK


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    write_run(tmp_path / "whole", 0, 20)
    write_run(tmp_path / "parts", 0, 13)
    (tmp_path / "parts/metrics.jsonl").open("a").write('{"kind": "train", "iter": 14, "lo')  # killed in mid-line
    before = (tmp_path / "parts/metrics.jsonl").read_text().splitlines(keepends=True)
    write_run(tmp_path / "parts", 10, 20, truncate=True)
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [deterministic(r) for r in parts] == [deterministic(r) for r in whole]
    after = (tmp_path / "parts/metrics.jsonl").read_text().splitlines(keepends=True)
    assert after[:12] == before[:12], "what is kept is kept byte for byte"
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["logs.txt", "metrics.jsonl", "tensorboard"]


def test_truncation_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, 0, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    log = RunLog(tmp_path, console=False)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        log.truncate_after(2)
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_torn_last_line_is_skipped_and_never_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "iter": 1, "loss": 2.0}\n{"kind": "train", "iter": 2, "lo')
    assert [r["iter"] for r in read_metrics(path)] == [1]
    with RunLog(tmp_path, console=False) as log:
        log.metrics("train", 2, loss=1.0)
    assert [r["iter"] for r in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"kind": "train"}', '{"kind": "train", "iter": "x"}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "iter": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: expected a JSON object with kind and iter, got"):
        read_metrics(path)


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard_scalars_and_purge_after_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_run(tmp_path, 0, 6)
    files = list((tmp_path / "tensorboard").iterdir())
    assert len(files) == 1, "one event file, not one for every curve"
    write_run(tmp_path, 4, 5, truncate=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "eval/loss", "train/balance_per_layer/00", "train/balance_per_layer/01"} <= set(tags)
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5], "step 6 of the first run is hidden"
    assert events.Scalars("train/loss")[0].value == pytest.approx(train_values(1)["loss"], rel=1e-6)


# Files that cannot be written, or are gone


def iterations(folder: Path) -> list[int]:
    return [record["iter"] for record in read_metrics(folder / "metrics.jsonl")]


def texts(folder: Path) -> list[str]:
    return [line.split(" | ", 1)[1] for line in (folder / "logs.txt").read_text().splitlines()]


def board(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk that refuses writes while `error` is set, after it took `takes` bytes of each file's next."""
    state = SimpleNamespace(error=None, takes=0, uncut=False)
    write, cut = os.write, os.ftruncate

    def limited(descriptor: int, data: bytes) -> int:
        if state.error is None:
            return write(descriptor, data)
        if state.takes:
            taken, state.takes = write(descriptor, data[: state.takes]), 0
            return taken
        raise OSError(state.error, os.strerror(state.error))

    def uncuttable(descriptor: int, length: int) -> None:
        if state.uncut:
            raise OSError(state.error, os.strerror(state.error))
        cut(descriptor, length)

    monkeypatch.setattr(records.os, "write", limited)
    monkeypatch.setattr(records.os, "ftruncate", uncuttable)
    return state


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("uncut", [False, True], ids=["cut", "cannot be cut"])
def test_lines_wait_for_a_disk_that_fails(
    tmp_path: Path, disk: SimpleNamespace, capfd: pytest.CaptureFixture[str], number: int, uncut: bool
) -> None:
    with RunLog(tmp_path / "run", console=False) as log:
        log.note("before")
        log.metrics("train", 1, loss=1.0)
        disk.error, disk.takes, disk.uncut = number, 7, uncut
        for i in (2, 3):
            log.metrics("train", i, loss=1.0)
            log.note(f"note {i}")
        disk.uncut = False
        log.metrics("train", 4, loss=1.0)
        assert iterations(tmp_path / "run") == [1] and texts(tmp_path / "run") == ["before"]
        disk.error = None
        log.metrics("train", 5, loss=1.0)
        assert iterations(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert texts(tmp_path / "run") == [
        "before", "note 2", "note 3", "the logs can be written again; lines that had to wait are in their places"
    ]  # fmt: skip
    assert (tmp_path / "run/metrics.jsonl").read_bytes().count(b"\n") == 5
    assert board(tmp_path / "run") == [1, 2, 3, 4, 5]
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"warning: {tmp_path / 'run/'}")
    assert f"{os.strerror(number)}; training goes on" in error


def test_what_waits_at_the_end_is_tried_once_more_and_counted(
    tmp_path: Path, disk: SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path / "later", console=False)
    disk.error = errno.ENOSPC
    log.note("late")
    disk.error = None
    log.close()
    assert texts(tmp_path / "later")[0] == "late"
    log = RunLog(tmp_path / "never", console=False)
    disk.error = errno.ENOSPC
    log.note("one")
    log.metrics("train", 1, loss=1.0)
    capfd.readouterr()
    log.close()
    line = f"warning: 2 lines of the logs in {tmp_path / 'never'} are lost: No space left on device\n"
    assert capfd.readouterr().err == line


def test_memory_for_waiting_lines_is_bounded(tmp_path: Path, disk: SimpleNamespace) -> None:
    file = Records(tmp_path / "file", kept_bytes=100)
    disk.error = errno.ENOSPC
    for i in range(1000):
        file.add(b"%09d\n" % i)
        assert not file.flush()
    disk.error = None
    assert file.flush() and file.dropped == 990
    assert (tmp_path / "file").read_text().split() == [f"{i:09d}" for i in range(990, 1000)], "the newest"
    file.close()


def test_dropped_lines_are_told_of(tmp_path: Path, disk: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Records.__init__, "__kwdefaults__", {"lines": True, "kept_bytes": 100})
    with RunLog(tmp_path, console=False) as log:
        disk.error = errno.ENOSPC
        for i in range(5):
            log.note("a line of some length" * 2 + str(i))
        disk.error = None
        log.note("end")
    assert texts(tmp_path)[-1].endswith("; 4 of them, the oldest, are lost")


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_folder_that_vanishes_is_made_anew(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    run, calls = tmp_path / "a/run", []

    def restore() -> None:
        calls.append(sorted(p.name for p in run.iterdir()))
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        (run / "config.toml").touch()

    with RunLog(run, console=False, restore=restore) as log:
        log.note("old")
        log.metrics("train", 1, loss=1.0)
        if how == "deleted":
            shutil.rmtree(tmp_path / "a")
        else:
            (tmp_path / "a").rename(tmp_path / "b")
        for i in (2, 3):
            log.metrics("train", i, loss=1.0)
        log.note("new")
        assert (tmp_path / "b").exists() == (how == "moved")
        assert calls == [[], []], "before there are logs, until it could be done"
    assert iterations(run) == [2, 3] and board(run) == [3]
    assert sorted(p.name for p in run.iterdir()) == ["config.toml", "logs.txt", "metrics.jsonl", "tensorboard"]
    (anew,) = (t for t in texts(run) if "begun anew" in t)
    assert anew.startswith("warning: logs.txt, metrics.jsonl, events.out.") and f"begun anew in {run}" in anew
    assert texts(run)[-1] == "new" and capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["logs.txt", "metrics.jsonl", "tensorboard"])
def test_a_file_that_vanishes_is_made_anew(tmp_path: Path, name: str) -> None:
    with RunLog(tmp_path, console=False) as log:
        log.metrics("train", 1, loss=1.0)
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        for i in (2, 3):
            log.metrics("train", i, loss=1.0)
            log.note(f"note {i}")
    assert sum("begun anew" in t for t in texts(tmp_path)) == 1
    assert [t for t in texts(tmp_path) if t.startswith("note")] == ["note 2", "note 3"]
    assert iterations(tmp_path) == ([2, 3] if name == "metrics.jsonl" else [1, 2, 3])
    assert board(tmp_path)[-1] == 3


def test_pictures_and_samples_that_fail_are_one_warning_each(tmp_path: Path) -> None:
    with RunLog(tmp_path, console=False) as log:
        for what in ("plots", "samples", "plots"):
            with log.beside(what):
                raise OSError(errno.ENOSPC, "No space left on device")
    assert texts(tmp_path) == [
        f"warning: {what} not written (OSError: [Errno 28] No space left on device)" for what in ("plots", "samples")
    ]


def test_a_full_disk(tmp_path: Path, in_small_tmpfs: Callable) -> None:
    done = in_small_tmpfs(
        """
        from pathlib import Path
        from moe_engine.train.metrics import RunLog, read_metrics
        run, ballast = Path(MOUNT) / "run", Path(MOUNT) / "ballast"
        with RunLog(run, console=False) as log:
            log.note("before")
            log.metrics("train", 0, loss=0.0, text="")
            with open(ballast, "wb", buffering=0) as file:  # all but the rest of the pages that the logs have begun
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass
            for i in range(1, 100):
                log.metrics("train", i, loss=1.0, text="x" * 500)
                log.note("y" * 500)
            found = [r["iter"] for r in read_metrics(run / "metrics.jsonl")]
            assert found == list(range(len(found))) and 1 < len(found) < 50, found
            for name in ("metrics.jsonl", "logs.txt"):
                assert (run / name).read_bytes().endswith(b"\\n"), "no half line"
            ballast.unlink()
            log.note("after")
        assert [r["iter"] for r in read_metrics(run / "metrics.jsonl")] == list(range(100))
        lines = (run / "logs.txt").read_text().splitlines()
        assert [line[22:] for line in lines[:100]] == ["before", *["y" * 500] * 99] and lines[100].endswith("after")
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "No space left on device; training goes on" in done.stderr


def test_the_clock_going_back_does_not_reorder_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files in the order of their names, and a resumed run hides what comes after its start."""
    write_run(tmp_path, 0, 6)
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now - 86_400)
    write_run(tmp_path, 4, 5, truncate=True)
    names = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert len(names) == 2 and board(tmp_path) == [1, 2, 3, 4, 5]
