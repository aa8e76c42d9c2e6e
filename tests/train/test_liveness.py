"""A rank that dies, leaves or hangs: the others say which, write their stacks where that helps, and leave."""

import contextlib
import dataclasses
import faulthandler
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from moe_engine.train import liveness, parallel
from moe_engine.train.config import TrainConfig, resolve
from moe_engine.train.errors import InputError, RankLost
from moe_engine.train.liveness import Beat, Liveness, behind
from moe_engine.train.parallel import World

INTERVAL = 0.02
LATE = 60  # seconds that no wait of these tests takes where all is well


@pytest.fixture(autouse=True)
def no_timers(monkeypatch):
    """The timers that end a process whatever happens must not end this one."""
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(liveness, "_GRACE", 0.1)


@pytest.fixture
def make(tmp_path):
    """Makes the `Liveness` objects of so many ranks over one store, each entered in a thread of its own."""
    with contextlib.ExitStack() as stack:
        store = dist.HashStore()
        exits: dict[int, threading.Event] = {}

        def ranks(count, timeout=LATE, first=0.0, store=store):
            made = []
            for rank in range(count):
                exits[rank] = threading.Event()
                live = Liveness(
                    World(rank, count, rank), tmp_path, timeout, dist.PrefixStore("x", store) if count > 1 else None,
                    interval=INTERVAL, first=first, leave=lambda _status, rank=rank: exits[rank].set(),
                )  # fmt: skip
                live.left = exits[rank]
                made.append(live)
            threads = [threading.Thread(target=live.__enter__) for live in made]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LATE)
            for live in made:
                stack.callback(live.close)
            return made

        yield ranks


def freeze(live):
    """Stop a rank's own thread, as if its process had been stopped."""
    live._stop.set()
    live._thread.join(LATE)


class Dead:
    """A process that has ended."""

    def is_running(self):
        return False


def moving(lives, until):
    """Let ranks get on, in step, until an event is set."""
    end = time.monotonic() + LATE
    while not until.wait(INTERVAL) and time.monotonic() < end:
        for live in lives:
            live.beat(1, "step")


def errors_of(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


# What a rank concludes


def test_a_rank_without_progress_is_named_with_its_place_and_both_write_their_stacks(make, tmp_path, capfd):
    a, b = make(2, timeout=0.5)
    for live in (a, b):
        live.beat(7, "data")
    a.beat(7, "step")
    assert a.left.wait(LATE) and b.left.wait(LATE)
    err = capfd.readouterr().err
    lines = errors_of(err)
    assert len(lines) == 2 and len(set(lines)) == 1, "each rank says it once, and all say the same"
    assert re.match(r"error: no progress for \d s: rank 1 \(process \d+ on \S+\) after iteration 7, in data", lines[0])
    assert "rank 0" not in lines[0] and "the last published checkpoint stays" in lines[0]
    for rank in (0, 1):
        path = tmp_path / "stacks" / f"rank{rank:05d}.txt"
        text = path.read_text()
        assert f"rank {rank} (process {os.getpid()}" in text and "after iteration 7, in " in text
        assert "test_a_rank_without_progress" in text, "the main thread's stack is among them"
        assert f"rank {rank}: stacks of all threads are in {path}" in err


def test_stacks_are_appended(make, tmp_path):
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks/rank00000.txt").write_text("before\n")
    (alone,) = make(1, timeout=0.2)
    assert alone.left.wait(LATE)
    text = (tmp_path / "stacks/rank00000.txt").read_text()
    assert text.startswith("before\n") and "after iteration 0, in start" in text


def test_one_process_that_hangs_says_where(make, capfd):
    (alone,) = make(1, timeout=0.2)
    assert alone.left.wait(LATE)
    (line,) = errors_of(capfd.readouterr().err)
    assert "rank 0" in line and "after iteration 0, in start" in line


def test_what_moves_is_left_alone(make, capfd):
    a, b = make(2, timeout=0.5)
    done = threading.Event()
    threading.Timer(1.5, done.set).start()
    moving((a, b), done)
    assert not a.left.is_set() and not b.left.is_set() and capfd.readouterr().err == ""


def test_waiting_for_a_disk_is_progress_but_no_other_place(make):
    a, b = make(2, timeout=0.5)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        a.keep_alive()
        b.beat(0, "save") if b._place == 0 else b.keep_alive()
        time.sleep(INTERVAL)
    assert not a.left.is_set() and not b.left.is_set()
    assert a._place == 0 and b._place == 1


def test_the_first_iteration_may_take_longer(make):
    (alone,) = make(1, timeout=0.2, first=LATE)
    alone.beat(3, "step")
    time.sleep(0.6)
    assert not alone.left.is_set(), "it compiles"
    alone.beat(4, "step")
    assert alone.left.wait(LATE), "from the second iteration on timeout holds"


def test_a_silent_rank_is_the_one_to_name(make, capfd):
    a, b = make(2, timeout=1)
    freeze(b)
    assert a.left.wait(LATE)
    (line,) = errors_of(capfd.readouterr().err)
    assert "rank 1" in line and "gives no sign of life" in line and "rank 0" not in line


@pytest.mark.parametrize(
    ("places", "waiting", "named"),
    [
        ([5, 4, 5], [1, 0, 1], (1,)),  # one is behind
        ([5, 5, 5], [1, 0, 1], (1,)),  # in the same place, and the others wait for it
        ([5, 4, 4], [1, 1, 0], (2,)),
        ([5, 5, 5], [1, 1, 1], (0, 1, 2)),  # nobody can be told apart
    ],
)
def test_who_is_behind(places, waiting, named):
    beats = {r: Beat(1, p, 0, "step", 1, "h", "", waiting=bool(w)) for r, (p, w) in enumerate(zip(places, waiting))}  # noqa: B905
    assert behind(beats) == named


def test_the_wall_clock_and_a_stop_of_the_process_are_no_hang(make, monkeypatch):
    (alone,) = make(1, timeout=30)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    freeze(alone)
    alone.look()
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 3600)  # as after SIGSTOP and SIGCONT, an hour later
    alone.look()
    assert not alone.left.is_set()
    assert alone._clock < 30


