"""Stop signals: remembered from the first moment on, each with its status, and the way out when nothing else helps."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_engine.train import __main__ as command
from moe_engine.train import loop as loop_module
from moe_engine.train import signals as signals_module
from moe_engine.train.checkpoint import Checkpoints
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import deterministic, read_metrics
from moe_engine.train.parallel import World
from moe_engine.train.signals import STOP_SIGNALS, StopSignals

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Handlers and the wake-up descriptor are as they were after each of these tests."""
    before = [signal.getsignal(number) for number in ALL]
    yield
    assert [signal.getsignal(number) for number in ALL] == before
    assert signal.set_wakeup_fd(-1) == -1


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def latest(config):
    return Checkpoints(Path(config.out_dir), World(0, 1, 0)).latest()


def flags_of(config):
    table = dataclasses.asdict(config)
    table |= {f"model.{name}": value for name, value in table.pop("model").items()}
    return [f"--{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in table.items() if v is not None]


def records(config):
    return [deterministic(r) for r in read_metrics(Path(config.out_dir) / "metrics.jsonl") if r["kind"] == "train"]


def log_of(config):
    return (Path(config.out_dir) / "logs.txt").read_text()


def test_all_of_them_are_there():
    assert list(STOP_SIGNALS) == ALL


@pytest.mark.parametrize("number", ALL)
def test_the_first_signal_is_remembered(number):
    others = [n for n in ALL if n not in (number, signal.SIGINT)]
    with StopSignals() as signals:
        assert signals.number is None
        send(number, *others, number if number != signal.SIGINT else others[0])
        assert signals.number == number


def test_what_was_there_before_is_there_after():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("outer"))
    try:
        with pytest.raises(ZeroDivisionError), StopSignals() as signals:
            send(signal.SIGTERM)
            raise ZeroDivisionError
        send(signal.SIGTERM)
        assert (signals.number, seen) == (signal.SIGTERM, ["outer"])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_entering_again_changes_nothing():
    with StopSignals() as signals:
        with signals:
            pass
        send(signal.SIGTERM)
        assert signals.number == signal.SIGTERM


def test_an_ignored_hangup_stays_ignored():
    """nohup's promise; no other signal is treated so."""
    before = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGUSR1)]
    try:
        with StopSignals() as signals:
            send(signal.SIGHUP)
            assert signals.number is None
            send(signal.SIGUSR1)
            assert signals.number == signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) == signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        for number, handler in zip((signal.SIGHUP, signal.SIGUSR1), before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arrive", "leaves"),
    [
        ([signal.SIGINT], False),
        ([signal.SIGINT, signal.SIGINT], True),
        ([signal.SIGTERM, signal.SIGINT], False),  # a launcher sends several, in either order
        ([signal.SIGINT, signal.SIGTERM], False),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1], False),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGINT], True),
    ],
)
def test_only_a_second_interrupt_leaves_at_once(arrive, leaves, capfd):
    """The watcher alone, on bytes as the interpreter writes them."""
    read, write = os.pipe()
    os.write(write, bytes(arrive) + signals_module._END * (not leaves))
    left = []

    class Left(Exception):
        pass

    def leave(status):
        left.append(status)
        raise Left

    try:
        signals_module._watch(read, leave)
    except Left:
        pass
    finally:
        os.close(read)
        os.close(write)
    assert left == ([130] if leaves else [])
    assert capfd.readouterr().err == signals_module._LEAVING.decode() * leaves


STUCK = """
import ctypes, os, signal, sys
from moe_engine.train.signals import StopSignals

with StopSignals() as signals:
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)  # as pool.terminate() does; and Ctrl-C reaches the whole group
        os._exit(0)
    number = os.waitpid(child, 0)[1]
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, lambda *_: None)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    os.waitpid(child, 0)
    print(number, signals.number, flush=True)
    mutex = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # for ever, in C, where no Python handler runs
"""


def test_a_second_interrupt_ends_a_process_that_is_stuck_in_c():
    """One subprocess for both: a forked child dies of its own signals, and does not interrupt its parent."""
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line == f"{signal.SIGTERM.value} None\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (130, signals_module._LEAVING.decode())
    finally:
        process.kill()
        process.communicate()


