"""A run whose ranks are killed again and again must end as the one that nobody disturbed, to the last bit.

A kill is SIGKILL to one rank, drawn at random, at a moment drawn at random:

    starting    within the time that a start takes to its first iteration
    training    within about 2.5 intervals of saving after that, whatever goes on there
    saving      at one of the steps that a checkpoint takes on the disk (a folder or file made, closed, renamed,
                removed), of the first or second checkpoint of this start, and up to 3 ms later

Then the others have to leave by themselves, what was published has to be sound, and the same command is given again.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ranks
from ranks import Start

SAVE_EVERY = 3
PATIENCE = 60.0  # seconds for the ranks that were not killed
BEFORE_GROUP = 3.0  # the same before the ranks know each other; then it is for what started them to end the others
WEIGHTS = {"starting": 1, "training": 4, "saving": 5}


def options_for(kills: int) -> dict[str, Any]:
    """A run long enough for so many kills, each of which lets it get on by an interval at most, on average."""
    iterations = SAVE_EVERY * (kills + kills // 5 + 8)
    return {
        "max_iters": iterations,
        "lr_decay_iters": iterations,
        "save_every": SAVE_EVERY,
        "eval_interval": 22,
        "keep_last_n": 2,
    }


@dataclass
class Tally:
    """What has happened."""

    kills: int = 0
    starts: int = 0
    ended_early: int = 0  # starts that came to the end of training before their kill
    by_plan: Counter = field(default_factory=Counter)
    by_rank: Counter = field(default_factory=Counter)
    by_phase: Counter = field(default_factory=Counter)
    before_first: int = 0  # kills with no checkpoint published
    half_written: Counter = field(default_factory=Counter)  # kills that left an unfinished folder, by what was in it
    resumed: int = 0  # starts that said where they went on, and it was the newest checkpoint
    leave: list[float] = field(default_factory=list)  # seconds that the others took
    ended_by_runner: int = 0  # ranks that waited for one that was killed before they knew each other
    to_first: list[float] = field(default_factory=list)  # seconds from a start to its first iteration
    failures: list[str] = field(default_factory=list)


def draw_plan(rng: random.Random, world: int) -> dict[str, Any]:
    """When to kill whom."""
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    return {
        "kind": kind,
        "rank": rng.randrange(world),
        "part": rng.random(),
        "checkpoint": rng.randint(1, 2),
        "step": rng.random(),
        "later": rng.random() * 0.003,
    }


class KillRun:
    """The disturbed run beside the undisturbed one.

    Args:
        out: folder for everything; made anew.
        kills: how many.
        seed: of the draws.
        way: how ranks are started (`Start.way`).
        world: how many ranks.
        say: called with a line for people.
    """

    def __init__(self, out: Path, kills: int, seed: int, way: str, world: int = 2, say: Any = print) -> None:
        self.out, self.kills, self.seed, self.way, self.world, self.say = out, kills, seed, way, world, say
        self.rng = random.Random(seed)
        self.options = options_for(kills)
        self.data = ranks.write_data(out / "data")
        self.calm, self.disturbed = out / "undisturbed", out / "disturbed"
        self.tally = Tally()
        self.step_seconds = 0.1
        self.disk_steps = 20

    def _start(self, out_dir: Path) -> Start:
        out_dir.mkdir(exist_ok=True)  # so that it can be watched
        number = len(list(self.out.glob(f"output/{out_dir.name}-*")))
        argv = ranks.arguments(self.data, out_dir, **self.options)
        return Start(argv, out_dir, self.out / "output" / f"{out_dir.name}-{number:03d}", self.world, self.way)

    def run(self) -> bool:
        begin = time.monotonic()
        if not self._undisturbed():
            return False
        tally = self.tally
        while tally.kills < self.kills and not tally.failures:
            if not self._attempt(draw_plan(self.rng, self.world)):
                break
            if tally.kills % 10 == 0:
                newest = (ranks.published(self.disturbed) or [0])[-1]
                self.say(f"{tally.kills} kills in {time.monotonic() - begin:.0f} s, at iteration {newest}")
        if tally.kills < self.kills and not tally.failures:
            tally.failures.append(f"the run came to its end after {tally.kills} kills: take another --seed")
        if not tally.failures:
            self._last_start()
        self.seconds = time.monotonic() - begin
        return not tally.failures

    def _undisturbed(self) -> bool:
        start = self._start(self.calm)
        start.until(lambda: bool(start.trained))
        first = start.seconds
        start.wait(ranks.LONG + self.options["max_iters"])
        start.close()
        if start.statuses != [0] * len(start.processes):
            self.tally.failures.append("the run that nobody disturbed failed:\n" + ranks.last_lines(start))
            return False
        self.tally.to_first.append(first)
        self.step_seconds = (start.seconds - first) / self.options["max_iters"]
        saves = self.options["max_iters"] // SAVE_EVERY
        self.disk_steps = max(1, round(len(start.changes) / saves))
        self.say(
            f"undisturbed: {self.options['max_iters']} iterations and {saves} checkpoints in {start.seconds:.0f} s, "
            f"{self.disk_steps} steps on the disk a checkpoint"
        )
        return True

    def _attempt(self, plan: dict[str, Any]) -> bool:
        """One start and its kill; False if the run is over or something failed."""
        tally, before = self.tally, ranks.published(self.disturbed)
        start = self._start(self.disturbed)
        tally.starts += 1
        try:
            if self._wait_for(plan, start):
                self._kill(plan["rank"], start)
                killed = time.monotonic()
                tally.kills += 1
                tally.by_plan[plan["kind"]] += 1
                tally.by_rank[plan["rank"]] += 1
                start.wait(PATIENCE if start.lines else BEFORE_GROUP)
                left = start.close()
                if left and start.lines:
                    tally.failures.append(
                        f"kill {tally.kills}: ranks {left} had not left {PATIENCE:.0f} s after rank {plan['rank']} "
                        "was killed\n" + ranks.last_lines(start)
                    )
                elif left:
                    tally.ended_by_runner += 1
                else:
                    tally.leave.append(time.monotonic() - killed)
                self._look(before, start)
                return not tally.failures
            start.close()
            if start.statuses == [0] * len(start.processes):
                tally.ended_early += 1
            else:
                tally.failures.append(f"start {tally.starts} ended by itself:\n" + ranks.last_lines(start))
            return False
        finally:
            start.close() if not start.ended else None

    def _wait_for(self, plan: dict[str, Any], start: Start) -> bool:
        """Wait for the moment of the kill; False if the run has ended before it."""
        if plan["kind"] == "starting":
            return start.pause(plan["part"] * statistics.median(self.tally.to_first))
        if plan["kind"] == "training":
            if not start.until(lambda: bool(start.trained)):
                return False
            self.tally.to_first.append(start.seconds)
            seconds = plan["part"] * 2.5 * SAVE_EVERY * self.step_seconds
            start.until(lambda: len(start.trained) >= 3 * SAVE_EVERY, seconds)
            return not start.ended
        step = int(plan["step"] * self.disk_steps)
        found = start.until(lambda: _disk_steps_of(start, plan["checkpoint"]) > step)
        if found:
            end = time.perf_counter() + plan["later"]
            while time.perf_counter() < end:  # too short for a sleep to be exact
                pass
        return found and not start.ended

    def _kill(self, rank: int, start: Start) -> None:
        if self.way != "torchrun":
            start.signal(rank, signal.SIGKILL)
            return
        import psutil  # torchrun's children are not ours

        children = psutil.Process(start.processes[0].pid).children()
        workers = [c for c in children if "moe_engine.train" in c.cmdline()]
        (workers or [psutil.Process(start.processes[0].pid)])[rank if len(workers) > rank else 0].kill()

    def _look(self, before: list[int], start: Start) -> None:
        """After a kill, before anything touches the folder again: what is there, and is it sound?"""
        tally, out_dir = self.tally, self.disturbed
        now, left = ranks.published(out_dir), ranks.leftovers(out_dir)
        newest = now[-1] if now else None
        if before and (newest is None or newest < before[-1]):
            tally.failures.append(f"kill {tally.kills}: checkpoint {before[-1]} was there and {newest} is the newest")
        tally.failures += [f"kill {tally.kills}: {problem}" for problem in ranks.unsound(out_dir)]
        said = [line for line in start.lines if "resuming from" in line]
        if said and before and f"step_{before[-1]:08d}" in said[0]:
            tally.resumed += 1
        elif said or (before and start.trained):
            tally.failures.append(f"kill {tally.kills}: of {before} the last should be resumed; it said {said}")
        if any("put aside" in line for line in start.lines):
            tally.failures.append(f"kill {tally.kills}: a checkpoint was taken for damaged")
        tally.before_first += newest is None
        tally.by_phase[self._phase(start, newest, left)] += 1

    def _phase(self, start: Start, newest: int | None, left: list[str]) -> str:
        """In the midst of what the run was killed, by what it left behind."""
        folder = self.disturbed / "ckpt"
        unfinished = [name for name in left if name.startswith("step_") and ".tmp" in name]
        if unfinished:
            names = {p.name for name in unfinished for p in (folder / name).iterdir()}
            data = sum(name.endswith(".safetensors") for name in names)
            small = sum(name in names for name in ("metadata.json", "state.json", "SHA256SUMS"))
            self.tally.half_written[f"{data} of {self.world} data files, {small} of 3 small ones"] += 1
            return "writing a checkpoint"
        pointer = (folder / "latest").read_text().strip() if (folder / "latest").exists() else None
        if newest is not None and pointer != f"step_{newest:08d}":
            return "between a checkpoint's name and `latest`"
        if any(name.endswith(".old") or name.endswith(".tmp") for name in left):
            return "pruning, or naming `latest` and `best`"
        if not start.trained:
            return "start-up"
        last = next((line for line in reversed(start.lines) if "| iter " in line), "")
        at = start.trained[-1]
        if at % self.options["eval_interval"] == 0 and ("| loss " in last or "| val loss " in last):
            return "an evaluation"
        return "training"

    def _last_start(self) -> None:
        tally, end = self.tally, self.options["max_iters"]
        start = self._start(self.disturbed)
        tally.starts += 1
        start.wait(ranks.LONG + end)
        left = start.close()
        if left or start.statuses != [0] * len(start.processes):
            tally.failures.append("the last start did not get to the end:\n" + ranks.last_lines(start))
            return
        tally.failures += [f"not as undisturbed: {each}" for each in ranks.apart(self.calm, self.disturbed, end)]
        tally.failures += [f"left behind: {name}" for name in ranks.leftovers(self.disturbed)]
        tally.failures += ranks.unsound(self.disturbed)

    # For people

    def summary(self) -> list[tuple[str, Any]]:
        tally = self.tally
        phases = ", ".join(f"{count} in {name}" for name, count in tally.by_phase.most_common())
        halves = ", ".join(f"{count} with {name}" for name, count in tally.half_written.most_common())
        leave = sorted(tally.leave)
        return [
            ("seed, ranks, started as", f"{self.seed}, {self.world}, {self.way}"),
            ("iterations, a checkpoint every", f"{self.options['max_iters']}, {SAVE_EVERY}"),
            ("kills, starts", f"{tally.kills}, {tally.starts}"),
            ("rank that was killed", ", ".join(f"{r}: {c}" for r, c in sorted(tally.by_rank.items()))),
            ("aimed at", ", ".join(f"{name}: {count}" for name, count in tally.by_plan.most_common())),
            ("found afterwards", phases),
            ("half-written checkpoints", f"{sum(tally.half_written.values())}" + (f" ({halves})" if halves else "")),
            ("before the first checkpoint", tally.before_first),
            ("starts that said that they resume the newest", tally.resumed),
            ("the others left after", f"{statistics.median(leave):.1f} s (median), {leave[-1]:.1f} s" if leave else ""),
            ("ranks not yet in a group, ended by the runner", tally.ended_by_runner),
            ("in all", f"{self.seconds / 60:.1f} minutes"),
            ("weights, moments, losses", "as undisturbed, bit for bit" if not tally.failures else "FAILED"),
        ]


def _disk_steps_of(start: Start, number: int) -> int:
    """Changes in ckpt/ since the `number`-th unfinished folder of this start appeared."""
    seen: set[str] = set()
    for index, (path, mask) in enumerate(start.changes):
        if mask & ranks.Watch.CREATE and ".tmp-" in path.name and path.name.startswith("step_"):
            seen.add(path.name)
            if len(seen) == number:
                return len(start.changes) - index
    return 0


# Not at random: before every operation on the run folder, one after the other


OPERATIONS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime"})
APART = ("tensorboard", "plots")  # opened and written all the time, and never read by a run
EACH_OPTIONS = {"max_iters": 4, "lr_decay_iters": 4, "save_every": 2, "eval_interval": 2, "keep_last_n": 1}


def kill_before(operation: int, out_dir: Path) -> Any:
    """For `Start.prepare`: the process kills itself before the n-th operation of its Python code on the run folder."""

    def prepare(_rank: int) -> None:
        count, inside = 0, str(out_dir)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event not in OPERATIONS or not arguments or not isinstance(arguments[0], str | bytes | os.PathLike):
                return
            name = os.fsdecode(arguments[0])
            if name.startswith(inside) and not name[len(inside) :].startswith(APART, 1):
                count += 1
                if count == operation:
                    os.write(1, f"killed before {event} out_dir{name[len(inside) :]}\n".encode())
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return prepare


def kill_before_each(out: Path, say: Any = print) -> tuple[int, list[str]]:
    """A new run for each operation on its folder, killed before that one and then started again.

    Returns:
        How many operations there were, and what failed.
    """
    data = ranks.write_data(out / "data")
    end, failures, operation = EACH_OPTIONS["max_iters"], [], 0

    def start(name: str, prepare: Any = None) -> Start:
        (out / name).mkdir(exist_ok=True)
        number = len(list(out.glob(f"output/{name}-*")))
        made = Start(
            ranks.arguments(data, out / name, **EACH_OPTIONS),
            out / name,
            out / f"output/{name}-{number}",
            1,
            "fork",
            prepare,
        )
        made.wait()
        made.close()
        return made

    calm = start("undisturbed")
    if calm.statuses != [0]:
        return 0, ["the run that nobody disturbed failed:\n" + ranks.last_lines(calm)]
    while True:
        name = f"run{operation + 1:03d}"
        killed = start(name, kill_before(operation + 1, out / name))
        if killed.statuses == [0]:
            say(f"{operation} operations, {len(failures)} failures")
            return operation, failures
        operation += 1
        where = next((line for line in reversed(killed.text().splitlines()) if line.startswith("killed before")), "?")
        if killed.statuses != [-signal.SIGKILL]:
            failures.append(f"operation {operation}: not killed\n" + ranks.last_lines(killed))
            continue
        problems = ranks.unsound(out / name)
        again = start(name)
        if again.statuses != [0]:
            problems.append(again.text().splitlines()[-1])
        else:
            problems += ranks.apart(out / "undisturbed", out / name, end) + ranks.leftovers(out / name)
        failures += [f"operation {operation}, {where}: {problem}" for problem in problems]
        if problems:
            say(f"{operation}: {where}: {problems}")
        ranks.remove(out / name)