# How survivors tell


GLOO = "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:5"


def test_a_dead_rank_is_named_at_once(make):
    a, b = make(2)
    b.beat(7, "step")
    freeze(b)
    b._exchange()
    a._exchange()
    a.peers[1]._process = Dead()
    lost = a.diagnose(RuntimeError(GLOO))
    assert re.fullmatch(
        r"rank 1 \(process \d+ on \S+\) died after iteration 7, in step.*; the last published checkpoint stays",
        str(lost),
    )
    assert not (a.out_dir / "stacks").exists(), "it is known what happened"


def test_the_thread_notices_a_dead_rank_where_no_collective_raises(make, capfd):
    a, b = make(2)
    freeze(b)
    a.peers[1]._process = Dead()
    assert a.left.wait(LATE)
    (line,) = errors_of(capfd.readouterr().err)
    assert "rank 1" in line and "died after iteration 0, in start" in line


def test_a_rank_of_another_machine_is_dead_when_it_is_silent_after_a_failed_collective(make):
    a, b = make(2)
    a.peers[1]._process = None
    freeze(b)
    lost = a.diagnose(RuntimeError(GLOO))
    assert "rank 1" in str(lost) and " died " in str(lost)


def test_a_rank_that_raises_alone_has_its_reason_told(make):
    a, b = make(2)
    b.__exit__(None, InputError("--data_dir x: gone"), None)
    lost = a.diagnose(RuntimeError(GLOO))
    assert "rank 1" in str(lost) and "left: error: --data_dir x: gone;" in str(lost) and "died" not in str(lost)


def test_a_survivor_that_leaves_first_is_not_blamed(make):
    a, b, c = make(3)
    freeze(b)
    a._exchange()
    a.peers[1]._process = Dead()
    first = a.diagnose(RuntimeError(GLOO))
    freeze(a)
    c.peers[0]._process = Dead()  # gone by now, and of rank 1 nothing is known but that rank 0 named it
    second = c.diagnose(RuntimeError(GLOO))
    assert str(first) == str(second) and "rank 1" in str(second) and "rank 0" not in str(second)


def test_an_error_while_all_ranks_live_stays_what_it_is(make):
    a, _b = make(2)
    assert a.diagnose(RuntimeError(GLOO)) is None
    assert a.diagnose(RuntimeError("shape '[3]' is invalid")) is None, "no collective's, whoever has died"
    assert a._claimed is None, "the thread goes on watching"


def test_ranks_that_ended_well_are_not_missed(make):
    a, b = make(2)
    b.__exit__(None, None, None)
    freeze(b)
    a._exchange()
    a.peers[1]._process = Dead()
    done = threading.Event()
    threading.Timer(0.5, done.set).start()
    moving((a,), done)
    assert not a.left.is_set()


