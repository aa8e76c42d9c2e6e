"""Whether every rank still lives and moves: what ends a run that would otherwise wait for ever.

Each process has one `Liveness`. The main thread calls `beat` where it gets on; a thread of its own writes that to a
key-value store that all ranks share, reads what the others wrote, and ends the process when

- another rank has died, or has left with an error, and the main thread does not notice by itself (nccl does not);
- the main thread has not moved for `timeout` seconds, wherever it is stuck: the stacks of all threads go to
  `out_dir/stacks/` first, on every rank.

Time is counted by a monotonic clock, and only while this thread runs: neither a jump of the wall clock nor a process
that was stopped and continued looks like a rank that hangs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from moe_engine.train.errors import InputError, RankLost
from moe_engine.train.parallel import World

FIRST = 1800.0  # seconds that the first iteration may take at least: it compiles
_INTERVAL = 2.0  # seconds between beats
_SILENT = 5  # intervals without a beat after which a rank is taken for dead, where something else is wrong as well
_GRACE = 5.0  # seconds for the main thread to notice a lost rank by itself
_LINGER = 20.0  # seconds that the process with the store waits at most for the others to read it
_EXIT = 60.0  # seconds from a failure to the end of the process, whatever hangs
_NAMED = 8  # ranks that a line names at most
_KEPT = "the last published checkpoint stays"


def collective_limit(timeout: float) -> float:
    """Seconds for the process group's own limit: so many that a hang is found here, where it can be said whose."""
    return 2 * max(timeout, FIRST)


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a rank tells the others."""

    number: int  # of this beat
    place: int  # calls of `Liveness.beat`: the same at the same point of a run on all ranks
    iteration: int
    what: str
    pid: int
    host: str
    machine: str  # what a process number is unique in: kernel and name space; empty where that is not known
    where: str = ""  # line of our code that the main thread stands in, while it does not move
    waiting: bool = False  # for other ranks, as far as the main thread's stack tells
    left: str = ""  # "ended", "failed" (an error of its own), "lost" (another rank's)
    reason: str = ""
    stuck: tuple[int, ...] = ()  # ranks that it found stuck, if that is why it left

    def position(self) -> str:
        """Where the rank was, in words."""
        at = f", at {self.where}" if self.where else ""
        return f"after iteration {self.iteration}, in {self.what}{at}"


class Peer:
    """Another rank, as far as it is known here."""

    def __init__(self, rank: int, machine: str) -> None:
        self.rank = rank
        self.beat: Beat | None = None
        self.seen = 0.0  # when its beat last changed, by our clock
        self._here = machine
        self._process: psutil.Process | None = None
        self._gone = False

    def update(self, beat: Beat, now: float) -> None:
        if self.beat is None and beat.machine and beat.machine == self._here:
            try:
                self._process = psutil.Process(beat.pid)
            except psutil.NoSuchProcess:
                self._gone = True
        if self.beat is None or beat.number != self.beat.number:
            self.seen = now
        self.beat = beat

    def gone(self) -> bool:
        """Whether it certainly runs no more: only of a process on this machine can that be said."""
        if self._process is not None and not self._gone:
            try:
                self._gone = not self._process.is_running() or self._process.status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                self._gone = True
        return self._gone


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why this process must leave."""

    line: str
    stuck: tuple[int, ...] = ()
    at_once: bool = False  # the main thread cannot be waited for


