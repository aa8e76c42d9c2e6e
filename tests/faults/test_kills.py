"""Kill a rank at a random moment, again and again: what comes out is what a run that nobody disturbed makes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("runner.py")


def run(*arguments, seconds):
    """The runner in a process of its own, since a process with threads must not be forked."""
    done = subprocess.run(
        [sys.executable, str(RUNNER), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    print(done.stdout)  # pytest shows it when the test fails, with the seed
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="watches folders with inotify")
def test_ten_kills(tmp_path):
    report = run("--kills", 10, "--seed", 1, "--fork", "--out", tmp_path / "kills", seconds=550)
    assert "as undisturbed, bit for bit" in report


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.skipif(sys.platform != "linux", reason="watches folders with inotify")
def test_a_hundred_kills_of_real_processes(tmp_path):
    """With another seed each time."""
    report = run("--kills", 100, "--out", tmp_path / "kills", seconds=3 * 3600)
    assert "as undisturbed, bit for bit" in report


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.skipif(sys.platform != "linux", reason="watches folders with inotify")
def test_every_fault(tmp_path):
    """The table in docs/faults.md, without writing it."""
    run("--faults", "--out", tmp_path / "faults", seconds=3 * 3600)