def test_a_rank_that_the_others_gave_up_writes_its_stacks_too(make, tmp_path):
    a, b = make(2, timeout=0.5)
    freeze(b)
    assert a.left.wait(LATE)
    lost = b.diagnose(RuntimeError(GLOO))
    assert "rank 1" in str(lost) and "no sign of life" in str(lost)
    assert (tmp_path / "stacks/rank00001.txt").exists()


def test_the_store_may_go_with_its_rank(make):
    a, b = make(2)
    b._keeper, b.peers[0]._process = 0, Dead()
    freeze(a)
    assert "rank 0" in str(b.diagnose(RuntimeError(GLOO)))


def test_who_does_not_come_is_named(tmp_path):
    live = Liveness(World(0, 3, 0), tmp_path, 0.3, dist.HashStore(), interval=INTERVAL)
    with pytest.raises(InputError, match="rank 1, rank 2 of 3 did not start"):
        live.__enter__()


def test_a_beat_costs_next_to_nothing(make):
    (alone,) = make(1)
    begin = time.perf_counter()
    for i in range(10_000):
        alone.beat(i, "step")
    assert time.perf_counter() - begin < 0.5  # 50 µs each on a busy machine; 0.2 µs on a quiet one


def test_timeout_is_checked_and_may_change_between_starts(tmp_path):
    with pytest.raises(InputError, match="--timeout: expected at least 1, got 0"):
        resolve({"data_dir": str(tmp_path), "timeout": 0})
    assert dataclasses.fields(TrainConfig) and resolve({"data_dir": str(tmp_path)}).timeout == 300


def test_torchruns_variables_must_be_whole(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"2 processes did not meet at \(no MASTER_ADDR\):\(no MASTER_PORT\)"):
        parallel.open_store(World(0, 2, 0), 1)


def test_restarts_that_agents_count_apart_meet_all_the_same(small_run, forked_ranks):
    """A node that came back says 0 where the others say 1; rank 0's own store is new at every start."""
    before = "import os; os.environ['TORCHELASTIC_RESTART_COUNT'] = str(1 - rank)"
    statuses, _, errors = forked_ranks(2, small_run(max_iters=1, eval_interval=0, timeout=30.0), before)
    assert statuses == [0, 0], errors


def test_a_lost_rank_that_somebody_caught_is_raised_again(make):
    """A signal raises it wherever the main thread is, also where errors are turned into warnings: drawing, say."""
    (alone,) = make(1)
    assert alone._claim("main")
    alone._lose(liveness.Verdict("rank 1 died"))
    with pytest.raises(RankLost, match="rank 1 died"):
        alone.beat(1, "step")


def _raise(error):
    raise error


# Processes

# Imports once, then forks the ranks of one case after the other: a line on stdin is a case, pids and statuses return.
# A case is a real run, or all-reduces until, in the sixth, something happens to one rank.
FORKS = """
import ctypes, json, os, signal, sys, threading, traceback
import torch
import torch._dynamo
from moe_engine.train import __main__ as command, liveness, parallel
from moe_engine.train.cli import guarded
from moe_engine.train.errors import InputError
from moe_engine.train.liveness import Liveness


def strike(fault):
    if fault == "input":
        raise InputError("--data_dir x: gone")
    if fault == "bug":
        raise KeyError("a bug")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "read":
        os.read(os.pipe()[0], 1)
    if fault == "gil":  # sleeps, and holds the interpreter's lock
        liveness._EXIT = 1.0
        threading.Event().wait(1)
        ctypes.PyDLL(None).sleep(600)


def reduce(case):
    world = parallel.World.from_environment()
    store, keeper = parallel.open_store(world, 60)
    live = Liveness(world, case["folder"], case["timeout"], store, keeper=keeper, first=0)
    try:
        with live:
            parallel.start(world, torch.device("cpu"), torch.float32)
            for i in range(10**9):
                live.beat(i, "step")
                if i == 5 and world.rank == case["victim"]:
                    strike(case["fault"])
                parallel.all_sum(torch.ones(1), world)
    finally:
        if live.lost is None:
            parallel.stop()
        live.close()


for line in sys.stdin:
    case = json.loads(line)
    pids = []
    for rank in range(case["count"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ |= case["env"] | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os.dup2(os.open(f"{case['folder']}/err{rank}", os.O_WRONLY | os.O_CREAT), 2)
            if case["flags"]:
                sys.exit(command.main(case["flags"]))
            try:
                os._exit(guarded(lambda: reduce(case)))  # the end of an interpreter takes seconds
            except BaseException:
                traceback.print_exc()
                os._exit(1)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


@pytest.fixture(scope="module")
def forks():
    """The process that forks; a case that it does not end in time fails its test, and it is killed with its ranks."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()


