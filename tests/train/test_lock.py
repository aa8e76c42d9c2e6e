"""One run per folder: who holds the lock, who is turned away, what a kill leaves, what a repetition may erase."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from moe_engine.train import __main__ as command
from moe_engine.train import lock as lock_module
from moe_engine.train.errors import InputError
from moe_engine.train.lock import LOCK_FILE, RunLock
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import read_metrics


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(RunLock.acquire, "__defaults__", (0.0,))


@pytest.fixture
def held(tmp_path):
    """The lock of `tmp_path / run`, held by this process."""
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    yield lock
    lock.release()


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def iterations(config):
    return [r["iter"] for r in read_metrics(Path(config.out_dir) / "metrics.jsonl") if r["kind"] == "train"]


def test_the_lock_says_whose_it_is_and_goes_with_the_folder_it_made(tmp_path):
    lock = RunLock(tmp_path / "a/b")
    lock.acquire()
    owner = json.loads((tmp_path / "a/b/lock").read_text())
    assert owner["pid"] == os.getpid() and owner["command"] == sys.argv and set(owner) >= {"host", "started"}
    with pytest.raises(InputError) as error:
        RunLock(tmp_path / "a/b").acquire(patience=0.0)
    assert str(error.value) == (
        f"--out_dir {tmp_path / 'a/b'}: in use by process {os.getpid()} on host {owner['host']} since "
        f"{owner['started']}; choose another folder, or stop that run first"
    )
    lock.release()
    assert not list(tmp_path.iterdir())
    lock.acquire()
    (tmp_path / "a/b/kept").touch()
    lock.release()
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["kept"]


def test_a_second_start_touches_nothing(small_run, hurried, capsys):
    config = small_run(max_iters=2)
    assert command.train(config) == 0
    lock = RunLock(config.out_dir)
    lock.acquire()
    before = contents(config.out_dir)
    for values in ({"fresh": True}, {"max_iters": 4}, {"lr": 5e-3}):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on host"):
            command.train(dataclasses.replace(config, **values))
    assert contents(config.out_dir) == before and not capsys.readouterr().out.count("resuming")
    lock.release()
    assert command.train(dataclasses.replace(config, max_iters=4)) == 0
    assert iterations(config) == [1, 2, 3, 4] and not (Path(config.out_dir) / LOCK_FILE).exists()


def test_a_run_holds_the_lock_for_as_long_as_it_trains(small_run, hurried, monkeypatch):
    config, seen = small_run(max_iters=2), []

    def try_again(self):
        with pytest.raises(InputError, match="in use by process"):
            command.train(config)
        seen.append(self.iteration)
        return step(self)

    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", try_again)
    assert command.train(config) == 0 and seen == [0, 1]


def test_an_owner_that_is_about_to_go_is_waited_for(held, monkeypatch):
    flock, calls = fcntl.flock, []

    def gone_meanwhile(descriptor, operation):
        if len(calls) == 1:  # between opening and locking: the lock to be had is that of a removed file
            held.release()
        calls.append(descriptor)
        return flock(descriptor, operation)

    monkeypatch.setattr(lock_module.fcntl, "flock", gone_meanwhile)
    next_one = RunLock(held.path.parent)
    next_one.acquire(patience=60.0)
    assert next_one.is_in_place(), "not the lock of the file that was removed"
    next_one.release()


def test_an_unreadable_owner_is_another_process(held):
    held.path.write_text("{")
    with pytest.raises(InputError, match="in use by another process; choose"):
        RunLock(held.path.parent).acquire(patience=0.0)


KILLED = """
import os, sys
from pathlib import Path
from moe_engine.train.lock import RunLock

lock = RunLock(Path(sys.argv[1]))
lock.acquire()
if os.fork() == 0:
    lock.release()  # as a `finally` in the child would
    print("child", os.getpid(), flush=True)
    os.read(0, 1)  # outlives the parent, until the test closes its standard input
    os._exit(0)
