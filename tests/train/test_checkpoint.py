"""Checkpoints: what is on the disk, that damage is seen and the one before is used, that writing is beside training."""

import dataclasses
import errno
import json
import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from moe_engine.train import __main__ as command
from moe_engine.train import checkpoint as checkpoint_module
from moe_engine.train import published, storage
from moe_engine.train.checkpoint import Checkpoints
from moe_engine.train.errors import InputError
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import deterministic, read_metrics
from moe_engine.train.parallel import World

ONE = World(0, 1, 0)
CPU = torch.device("cpu")


def records(config, kind="train"):
    found = read_metrics(Path(config.out_dir) / "metrics.jsonl")
    return [deterministic(record) for record in found if record["kind"] == kind]


def data_of(config, iteration):
    """The tensors in a checkpoint of a run on one rank."""
    return load_file(Path(config.out_dir) / f"ckpt/step_{iteration:08d}/ckpt_rank00000.safetensors")


def assert_same_data(one, other, iteration):
    a, b = data_of(one, iteration), data_of(other, iteration)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if not k.startswith("rng."))


@pytest.fixture(scope="module")
def whole(small_run_in, tmp_path_factory):
    """A run that nothing happens to, with checkpoints of iterations 4, 8 and 12; not to be changed."""
    config = small_run_in(tmp_path_factory.mktemp("runs") / "whole", save_every=4, eval_interval=4)
    assert command.train(config) == 0
    return config


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it."""
    shutil.copytree(whole.out_dir, tmp_path / "run")
    return dataclasses.replace(whole, out_dir=str(tmp_path / "run"))


@pytest.fixture
def folder(run):
    return Path(run.out_dir) / "ckpt"


def test_a_checkpoint_is_what_it_says(run, folder):
    path = folder / "step_00000012"
    assert sorted(p.name for p in folder.iterdir()) == [
        "best", "latest", "step_00000004", "step_00000008", "step_00000012",
    ]  # fmt: skip
    assert sorted(p.name for p in path.iterdir()) == [
        "SHA256SUMS", "ckpt_rank00000.safetensors", "metadata.json", "state.json",
    ]  # fmt: skip
    assert subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, check=False).returncode == 0
    trainer = Trainer(run, ONE, CPU)
    trainer.resume(path)
    tensors = load_file(path / "ckpt_rank00000.safetensors")
    named = dict(trainer.model.named_parameters())
    assert {n for n in tensors if n.startswith("model.")} == {f"model.{n}" for n in named}
    for name, parameter in named.items():
        moments = trainer.engine.optimizer.state[parameter]
        assert torch.equal(tensors[f"model.{name}"], parameter)
        assert torch.equal(tensors[f"optimizer.{name}.exp_avg_sq"], moments["exp_avg_sq"])
        assert float(tensors[f"optimizer.{name}.step"]) == 12
    state = json.loads((path / "state.json").read_text())
    assert (state["iteration"], state["ranks"], state["loader"]["seed"]) == (12, 1, run.seed)
    assert state["arguments"]["lr"] == run.lr and "moe-engine" in state["code"]["versions"]
    saves = [r for r in read_metrics(Path(run.out_dir) / "metrics.jsonl") if r["kind"] == "save"]
    assert [r["iter"] for r in saves] == [4, 8, 12]
    assert all(0 < r["stall_seconds"] < 10 and r["write_seconds"] > 0 and r["bytes"] > 100_000 for r in saves)
    assert "training waited" in (Path(run.out_dir) / "logs.txt").read_text()


DAMAGE = {
    "one bit of a weight": ("ckpt_rank00000.safetensors", "flip", "ckpt_rank00000.safetensors is damaged"),
    "data cut in half": ("ckpt_rank00000.safetensors", "cut", "ckpt_rank00000.safetensors is damaged or truncated"),
    "data empty": ("ckpt_rank00000.safetensors", "empty", r"damaged or truncated \(0 bytes"),
    "data gone": ("ckpt_rank00000.safetensors", "remove", "ckpt_rank00000.safetensors is missing"),
    "a state that is JSON": ("state.json", "other", "state.json is damaged"),
    "state cut": ("state.json", "cut", "state.json is damaged"),
    "metadata flipped": ("metadata.json", "flip", "metadata.json is damaged"),
    "sums gone": ("SHA256SUMS", "remove", "SHA256SUMS is missing"),
    "sums cut": ("SHA256SUMS", "cut", "SHA256SUMS is damaged"),
    "sums without a file": ("SHA256SUMS", "last line", "SHA256SUMS lists state.json wrongly or not at all"),
    "sums empty": ("SHA256SUMS", "empty", "SHA256SUMS lists"),
    "a name that leads out": ("SHA256SUMS", "lead out", "SHA256SUMS is damaged"),
}


def spoil(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[len(data) * 2 // 3] ^= 4
    elif kind == "cut":
        data = data[: len(data) // 2]
    elif kind == "empty":
        data = b""
    elif kind == "other":
        data = data.replace(b'"iteration": 12', b'"iteration": 13')
    elif kind == "last line":
        data = b"".join(bytes(data).splitlines(keepends=True)[:-1])
    elif kind == "lead out":
        data = bytes(data).replace(b"state.json", b"../x.json")
    path.unlink() if kind == "remove" else path.write_bytes(data)


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_seen_and_named(run, folder, case):
    file, kind, expected = DAMAGE[case]
    checkpoints = Checkpoints(Path(run.out_dir), ONE)
    assert checkpoints.defect(folder / "step_00000012") is None
    spoil(folder / "step_00000012" / file, kind)
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(checkpoints.defect(folder / "step_00000012"))
    path, notes = checkpoints.newest_sound()
    assert path == folder / "step_00000008"
    assert len(notes) == 1 and "step_00000012" in notes[0] and "the one before it is used" in notes[0]
    assert (folder / "step_00000012.damaged").is_dir() and checkpoints.latest() == path


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_bit_for_bit(run, whole, folder):
    for iteration in (8, 12):
        spoil(folder / f"step_{iteration:08d}" / "ckpt_rank00000.safetensors", "flip")
    assert command.train(dataclasses.replace(run, keep_last_n=1)) == 0
    log = (Path(run.out_dir) / "logs.txt").read_text()
    assert log.count("put aside as step_") == 2 and f"resuming from {folder / 'step_00000004'}" in log
    assert records(run) == records(whole) and records(run, "eval") == records(whole, "eval")
    assert_same_data(run, whole, 12)
    # What is damaged neither counts for pruning nor is it used again.
    assert sorted(p.name for p in folder.glob("step_*")) == [
        "step_00000008.damaged", "step_00000012", "step_00000012.damaged",
    ]  # fmt: skip


def test_no_sound_checkpoint_is_an_error_and_not_a_new_start(run, folder, capsys):
    before = (Path(run.out_dir) / "metrics.jsonl").read_bytes()
    for path in folder.glob("step_*"):
        spoil(path / "state.json", "cut")
    for _ in range(2):  # nor is it one the second time
        with pytest.raises(InputError, match=r"holds no checkpoint that can be used .*step_00000012: state\.json is"):
            command.train(run)
    assert len(list(folder.glob("step_*"))) == 3 and (Path(run.out_dir) / "metrics.jsonl").read_bytes() == before
    for path in folder.glob("step_*"):
        shutil.rmtree(path)
    with pytest.raises(InputError, match="step_00000012, which `latest` names, is not there"):
        command.train(run)
    shutil.rmtree(folder)  # as where ckpt is on a disk of its own, and that is not mounted
    with pytest.raises(InputError, match=r"metrics\.jsonl tells of checkpoints up to iteration 12, ckpt holds none"):
        command.train(run)
    assert (Path(run.out_dir) / "metrics.jsonl").read_bytes() == before
    assert command.train(dataclasses.replace(run, fresh=True)) == 0
    assert [r["iter"] for r in records(run)] == list(range(1, 13))


def test_a_new_run_does_not_begin_beside_checkpoints_of_another(run, folder):
    """It would go on from them after a kill: they are newer than what it has saved until then."""
    (Path(run.out_dir) / "config.toml").unlink()
    with pytest.raises(InputError, match="ckpt holds checkpoints of another run"):
        command.train(dataclasses.replace(run, fresh=True))
    assert len(list(folder.glob("step_*"))) == 3


def test_what_cannot_be_read_today_is_not_taken_for_damaged(run, folder, monkeypatch):
    def refused(path):
        raise OSError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        patch.setattr(published, "sha256_of", refused)
        command.train(run)
    assert not list(folder.glob("*.damaged")) and len(list(folder.glob("step_*"))) == 3
    assert command.train(run) == 0


def test_what_was_never_finished_is_removed_and_said(run, folder):
    half = folder / "step_00000016.tmp-0123abcd"
    half.mkdir()
    (half / "ckpt_rank00000.safetensors").write_bytes(b"half")
    (folder / "latest.tmp").write_text("step_0000")
    path, notes = Checkpoints(Path(run.out_dir), ONE).newest_sound()
    assert path == folder / "step_00000012" and not half.exists()
    assert notes == [f"checkpoint {folder / 'step_00000016'} was never finished: removed"]


def test_killed_between_the_two_renames_of_a_replacement(run, folder):
    (folder / "step_00000012").rename(folder / "step_00000012.old")
    assert Checkpoints(Path(run.out_dir), ONE).newest_sound() == (folder / "step_00000012", [])
    shutil.copytree(folder / "step_00000012", folder / "step_00000012.old")  # and after the second one
    assert Checkpoints(Path(run.out_dir), ONE).newest_sound()[0] == folder / "step_00000012"
    assert not list(folder.glob("*.old"))


def test_killed_between_a_checkpoints_rename_and_its_pointers(run, folder):
    """`best` would name another one for ever: the loss to beat is in the checkpoint that is gone on from."""
    assert [(folder / name).read_text() for name in ("latest", "best")] == ["step_00000012\n"] * 2
    (folder / "latest").write_text("step_00000008\n")
    (folder / "best").unlink()
    (folder / "latest.tmp").write_text("step_000")
    assert command.train(run) == 0
    assert [(folder / name).read_text() for name in ("latest", "best")] == ["step_00000012\n"] * 2
    assert not list(folder.glob("*.tmp"))


def test_a_run_that_never_had_a_checkpoint_begins_again(whole, tmp_path, monkeypatch):
    killed = dataclasses.replace(whole, out_dir=str(tmp_path / "killed"))

    class Killed(BaseException):
        pass

    def kill_at_three(self):
        if self.iteration == 3:
            raise Killed
        return step(self)

    step = Trainer.train_step
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "train_step", kill_at_three)
        command.train(killed)
    assert len(records(killed)) == 3
    assert command.train(killed) == 0
    for kind in ("train", "eval"):
        assert records(killed, kind) == records(whole, kind)


def test_killed_between_the_rename_and_the_pointers(whole, tmp_path, monkeypatch):
    """`best` and `latest` name the new checkpoint once the run goes on, so that pruning keeps it."""
    config = dataclasses.replace(whole, out_dir=str(tmp_path / "killed"), keep_last_n=1)
    folder = tmp_path / "killed/ckpt"

    class Killed(BaseException):
        pass

    def kill(path, text):
        if path.name == "latest" and "12" in text:
            raise Killed
        write(path, text)

    write = checkpoint_module.write_atomically
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint_module, "write_atomically", kill)
        command.train(config)
    assert (folder / "best").read_text() == (folder / "latest").read_text() == "step_00000008\n"
    assert command.train(dataclasses.replace(config, max_iters=14, eval_interval=0)) == 0
    assert (folder / "best").read_text() == "step_00000012\n"
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_00000012", "step_00000014"]


def test_pointers_to_what_is_damaged_go_back(run, folder):
    assert (folder / "best").read_text() == "step_00000012\n"
    spoil(folder / "step_00000012/state.json", "cut")
    Checkpoints(Path(run.out_dir), ONE).newest_sound()
    assert (folder / "best").read_text() == (folder / "latest").read_text() == "step_00000008\n"


def test_a_format_of_before_is_named_and_left_alone(run, folder):
    for path in folder.glob("step_*"):
        (path / "SHA256SUMS").unlink()
        (path / ".metadata").write_bytes(b"")
    with pytest.raises(InputError, match="step_00000012: written by a version of moe-engine from before format 2"):
        command.train(run)
    assert len(list(folder.glob("step_*"))) == 3


# Beside training


def test_training_goes_on_while_a_checkpoint_is_written(whole, tmp_path, monkeypatch):
    """The disk takes four iterations, and what it gets are the weights of when the save began."""
    slow, save_file, step = threading.Event(), storage.save_file, Trainer.train_step
    monkeypatch.setattr(storage, "save_file", lambda *a: (slow.wait(60), save_file(*a))[1])
    seen = {}

    def watch(self):
        seen[self.iteration] = (self.checkpoints.writing, self.checkpoints.complete())
        if self.iteration == 7:
            slow.set()
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", watch)
    config = dataclasses.replace(whole, out_dir=str(tmp_path / "slow"))
    assert command.train(config) == 0
    assert [seen[i][0] for i in (4, 5, 6, 7)] == [True] * 4 and seen[6][1] == []
    assert_same_data(config, whole, 4)
    assert records(config) == records(whole)
    stalls = [r["stall_seconds"] for r in read_metrics(Path(config.out_dir) / "metrics.jsonl") if r["kind"] == "save"]
    assert len(stalls) == 3


def test_without_async_save_training_waits_and_there_is_no_copy(whole, tmp_path, monkeypatch):
    seen, step = {}, Trainer.train_step

    def watch(self):
        seen[self.iteration] = (self.checkpoints.writing, [p.name for p in self.checkpoints.complete()])
        seen["copies"] = len(self.checkpoints._staging._buffers)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", watch)
    config = dataclasses.replace(whole, out_dir=str(tmp_path / "run"), async_save=False)
    assert command.train(config) == 0
    assert seen[4] == (False, ["step_00000004"]) and seen["copies"] == 0
    assert_same_data(config, whole, 12)


FAILURES = {
    "OSError": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_full_disk_ends_no_run_and_keeps_the_last_checkpoint(whole, tmp_path, monkeypatch, case):
    """A save and its second attempt find the disk full; the next one, after there is room again, does not."""
    config = dataclasses.replace(whole, out_dir=str(tmp_path / "full"))
    save_file, calls = storage.save_file, []

    def full(tensors, path):
        calls.append(path.parent.name[:13])
        if len(calls) in (2, 3):
            path.write_bytes(b"half")
            raise FAILURES[case]
        save_file(tensors, path)

    monkeypatch.setattr(storage, "save_file", full)
    assert command.train(config) == 0
    log = (Path(config.out_dir) / "logs.txt").read_text()
    assert log.count("checkpoint not written: No space left on device") == 2
    assert f"{Path(config.out_dir) / 'ckpt/step_00000004'} is the newest; training goes on" in log
    assert calls[:2] == ["step_00000004", "step_00000008"] and calls[-1] == "step_00000012"
    assert calls[2] in {"step_00000009", "step_00000010", "step_00000011"}  # as soon as the first failure was known
    names = sorted(p.name for p in (Path(config.out_dir) / "ckpt").iterdir())
    assert "step_00000008" not in names and not [n for n in names if "tmp" in n]
    assert_same_data(config, whole, 12)


def test_the_loss_of_a_checkpoint_that_could_not_be_written_is_none_to_beat(small_run, monkeypatch):
    save_file, calls = storage.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(storage, "save_file", full)
    config = small_run(max_iters=8, async_save=False)
    assert command.train(config) == 0
    state = json.loads((Path(config.out_dir) / "ckpt/step_00000007/state.json").read_text())
    assert state["evaluated_at"] == 6 and state["best_val_loss"] is None and not state["is_best"]


def test_a_disk_that_is_gone_for_a_while_ends_no_run(whole, tmp_path, monkeypatch):
    """Not even its folders can be listed then."""
    config = dataclasses.replace(whole, out_dir=str(tmp_path / "gone"))
    save_file, complete, calls = storage.save_file, Checkpoints.complete, []

    def refuse(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        save_file(tensors, path)

    def refuse_to_list(self):
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return complete(self)

    monkeypatch.setattr(storage, "save_file", refuse)
    monkeypatch.setattr(Checkpoints, "complete", refuse_to_list)
    assert command.train(config) == 0
    assert "Input/output error; the one before it is the newest" in (tmp_path / "gone/logs.txt").read_text()
    assert_same_data(config, whole, 12)


def test_a_disk_that_stays_full_is_an_error_at_the_end(small_run, monkeypatch, capsys):
    config = small_run(save_every=4, max_iters=4)
    assert command.train(config) == 0

    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    flags = ["--config", str(Path(config.out_dir) / "config.toml"), "--max_iters", "6"]
    assert command.main(flags) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and "checkpoint not written: No space left on device" in line
    assert Checkpoints(Path(config.out_dir), ONE).newest_sound()[0].name == "step_00000004"
    monkeypatch.undo()
    assert command.main(flags) == 0


def test_a_publish_that_fails_leaves_nothing_half(small_run, monkeypatch):
    config = small_run(save_every=4, max_iters=4)
    trainer = Trainer(config, ONE, CPU)
    trainer.train_step()
    write = checkpoint_module.write_atomically

    def full(path, text):
        if path.name == "SHA256SUMS":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(checkpoint_module, "write_atomically", full)
    checkpoints, model, optimizer = trainer.checkpoints, trainer.model, trainer.engine.optimizer
    checkpoints.save(model, optimizer, {"iteration": 1}, CPU)
    with pytest.raises(OSError, match="checkpoint not written: No space left"):
        checkpoints.finish()
    assert list(checkpoints.folder.iterdir()) == []
    monkeypatch.undo()
    checkpoints.save(model, optimizer, {"iteration": 1}, CPU)
    assert checkpoints.finish().path == checkpoints.folder / "step_00000001"
    trainer.loader.close()


def test_data_is_on_the_disk_before_the_checkpoint_has_its_name(small_run, monkeypatch):
    """The order of fsync and rename, which is all that a power cut leaves to rely on."""
    events = []
    names = {}
    fsync, rename, opened = os.fsync, os.rename, os.open

    def noted_open(path, *args, **kwargs):
        descriptor = opened(path, *args, **kwargs)
        names[descriptor] = Path(path).name
        return descriptor

    def noted_fsync(descriptor):
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noted_rename(a, b):
        events.append(f"rename {Path(a).name.partition('-')[0]} {Path(b).name}")
        rename(a, b)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    assert command.train(small_run(max_iters=2)) == 0
    published = events.index("rename step_00000002.tmp step_00000002")
    before, after = events[:published], events[published + 1 :]
    for name in ("ckpt_rank00000.safetensors", "metadata.json.tmp", "state.json.tmp", "SHA256SUMS.tmp"):
        assert f"sync {name}" in before
    assert after[0] == "sync ckpt" and 0 < after.index("sync latest.tmp") < after.index("sync best.tmp")
    assert not {"sync latest.tmp", "sync best.tmp"} & set(before)


def test_pruning_comes_after_the_new_one_is_safe(run, folder, monkeypatch):
    order = []
    prune, sync = Checkpoints._prune, checkpoint_module.sync_file
    monkeypatch.setattr(Checkpoints, "_prune", lambda self, *a: (order.append("prune"), prune(self, *a)))
    monkeypatch.setattr(checkpoint_module, "sync_file", lambda path: (order.append(path.name), sync(path)))
    config = dataclasses.replace(run, max_iters=16, keep_last_n=1)
    assert command.train(config) == 0
    assert order.index("prune") > order.index("ckpt")
    best = (folder / "best").read_text().strip()
    assert sorted(p.name for p in folder.glob("step_*")) == sorted({best, "step_00000016"})


def test_so_many_checkpoints_are_kept(small_run):
    trainer = Trainer(small_run(keep_last_n=5), ONE, CPU)
    checkpoints = trainer.checkpoints
    for iteration in range(1, 9):
        checkpoints.save(trainer.model, trainer.engine.optimizer, {"iteration": iteration}, CPU, is_best=iteration == 2)
        checkpoints.finish()
        kept = [int(path.name[-8:]) for path in checkpoints.complete()]
        newest = range(max(1, iteration - 4), iteration + 1)
        assert kept == sorted({*newest, *([2] if iteration >= 2 else [])})
    trainer.loader.close()


def test_old_checkpoints_that_cannot_be_removed_fail_no_save(whole, tmp_path, monkeypatch):
    def refuse(path, ending):
        raise OSError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(published, "rename_over", refuse)
    config = dataclasses.replace(whole, out_dir=str(tmp_path / "run"), keep_last_n=1)
    assert command.train(config) == 0
    log = (tmp_path / "run/logs.txt").read_text()
    assert "warning: old checkpoints cannot be removed: Permission denied" in log and "not written" not in log
    saves = [r["iter"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if r["kind"] == "save"]
    assert saves == [4, 8, 12] == [int(p.name[-8:]) for p in sorted((tmp_path / "run/ckpt").glob("step_*"))]


@pytest.mark.parametrize("kind", ["remove", "cut"])
def test_a_part_that_the_first_rank_does_not_see_is_not_published(small_run, capsys, monkeypatch, kind):
    """A file that has gone, or an --out_dir that is another folder on each host."""
    publish = Checkpoints._publish

    def lost(self, write, parts):
        spoil(write.folder / "ckpt_rank00000.safetensors", kind)
        return publish(self, write, parts)

    monkeypatch.setattr(Checkpoints, "_publish", lost)
    config = small_run(max_iters=2, eval_interval=0)
    flags = ["--config", str(Path(config.out_dir) / "config.toml")]
    with pytest.raises(InputError, match=r"ckpt_rank00000\.safetensors: .* bytes written, rank 0 finds"):
        command.train(config)
    assert not list((Path(config.out_dir) / "ckpt").iterdir())
    assert command.main(flags) == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_save_before_the_first_update_changes_no_moments(small_run):
    trainer = Trainer(small_run(), ONE, CPU)
    checkpoints, optimizer = trainer.checkpoints, trainer.engine.optimizer
    checkpoints.save(trainer.model, optimizer, {"iteration": 1}, CPU)
    checkpoints.finish()
    assert all(not moments[name].any() for moments in optimizer.state.values() for name in moments)
    trainer.loader.close()


# Another shape


def test_a_model_that_does_not_fit_is_named(run, folder, small_run, tmp_path):
    path = folder / "step_00000012"
    for model, expected in (
        ({"d_ff": 48}, "Size mismatch"),
        ({"num_layers": 3}, "Missing key"),
        ({"num_layers": 1}, "holds model.blocks.1"),
    ):
        trainer = Trainer(small_run(out_dir=str(tmp_path / "other"), model=model), ONE, CPU)
        with pytest.raises(InputError, match=f"step_00000012: cannot be loaded: .*{expected}"):
            trainer.resume(path)
        trainer.loader.close()


@pytest.mark.parametrize("file", ["../../outside.safetensors", "/etc/passwd", "other.bin"])
def test_metadata_cannot_lead_out_of_its_folder(run, folder, file):
    path = folder / "step_00000012/metadata.json"
    table = json.loads(path.read_text())
    table["tensors"]["model.head.weight"]["chunks"][0]["file"] = file
    path.write_text(json.dumps(table))
    trainer = Trainer(run, ONE, CPU)
    with pytest.raises(InputError, match="is not a file of a checkpoint"):
        trainer.resume(path.parent)
    trainer.loader.close()


def test_random_state_comes_back(tmp_path):
    draws = lambda: (torch.rand(2).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn())  # noqa: E731
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    draws()  # an odd number of normal draws is half of a pair
    staging = storage.Staging(0)
    staging.write(tmp_path, storage.random_state(CPU))
    first = draws()
    storage.restore_random_state(tmp_path, 0, CPU)
    assert draws() == first
    storage.restore_random_state(tmp_path, 1, CPU)  # a rank that was not there
    assert draws() != first