class Ranks:
    """Processes of a world without an agent."""

    def __init__(self, forks, folder, count=2, **case):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {name: str(value) for name, value in env.items()}
        common = {"folder": str(folder), "count": count, "env": env, "flags": [], "victim": 1, "timeout": LATE}
        self.folder, self.count, self.forks = folder, count, forks
        self._line(json.dumps(common | case))
        self.pids = json.loads(self._line())

    def _line(self, write=None):
        """The next line of the forking process, or one to it; it is killed if that takes too long."""
        timer = threading.Timer(4 * LATE, os.killpg, (self.forks.pid, signal.SIGKILL))
        timer.start()
        try:
            if write is None:
                return self.forks.stdout.readline()
            self.forks.stdin.write(write + "\n")
            return self.forks.stdin.flush()
        finally:
            timer.cancel()

    def statuses(self):
        """Exit statuses, when all have ended."""
        return json.loads(self._line())

    def errs(self):
        """What each wrote to stderr."""
        return [(self.folder / f"err{rank}").read_text() for rank in range(self.count)]

    def wait_for_end(self, rank):
        """Until a rank has ended; the forking process may not have asked for its status yet."""
        wait_until(lambda: ended(self.pids[rank]))

    def kill(self):
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def ended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition):
    end = time.monotonic() + 4 * LATE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_rank_that_raises_alone_is_quoted_by_the_other(forks, tmp_path):
    ranks = Ranks(forks, tmp_path, fault="input")
    assert ranks.statuses() == [1, 2]
    zero, one = ranks.errs()
    assert one == "error: --data_dir x: gone\n"
    assert re.fullmatch(
        r"error: rank 1 \(process \d+ on \S+\) left: error: --data_dir x: gone; the last published checkpoint stays\n",
        zero,
    )


def test_a_bug_of_rank_0_which_keeps_the_store_is_told_to_the_others(forks, tmp_path):
    ranks = Ranks(forks, tmp_path, fault="bug", victim=0, count=3)
    assert ranks.statuses() == [1, 1, 1]
    zero, *others = ranks.errs()
    assert zero.rstrip().endswith("KeyError: 'a bug'") and "Traceback" in zero
    for other in others:
        (line,) = other.splitlines()
        assert line.startswith("error: rank 0 (") and "left: KeyError: 'a bug'" in line


@pytest.mark.parametrize("victim", [0, 1])
def test_of_three_the_dead_one_is_named_by_both(forks, tmp_path, victim):
    begin = time.monotonic()
    ranks = Ranks(forks, tmp_path, fault="kill", victim=victim, count=3)
    statuses = ranks.statuses()
    assert statuses.pop(victim) == -signal.SIGKILL and statuses == [1, 1]
    assert time.monotonic() - begin < LATE
    for rank in {0, 1, 2} - {victim}:
        (line,) = ranks.errs()[rank].splitlines()
        assert line.startswith(f"error: rank {victim} (process {ranks.pids[victim]} on ")
        assert re.search(r" died after iteration \d+, in \w+.*; the last published checkpoint stays$", line)


def test_a_read_that_never_returns_ends_both_with_their_stacks(forks, tmp_path):
    ranks = Ranks(forks, tmp_path, fault="read", timeout=4)
    assert ranks.statuses() == [1, 1]
    for rank, err in enumerate(ranks.errs()):
        told, line = err.splitlines()
        assert told == f"rank {rank}: stacks of all threads are in {tmp_path / f'stacks/rank{rank:05d}.txt'}"
        assert re.match(r"error: no progress for \d s: rank 1 \(process \d+ on \S+\) after iteration 5, in step", line)
        assert "rank 0 " not in line
    assert "in strike" in (tmp_path / "stacks/rank00001.txt").read_text()
    # Its collective may have failed by then, when the other one left first.
    assert "in guarded" in (tmp_path / "stacks/rank00000.txt").read_text()


def test_a_rank_that_holds_the_interpreters_lock_leaves_too(forks, tmp_path):
    ranks = Ranks(forks, tmp_path, fault="gil", timeout=3)
    assert ranks.statuses() == [1, 1]
    zero, one = ranks.errs()
    assert "rank 1 (" in zero and "no sign of life" in zero
    assert one.startswith("Timeout (") and "in strike" in one


