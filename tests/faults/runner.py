"""Faults, injected into real runs:

python tests/faults/runner.py --kills 100 --seed 1 --out /tmp/kills          each rank a new process
python tests/faults/runner.py --kills 10 --fork                              each rank a fork: much faster
python tests/faults/runner.py --each                                         before every operation on the run folder
python tests/faults/runner.py --faults [--only PATTERN] [--markdown docs/faults.md]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import kills
import ranks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="kill a random rank at a random moment so many times")
    parser.add_argument("--seed", type=int, help="of the kills' moments; default: a new one, which is printed")
    parser.add_argument("--ranks", type=int, default=2, help="of the run that is killed")
    parser.add_argument("--out", type=Path, help="new folder for data, runs and outputs; default: a temporary one")
    parser.add_argument("--fork", action="store_true", help="fork the ranks from this process, to save their imports")
    parser.add_argument("--torchrun", action="store_true", help="start them with torchrun")
    parser.add_argument("--each", action="store_true", help="kill one rank before each operation on the run folder")
    parser.add_argument("--faults", action="store_true", help="inject every other fault, once")
    parser.add_argument("--only", default="", help="with --faults: those in whose name this pattern is found")
    parser.add_argument("--markdown", type=Path, help="with --faults: write the table into this page, at its marks")
    args = parser.parse_args()
    if not (args.kills or args.each or args.faults):
        parser.error("expected --kills N, --each or --faults")
    if args.out is not None:
        if args.out.exists() and any(args.out.iterdir()):
            parser.error(f"--out {args.out}: not empty")
        args.out.mkdir(parents=True, exist_ok=True)
        return run(args, args.out.resolve())
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        return run(args, Path(folder).resolve())


def run(args: argparse.Namespace, out: Path) -> int:
    status = 0
    if args.kills:
        seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
        way = "fork" if args.fork else "torchrun" if args.torchrun else "process"
        if way == "fork":
            ranks.import_everything()
        say(f"{args.kills} kills with --seed {seed}, in {out}")
        test = kills.KillRun(out / "kills", args.kills, seed, way, args.ranks, say)
        test.run()
        for name, value in test.summary():
            print(f"  {name:<46} {value}")
        for failure in test.tally.failures:
            print(f"FAILED: {failure}")
        (out / "kills.json").write_text(json.dumps(dict(test.summary()), indent=2) + "\n")
        status = int(bool(test.tally.failures))
    if args.each:
        ranks.import_everything()
        operations, failures = kills.kill_before_each(out / "each", say)
        for failure in failures:
            print(f"FAILED: {failure}")
        status |= int(bool(failures) or not operations)
    if args.faults:
        import faults

        status |= faults.run(out / "faults", args.only, args.markdown, say)
    return status


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