os.read(os.pipe()[0], 1)
"""


def test_a_kill_frees_the_lock_though_a_forked_child_lives_on(tmp_path):
    """A child of a fork has the parent's descriptors, and a lock lives as long as the last of them."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        child = int(process.stdout.readline().split()[1])
        with pytest.raises(InputError, match=f"in use by process {process.pid} "):
            RunLock(tmp_path / "run").acquire(patience=0.0)
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
        os.kill(child, 0)
        lock = RunLock(tmp_path / "run")
        lock.acquire(patience=0.0)
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
        lock.release()
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.read()  # ends when the child does
        process.stdout.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_a_warning(small_run, monkeypatch, number):
    def none(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    config = small_run(max_iters=1)
    assert command.train(config) == 0
    log = (Path(config.out_dir) / "logs.txt").read_text()
    assert log.count(f"warning: {Path(config.out_dir) / LOCK_FILE}: this file system has no locks") == 1


def test_a_lock_taken_again_where_the_folder_was_moved_away(held, tmp_path):
    held.path.parent.rename(tmp_path / "elsewhere")
    held.renew()
    assert held.path.exists()
    held.path.parent.rename(tmp_path / "elsewhere too")
    other = RunLock(held.path.parent)
    other.acquire()
    with pytest.raises(InputError, match="in use by process"):
        held.renew()
    other.release()


@pytest.mark.parametrize("by", ["deleted", "moved"])
def test_a_folder_that_vanishes_under_a_run_is_one_to_resume_in(small_run, tmp_path, monkeypatch, by):
    config = small_run(max_iters=6, save_every=3, eval_interval=3)
    out = Path(config.out_dir)

    def vanish(self):
        if self.iteration == 4:
            shutil.rmtree(out) if by == "deleted" else out.rename(tmp_path / "elsewhere")
        if self.iteration == 5:
            with pytest.raises(InputError, match="in use by process"):
                RunLock(out).acquire(patience=0.0)
        return step(self)

    step = Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", vanish)
        assert command.train(config) == 0
    assert iterations(config) == [5, 6] and not (out / LOCK_FILE).exists()
    assert "had been deleted or moved away: begun anew" in (out / "logs.txt").read_text()
    assert json.loads((out / "env.json").read_text())["devices"] == 1
    assert command.train(dataclasses.replace(config, max_iters=8)) == 0
    assert iterations(config) == [5, 6, 7, 8]
    if by == "moved":
        assert command.train(dataclasses.replace(config, out_dir=str(tmp_path / "elsewhere"))) == 0


def test_a_lock_that_somebody_removed_is_taken_again(small_run, hurried, monkeypatch):
    config = small_run(max_iters=3, eval_interval=0)

    def remove(self):
        if self.iteration == 1:
            (Path(config.out_dir) / LOCK_FILE).unlink()
        if self.iteration == 2:
            with pytest.raises(InputError, match="in use by process"):
                command.train(config)
        return step(self)

    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", remove)
    assert command.train(config) == 0
    assert "warning: lock had been deleted or moved away" in (Path(config.out_dir) / "logs.txt").read_text()
    assert iterations(config) == [1, 2, 3]


def test_a_run_whose_vanished_folder_another_has_taken_leaves(small_run, monkeypatch, capsys):
    config = small_run(max_iters=6, save_every=0, eval_interval=0)
    other = RunLock(config.out_dir)

    def vanish(self):
        if self.iteration == 4:
            shutil.rmtree(config.out_dir)
            other.acquire()
        return step(self)

    step = Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", vanish)
        assert command.main(flags_of(config)) == 2
    assert capsys.readouterr().err.startswith(f"error: --out_dir {config.out_dir}: in use by process")
    assert [p.name for p in Path(config.out_dir).iterdir()] == [LOCK_FILE]
    other.release()


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_repetition_of_a_fresh_start_goes_on(small_run, monkeypatch, variable):
    """The launcher gives the same command line again; it must not erase what the first start has trained."""
    config = small_run(max_iters=4, save_every=2, fresh=True)
    monkeypatch.setenv(variable, "0")
    for _ in range(2):
        assert command.train(dataclasses.replace(config, max_iters=2)) == 0
        log = (Path(config.out_dir) / "logs.txt").read_text()
        assert "resuming" not in log and "--fresh" not in log
    monkeypatch.setenv(variable, "1")
    assert command.train(config) == 0
    log = (Path(config.out_dir) / "logs.txt").read_text()
    assert log.count(f"--fresh is ignored: this start is a repetition ({variable} 1)") == 1
    assert "resuming from" in log and iterations(config) == [1, 2, 3, 4]


def test_a_launch_that_begins_anew_does_so_also_after_a_start_that_has_begun_nothing(small_run, monkeypatch):
    """torchrun counts a start, too, that ended before it had removed the run of another launch."""
    config = small_run(max_iters=2, save_every=2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert command.train(config) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    fresh = dataclasses.replace(config, fresh=True, max_iters=3)
    for _ in range(2):  # and a node that joins gives the same command again, with no count
        assert command.train(fresh) == 0
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    log = (Path(config.out_dir) / "logs.txt").read_text()
    assert "iter 2/2" not in log and "--fresh is ignored: this start is a repetition (TORCHELASTIC_RUN_ID two)" in log
    assert iterations(config) == [1, 2, 3]


def test_an_out_dir_that_cannot_be_made_is_one_line(small_run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command.main(flags_of(small_run(out_dir=str(tmp_path / "file/run")))) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out_dir {tmp_path / 'file/run'}: cannot be written: Not a directory")
    assert error.count("\n") == 1


def test_an_out_dir_that_cannot_be_written_is_one_line(small_run, tmp_path, in_small_tmpfs):
    """Root may write where permissions forbid it, but not on a file system that is mounted to be read."""
    config = small_run(out_dir="{mount}/run", max_iters=1)
    done = in_small_tmpfs(
        f"""
        from moe_engine.train.__main__ import main
        flags = [flag.replace("{{mount}}", MOUNT) for flag in {flags_of(config)!r}]
        subprocess.run(["mount", "-o", "remount,ro", MOUNT], check=True)
        sys.exit(main(flags))
        """
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --out_dir ") and done.stderr.count("\n") == 1
    assert "/run: cannot be written: Read-only file system" in done.stderr


def flags_of(config):
    table = dataclasses.asdict(config)
    table |= {f"model.{name}": value for name, value in table.pop("model").items()}
    return [f"--{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in table.items() if v is not None]


def test_every_rank_of_a_second_start_leaves_with_the_line(small_run, held, tmp_path):
    """The first rank alone asks; the others wait for its answer, and none of them for ever."""
    script = tmp_path / "start.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys
        from moe_engine.train.__main__ import main
        from moe_engine.train.lock import RunLock

        RunLock.acquire.__defaults__ = (0.5,)
        sys.stderr = open(f"{sys.argv[1]}/rank{os.environ['RANK']}", "w")
        status = main(sys.argv[2:])
        sys.stderr.close()
        sys.exit(status)
        """)
    )
    before = contents(tmp_path / "run")
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script),
         str(tmp_path), *flags_of(small_run(fresh=True))],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0 and time.monotonic() - begin < 60
    lines = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert lines[0] == lines[1] and lines[0].count("\n") == 1
    assert lines[0].startswith(f"error: --out_dir {tmp_path / 'run'}: in use by process {os.getpid()} on host ")
    assert contents(tmp_path / "run") == before