@pytest.fixture
def endless(small_run):
    """Run folder and flags of a real run that does not end by itself."""

    def make(**values):
        config = small_run(max_iters=10**6, save_every=20, eval_interval=0, **values)
        table = dataclasses.asdict(config)
        table |= {f"model.{name}": value for name, value in table.pop("model").items()}
        flags = [f"--{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in table.items() if v is not None]
        return Path(config.out_dir), flags

    return make


def logged(out_dir, count):
    path = out_dir / "metrics.jsonl"
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= count


def test_a_rank_killed_in_a_run(forks, endless, tmp_path):
    out_dir, flags = endless()
    ranks = Ranks(forks, tmp_path, flags=flags)
    try:
        wait_until(logged(out_dir, 25))
        os.kill(ranks.pids[1], signal.SIGKILL)
        begin = time.monotonic()
        ranks.wait_for_end(0)
        assert time.monotonic() - begin < 30
    finally:
        ranks.kill()
    assert ranks.statuses() == [1, -signal.SIGKILL]
    (line,) = ranks.errs()[0].splitlines()
    assert line.startswith(f"error: rank 1 (process {ranks.pids[1]} on ")
    assert re.search(r" died after iteration \d+, in \w+.*; the last published checkpoint stays$", line)
    state = json.loads((out_dir / "ckpt/step_00000020/state.json").read_text())
    assert state["iteration"] == 20
    assert not (out_dir / "stacks").exists()


@pytest.mark.slow
def test_a_rank_stopped_in_a_run_and_continued_when_the_other_has_left(forks, endless, tmp_path):
    out_dir, flags = endless(timeout=8)
    ranks = Ranks(forks, tmp_path, flags=flags)
    try:
        wait_until(logged(out_dir, 25))
        os.kill(ranks.pids[1], signal.SIGSTOP)
        begin = time.monotonic()
        ranks.wait_for_end(0)
        assert 6 < time.monotonic() - begin < 40
        told, line = ranks.errs()[0].splitlines()
        assert f"rank 1 (process {ranks.pids[1]} on " in line and "gives no sign of life after iteration" in line
        assert "rank 0 " not in line
        text = (out_dir / "stacks/rank00000.txt").read_text()
        assert told.endswith("rank00000.txt") and "in train_step" in text and "after iteration" in text
        assert not (out_dir / "stacks/rank00001.txt").exists(), "a stopped process writes nothing"
        os.kill(ranks.pids[1], signal.SIGCONT)
        ranks.wait_for_end(1)
    finally:
        ranks.kill()
    assert ranks.statuses() == [1, 1]
    told, line = ranks.errs()[1].splitlines()
    assert f"rank 1 (process {ranks.pids[1]} on " in line and "did not run for" in line
    assert (out_dir / "stacks/rank00001.txt").exists() and told.endswith("rank00001.txt")


@pytest.mark.slow
def test_a_stopped_rank_that_keeps_the_store_is_named_too(forks, endless, tmp_path):
    """The store waits for it without end; the others do not."""
    out_dir, flags = endless(timeout=8)
    ranks = Ranks(forks, tmp_path, flags=flags)
    try:
        wait_until(logged(out_dir, 25))
        os.kill(ranks.pids[0], signal.SIGSTOP)
        begin = time.monotonic()
        ranks.wait_for_end(1)
        assert 6 < time.monotonic() - begin < 40
        (line,) = errors_of(ranks.errs()[1])
        assert f"rank 0 (process {ranks.pids[0]} on " in line and "gives no sign of life after iteration" in line
        assert "in _run" in (out_dir / "stacks/rank00001.txt").read_text()
    finally:
        ranks.kill()
    ranks.statuses()


@pytest.mark.slow
def test_under_torchrun_the_message_comes_before_the_agents_sigterm_ends_the_rank(endless):
    out_dir, flags = endless()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "moe_engine.train"]
    process = subprocess.Popen(
        [sys.executable, *launcher, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: logged(out_dir, 5)() or process.poll() is not None)
        children = psutil.Process(process.pid).children()
        pid = next(child.pid for child in children if child.environ().get("RANK") == "1")
        os.kill(pid, signal.SIGKILL)
        _, err = process.communicate(timeout=2 * LATE)
    finally:
        for child in psutil.Process(process.pid).children() if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait()
    assert process.returncode != 0
    (line,) = errors_of(err)
    assert line.startswith(f"error: rank 1 (process {pid} on ") and " died after iteration " in line


def test_a_lost_rank_is_a_line_with_status_1(capsys):
    from moe_engine.train.cli import guarded

    assert guarded(lambda: _raise(RankLost("rank 1 died"))) == 1
    assert capsys.readouterr().err == "error: rank 1 died\n"