class Liveness:
    """Watches this rank and the others, from `with` to `close`.

    Args:
        world: this process among the others.
        out_dir: stacks are written to its folder `stacks`.
        timeout: seconds without progress after which a rank counts as stuck.
        store: shared by all ranks, for these keys alone and for one run; None in a world of one. Every rank must come
            within `timeout`. Its calls may come from two threads, and all of them are short.
        keeper: the rank whose process keeps the store; None: another process does, torchrun's agent.
        interval: seconds between beats.
        first: seconds that are allowed, if more than `timeout`, up to the end of the first iteration.
        leave: ends the process.
    """

    def __init__(
        self,
        world: World,
        out_dir: Path,
        timeout: float,
        store: dist.Store | None = None,
        *,
        keeper: int | None = None,
        interval: float | None = None,
        first: float = FIRST,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.world, self.out_dir, self.timeout, self.first = world, Path(out_dir), timeout, first
        self.interval = min(_INTERVAL, timeout / 10) if interval is None else interval
        self.lost: RankLost | None = None
        self._store, self._keeper, self._leave = store, keeper, leave
        self._store_lost = self._store_silent = False
        self._me = Beat(0, 0, 0, "start", os.getpid(), socket.gethostname(), _machine())
        others = [rank for rank in range(world.size) if rank != world.rank] if store else []
        self.peers = {rank: Peer(rank, self._me.machine) for rank in others}
        self._read_every = 1 + world.size // 64  # beats; what a store serves grows with the square of the ranks
        self._silence = _SILENT * self.interval * self._read_every

        self._place = self._alive = self._iteration = 0  # written by the main thread
        self._what = "start"
        self._main = threading.get_ident()
        self._first_step: int | None = None
        self._warm = False

        self._clock, self._last = 0.0, time.monotonic()
        self._stopped_for = 0.0  # the longest that this process did not run
        self._moved, self._count = 0.0, (0, 0)
        self._noticed: float | None = None
        self._leaving = self._closed = False
        self._claimed: str | None = None  # by "main" or "watch": who says why this process leaves
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._previous: Any = None

    # For the main thread

    def beat(self, iteration: int, what: str) -> None:
        """This rank gets on. All ranks must call it at the same points of a run.

        Args:
            iteration: those that are finished.
            what: what begins now, in a word: `step`, `eval`.
        Raises:
            RankLost: again, where somebody caught the one that a signal had raised in the main thread.
        """
        if self.lost is not None and self._claimed == "main":
            raise self.lost
        self._iteration, self._what = iteration, what
        self._place += 1

    def keep_alive(self) -> None:
        """This rank gets on with something that the others may not have to do, or not as often."""
        self._alive += 1

    def __enter__(self) -> Liveness:
        """Wait for all ranks, then watch.

        Raises:
            InputError: one does not come within `timeout`.
            RankLost: one came, and left again.
        """
        if self.peers and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._on_term)
        try:
            self._meet()
        except BaseException as error:
            self.leaving(_reason(error))
            self.close()
            raise
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        """Tell the others how this rank leaves.

        Raises:
            RankLost: in place of the error of a collective, when another rank is its cause.
        """
        if error is None:
            self._record("ended", "")
        elif not isinstance(error, RankLost):
            lost = self.diagnose(error)
            if lost is not None:
                raise lost from error
            self.leaving(_reason(error))

    def leaving(self, reason: str) -> None:
        """Tell the others why this rank leaves, when that is a matter of its own."""
        self._exit_soon()
        self._record("failed", reason)

    def diagnose(self, error: BaseException) -> RankLost | None:
        """Which other rank made a collective fail here; None: the error is none of a collective, or all ranks live.

        It takes as long as it takes to see that a rank on another machine is silent, 10 s by default.
        """
        if not self.peers or not _of_collective(error):
            return None
        if not self._claim("main"):
            threading.Event().wait()  # the watching thread has found out already, and ends this process
        self._stop.wait(min(0.1, self.interval))  # connections end a little before their process does
        self._exchange()
        begin = self._now()  # a beat that is read from here on is from after the failure
        while True:
            verdict = self._verdict()
            if verdict is None and self._now() - begin >= self._silence:
                verdict = self._silent_since(begin)
                if verdict is None:
                    self._claimed = None
                    return None
            if verdict is not None:
                return self._lose(verdict)
            self._stop.wait(min(0.1, self.interval))
            self._exchange()

    def close(self) -> None:
        """Stop watching; the process that keeps the store waits for the others to have read it."""
        if self._closed:
            return
        self._closed = True
        self._linger()
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_GRACE)
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
        if self.peers and self._me.left != "failed" and self.lost is None:
            faulthandler.cancel_dump_traceback_later()

    def _on_term(self, number: int, _frame: Any) -> None:
        """An agent ends the ranks that a lost one leaves behind: what they have to say must come out before that."""
        if self._leaving or self._claimed or _of_collective(sys.exc_info()[1]):
            return
        self._exchange()
        verdict = self._verdict()
        if verdict is not None and self._claim("main"):
            raise self._lose(verdict)
        signal.signal(number, self._previous or signal.SIG_DFL)
        os.kill(os.getpid(), number)

    # Beats

    def _now(self) -> float:
        """Seconds in which this process ran. A longer time between two looks counts as two intervals."""
        with self._lock:
            now = time.monotonic()
            passed, self._last = now - self._last, now
            most = 2 * self.interval
            if passed > most:
                self._stopped_for = max(self._stopped_for, passed)
            self._clock += min(passed, most)
            return self._clock

    def _exchange(self, read: bool = True) -> None:
        """Write this rank's beat, read the others'."""
        with self._lock:
            now, count = self._now(), (self._place, self._alive)
            moves = count != self._count
            if moves:
                self._moved, self._count = now, count
            if self._what == "step" and not self._warm:
                self._warm = self._first_step is not None and self._iteration > self._first_step
                self._first_step = self._iteration if self._first_step is None else self._first_step
            where, waiting = ("", False) if moves else _stands(self._main)
            self._me = dataclasses.replace(
                self._me, number=self._me.number + 1, place=self._place, iteration=self._iteration, what=self._what,
                where=where, waiting=waiting,
            )  # fmt: skip
            if self._store is None or self._store_lost:
                return
            if self._keeper in self.peers and self.peers[self._keeper].gone():
                self._store_lost = True
                return
            answer = self._ask(json.dumps(dataclasses.asdict(self._me)), read)
            if answer is None:
                self._store_lost = True
                return
            known, texts = answer
            for rank, text in zip(known if texts else [], texts, strict=True):
                beat = json.loads(text)
                self.peers[rank].update(Beat(**beat | {"stuck": tuple(beat["stuck"])}), now)

    def _ask(self, text: str, read: bool) -> tuple[list[int], list[str]] | None:
        """Write `text` to the store, and read the beats of the ranks that are known; None: it gives no answer.

        In a thread of its own: a store waits without end for a host that hangs, or a process that is stopped.
        """
        answers: list[tuple[list[int], list[str]]] = []

        def ask() -> None:
            # RuntimeError: DistNetworkError, DistStoreError: whoever kept it is gone; the rest is seen without it
            with contextlib.suppress(RuntimeError):
                self._store.set(str(self.world.rank), text)
                known = [rank for rank, peer in self.peers.items() if peer.beat or self._store.check([str(rank)])]
                answers.append((known, self._store.multi_get([str(rank) for rank in known]) if read and known else []))

        thread, begin = threading.Thread(target=ask, name="liveness-store", daemon=True), self._now()
        thread.start()
        thread.join(self.interval)
        while thread.is_alive():
            if self._now() - begin >= self.timeout:
                self._store_silent = True
                return None
            thread.join(self.interval)
        return answers[0] if answers else None

    def _record(self, left: str, reason: str, stuck: tuple[int, ...] = ()) -> None:
        with self._lock:
            self._leaving = True
            self._me = dataclasses.replace(self._me, left=left, reason=reason, stuck=stuck)
            self._exchange()

    def _meet(self) -> None:
        end = time.monotonic() + self.timeout
        while True:
            self._exchange()
            missing = [rank for rank, peer in self.peers.items() if peer.beat is None]
            if not missing:
                return
            verdict = self._verdict()
            if verdict is not None:
                raise self._lose(verdict)
            if time.monotonic() >= end or self._store_lost:
                names = _listed(f"rank {rank}" for rank in missing)
                raise InputError(f"--timeout {self.timeout:g}: {names} of {self.world.size} did not start in that time")
            self._stop.wait(min(0.1, self.interval))

    # Judging

    def _limit(self) -> float:
        return self.timeout if self._warm else max(self.timeout, self.first)

    def _name(self, beat: Beat, rank: int) -> str:
        return f"rank {rank} (process {beat.pid} on {beat.host})"

    def _verdict(self) -> Verdict | None:
        """Whether this process must leave, from what is known now."""
        with self._lock:
            known = [(rank, peer, peer.beat) for rank, peer in self.peers.items() if peer.beat is not None]
            for _, _, beat in known:
                if beat.left == "lost" and beat.stuck:  # one word for all: the first that found out has it
                    return Verdict(beat.reason, beat.stuck, at_once=True)
            causes = []
            for rank, peer, beat in known:
                if beat.left == "failed":
                    causes.append(f"{self._name(beat, rank)} left: {beat.reason}")
                elif not beat.left and peer.gone():
                    if self._store_lost and self._stopped_for >= self.timeout:
                        continue  # it may have left for want of us, and have had nobody to tell
                    causes.append(f"{self._name(beat, rank)} died {beat.position()}")
            if causes:
                return Verdict(f"{_listed(causes)}; {_KEPT}")
            for _, _, beat in known:
                if beat.left == "lost":
                    return Verdict(beat.reason)
            if self._store_lost and self._stopped_for >= self.timeout and any(peer.gone() for _, peer, _ in known):
                me = self._name(self._me, self.world.rank)
                return Verdict(
                    f"{me} did not run for {self._stopped_for:.0f} s, {self._me.position()}, and the others have "
                    f"left; {_KEPT}",
                    (self.world.rank,),
                )
            if self._clock - self._moved >= self._limit():
                return self._stall()
            return None

    def _stall(self) -> Verdict:
        """This rank does not move: name those that keep it from moving."""
        here = {rank: peer.beat for rank, peer in self.peers.items() if peer.beat is not None and not peer.beat.left}
        here[self.world.rank] = self._me
        silent = tuple(sorted(r for r, peer in self.peers.items() if r in here and self._is_silent(peer)))
        stuck, silence = silent or behind(here), " gives no sign of life"
        who = _listed(
            f"{self._name(here[rank], rank)}{silence if rank in silent else ''} {here[rank].position()}"
            for rank in stuck
        )
        what = "no rank makes progress any more, none is behind" if len(stuck) == len(here) > 1 else "no progress"
        line = f"{what} for {self._clock - self._moved:.0f} s: {who}; stacks: {self.out_dir / 'stacks'}; {_KEPT}"
        return Verdict(line, stuck, at_once=True)

    def _is_silent(self, peer: Peer) -> bool:
        if self._store_silent and peer.rank == self._keeper:
            return True
        return not self._store_lost and self._clock - peer.seen >= self._silence

    def _silent_since(self, begin: float) -> Verdict | None:
        """After a failed collective: ranks that have given no sign of life since."""
        with self._lock:
            if self._store_lost:
                keeper = self.peers.get(self._keeper)
                if keeper is None or keeper.beat is None:
                    return None
                return Verdict(f"{self._name(keeper.beat, keeper.rank)} died {keeper.beat.position()}; {_KEPT}")
            silent = [
                f"{self._name(peer.beat, rank)} died {peer.beat.position()}"
                for rank, peer in self.peers.items()
                if peer.beat is not None and not peer.beat.left and peer.seen <= begin
            ]
            return Verdict(f"{_listed(silent)}; {_KEPT}") if silent else None

    # Leaving

    def _claim(self, who: str) -> bool:
        with self._lock:
            self._claimed = self._claimed or who
            return self._claimed == who

    def _exit_soon(self) -> None:
        """From here on the process ends, even if something hangs that holds the interpreter."""
        with self._lock:
            self._leaving = True
            if self.peers:
                faulthandler.dump_traceback_later(_EXIT, exit=True, file=2)

    def _lose(self, verdict: Verdict) -> RankLost:
        self._exit_soon()
        self._record("lost", verdict.line, verdict.stuck)
        if verdict.stuck:
            # In a thread of its own: the disk may be what hangs.
            writer = threading.Thread(target=self._write_stacks, name="stacks", daemon=True)
            writer.start()
            writer.join(_GRACE)
        self.lost = RankLost(verdict.line)
        return self.lost

    def _write_stacks(self) -> None:
        path = self.out_dir / "stacks" / f"rank{self.world.rank:05d}.txt"
        stamp, me = time.strftime("%Y-%m-%dT%H:%M:%S%z"), self._me
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{stamp} | {self._name(me, self.world.rank)} {me.position()}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
            _say(f"rank {self.world.rank}: stacks of all threads are in {path}")
        except OSError as error:
            _say(f"rank {self.world.rank}: stacks not written: {path}: {error.strerror}")

    def _linger(self) -> None:
        """Keep the store until every other rank that can has left, so that all learn why."""
        if self._keeper != self.world.rank:
            return
        begin = self._now()
        while self._now() - begin < _LINGER and not self._store_lost:
            self._exchange()
            waiting = [
                peer
                for peer in self.peers.values()
                if peer.beat is not None and not peer.beat.left
                if not peer.gone() and not self._is_silent(peer)
            ]
            if not waiting:
                return
            time.sleep(min(0.05, self.interval))

    # The thread

    def _watch(self) -> None:
        try:
            while not self._stop.wait(self.interval):
                self.look()
        finally:
            if self.peers and not self._leaving:
                faulthandler.cancel_dump_traceback_later()

    def look(self) -> None:
        """One round of the watching thread."""
        with self._lock:
            if self._leaving:
                self._exchange()
                return
            if self.peers:
                # Where something holds the interpreter's lock, this thread does not run; this timer still does.
                faulthandler.dump_traceback_later(2 * self._limit() + _EXIT, exit=True, file=2)
        self._exchange(read=self._me.number % self._read_every == 0)
        verdict = self._verdict()
        if verdict is None:
            self._noticed = None
            return
        if self._noticed is None:
            self._noticed = self._clock
        if (verdict.at_once or self._clock - self._noticed >= _GRACE) and self._claim("watch"):
            self._lose(verdict)
            _say(f"error: {verdict.line}")
            self._linger()
            self._leave(1)


def behind(beats: dict[int, Beat]) -> tuple[int, ...]:
    """The ranks that the others wait for: those of the earliest place, and among equals those that wait for nobody."""
    least = min(beat.place for beat in beats.values())
    last = sorted(rank for rank, beat in beats.items() if beat.place == least)
    return tuple([rank for rank in last if not beats[rank].waiting] or last)


def _machine() -> str:
    """What process numbers are unique in; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _stands(thread: int) -> tuple[str, bool]:
    """The line of our code that a thread stands in, and whether it is inside torch.distributed."""
    where, waiting = "", False
    frame = sys._current_frames().get(thread)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        waiting = waiting or "torch/distributed/" in path.as_posix()
        module = frame.f_globals.get("__name__", "")
        if not where and module.startswith("moe_engine.") and module != __name__:
            where = f"{path.parent.name}/{path.name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return where, waiting


def _of_collective(error: BaseException | None) -> bool:
    """Whether communication is at the bottom of an error; gloo's have no type of their own."""
    while error is not None:
        if isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo/", "NCCL")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = str(error).partition("\n")[0]
    return f"error: {text}" if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _listed(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = len(texts) - _NAMED
    return ", ".join(texts[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