# In a run


@pytest.mark.parametrize("number", ALL)
def test_a_run_stops_after_the_iteration_with_a_checkpoint(small_run, monkeypatch, number):
    def interrupted(self):
        if self.iteration == 2:
            send(number)
        return step(self)

    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    config = small_run(eval_interval=0, save_every=0)
    assert command.train(config) == 128 + number
    assert latest(config).name == "step_00000003" and len(records(config)) == 3
    assert f"stopped by {signal.Signals(number).name} at iteration 3; the same command resumes it" in log_of(config)


@pytest.mark.parametrize("where", ["keep_freed_memory", "open_run", "Trainer", "write_atomically", "peak_flops"])
@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_a_signal_at_start_up_ends_before_the_first_iteration(small_run, monkeypatch, where, resumed):
    config = small_run(max_iters=4, eval_interval=0)
    if resumed:
        assert command.train(dataclasses.replace(config, max_iters=2)) == 0
    module = loop_module if where == "peak_flops" else command
    original = getattr(module, where)

    def during(*args, **kwargs):
        send(signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, where, during)
        assert command.train(config) == 143
    done = 2 if resumed else 0
    assert len(records(config)) == done and f"stopped by SIGTERM at iteration {done}" in log_of(config)
    assert latest(config) is None or resumed
    assert command.train(config) == 0
    assert len(records(config)) == 4


def test_a_reader_that_has_gone_stops_the_run_with_a_checkpoint(small_run):
    """`moe-train | head`. What is in standard output's buffer must not be an error at the exit either."""
    config = small_run(max_iters=100_000, save_every=0, eval_interval=0)
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_engine.train", *flags_of(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while "| iter 2/" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        assert (process.wait(90), process.stderr.read()) == (128 + signal.SIGPIPE, "")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert latest(config) is not None and "standard output: Broken pipe" in log_of(config)
    assert "stopped by SIGPIPE at iteration" in log_of(config)


def test_a_terminal_that_hung_up_does_not_end_a_run(small_run, monkeypatch):
    """Under nohup, or where the hang-up has come and its checkpoint is still to be written."""

    class Dead:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def flush(self):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def fileno(self):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    config = small_run(max_iters=3, eval_interval=0)
    monkeypatch.setattr(sys, "stdout", Dead())
    assert command.train(config) == 0
    assert len(records(config)) == 3 and log_of(config).count("standard output: Input/output error") == 1


def test_a_closed_standard_output_is_no_obstacle(small_run, monkeypatch):
    config = small_run(max_iters=1, eval_interval=0)
    monkeypatch.setattr(sys, "stdout", None)
    assert command.main(flags_of(config)) == 0


def test_a_closed_standard_stream_gives_its_number_to_no_file(tmp_path):
    code = """
import os, sys
from moe_engine.train.cli import guarded
guarded(lambda: os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), b"log") + os.write(1, b"chatter"))
"""
    inside = ["sh", "-c", 'exec "$@" >&- <&-', "-"]
    subprocess.run([*inside, sys.executable, "-c", code, str(tmp_path / "log")], check=True, timeout=60)
    assert (tmp_path / "log").read_bytes() == b"log"


def test_a_jumping_clock_changes_nothing(small_run, tmp_path, monkeypatch):
    """Dates stand in logs only: back and forth by a day, the run and its resumption are what they are without."""
    steady, jumping = (small_run(out_dir=str(tmp_path / name), eval_interval=3) for name in ("steady", "jumping"))
    assert command.train(steady) == 0
    time_, jumps = command.time.time, [0]

    def jump():
        jumps[0] += 1
        return time_() + 86_400 * (-1) ** jumps[0]

    monkeypatch.setattr("time.time", jump)
    assert command.train(dataclasses.replace(jumping, max_iters=6)) == 0
    assert command.train(jumping) == 0
    assert jumps[0] > 12 and len(records(steady)) == 12
    assert records(jumping) == records(steady)
    weights = []
    for config in (steady, jumping):
        trainer = Trainer(config, World(0, 1, 0), torch.device("cpu"))
        trainer.resume(latest(config))
        trainer.loader.close()
        weights.append(list(trainer.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
