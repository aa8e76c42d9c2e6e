"""configs/slurm.sbatch with programs on PATH that do on this machine what SLURM's do on a cluster."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moe_engine.train.config import to_toml
from moe_engine.train.metrics import read_metrics

SCRIPT = Path(__file__).resolve().parents[2] / "configs/slurm.sbatch"
ITERATIONS, HELD = 12, 6

# A task per node; all end before srun does, whose status is the largest of theirs.
SRUN = """
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
nodes = range(int(os.environ["SLURM_NNODES"]))
tasks = [subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(i)}) for i in nodes]
with open(os.environ["FAKES"] + "/tasks.tmp", "w") as f:
    f.write(" ".join(str(task.pid) for task in tasks))
os.replace(os.environ["FAKES"] + "/tasks.tmp", os.environ["FAKES"] + "/tasks")
sys.exit(max(task.wait() % 256 for task in tasks))
"""
# With a signal and a job: to every process of every task, the tasks themselves included.
SCANCEL = """
import os, psutil, signal, sys
number = signal.Signals["SIG" + sys.argv[1].removeprefix("--signal=")]
assert sys.argv[1].startswith("--signal=") and sys.argv[2:] == [os.environ["SLURM_JOB_ID"]]
for pid in open(os.environ["FAKES"] + "/tasks").read().split():
    try:
        task = psutil.Process(int(pid))
        for process in [task, *task.children(recursive=True)]:
            process.send_signal(number)
    except psutil.NoSuchProcess:
        pass
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print(*["127.0.0.1"] * int(os.environ["SLURM_NNODES"]), sep="\\n")
else:
    print(*sys.argv[1:], file=open(os.environ["FAKES"] + "/requeued", "a"))
"""
# A node with one process, which takes so many SIGTERMs before it ends, as one does that is still starting at the first.
QUICK_TORCHRUN = """
import json, os, signal, subprocess, sys
folder, rank = os.environ["FAKES"], os.environ["SLURM_PROCID"]
worker = '''
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
signal.signal(signal.SIGTERM, lambda *_: None)  # else an ignored signal would be thrown away
open(sys.argv[1], "w").close()
for _ in range(int(os.environ["SIGNALS"])):
    assert signal.sigtimedwait({signal.SIGTERM}, 60)
sys.exit(int(os.environ["STATUS"]))
'''
with open(f"{folder}/torchrun{rank}", "w") as f:
    json.dump(sys.argv[1:], f)
done = subprocess.run([sys.executable, "-c", worker, f"{folder}/ready{rank}"], start_new_session=True)
sys.exit(int(done.returncode != 0))
"""
# The real one; the first process that reaches an iteration stops there, once, until it is told to end.
TORCHRUN = """
import os, sys
place = sys.argv.index("-m")
assert sys.argv[place + 1] == "moe_engine.train"
arguments = [*sys.argv[1:place], os.environ["FAKES"] + "/train.py", *sys.argv[place + 2 :]]
os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *arguments])
"""
TRAIN = """
import os, sys, threading, time
from moe_engine.train import loop
from moe_engine.train.__main__ import main

loop.draw_plots = lambda *a, **k: None
train_step = loop.Trainer.train_step
held = os.environ["FAKES"] + "/held"

def step(self):
    if self.iteration == {at} and not os.path.exists(held):
        open(held, "w").close()
        give_up = time.monotonic() + 200
        while self.stop_signal is None and time.monotonic() < give_up:
            threading.Event().wait(0.02)
    return train_step(self)

loop.Trainer.train_step = step
sys.exit(main())
"""


def wait_for(path, process, seconds=200):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path):
    """Puts programs on PATH; returns a function that starts the script as sbatch would, once more at each call."""
    programs = tmp_path / "bin"
    programs.mkdir()
    started = []

    def program(name, text):
        path = programs / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)

    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        program(name, text)
    (tmp_path / "train.py").write_text(TRAIN.format(at=HELD))
    job = free_port_in(20000, 30000)  # of which the script makes the port

    def submit(torchrun, *arguments, **environment):
        program("torchrun", torchrun)
        slurm = {"SLURM_JOB_ID": job, "SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "n[1-2]", "FAKES": tmp_path,
                 "SLURM_RESTART_COUNT": len(started)}  # fmt: skip
        with open(tmp_path / "log", "ab") as log:  # --open-mode=append
            process = subprocess.Popen(
                ["bash", SCRIPT, *arguments],
                env=os.environ
                | {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
                | {name: str(value) for name, value in {**slurm, **environment}.items()},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started.append(psutil.Process(process.pid))
        return process

    submit.job = job
    submit.log = lambda: (tmp_path / "log").read_text()
    submit.requeued = lambda: (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
    yield submit
    for process in started:
        if process.is_running():
            for one in [process, *process.children(recursive=True)]:
                one.kill()


def free_port_in(low, high):
    for port in range(low + os.getpid() % (high - low), high):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError(f"no free port from {low} to {high}")


def test_the_script_is_one():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    if (shellcheck := shutil.which("shellcheck")) is None:
        pytest.skip("bash accepts it; no shellcheck here")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_option_for_sbatch_comes_before_the_first_command():
    """sbatch reads no further."""
    lines = SCRIPT.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert [i for i, line in enumerate(lines) if line.startswith("#SBATCH") and i > first] == []
    assert "#SBATCH --signal=B:USR1@300" in lines[:first] and "#SBATCH --requeue" in lines[:first]


def test_what_torchrun_is_started_with(cluster, tmp_path):
    job = cluster(QUICK_TORCHRUN, "--data_dir", "a b", "--max_iters=3", SLURM_GPUS_ON_NODE=4, SIGNALS=0, STATUS=0)
    assert job.wait(60) == 0 and cluster.requeued() == ""
    for rank in (0, 1):
        given = json.loads((tmp_path / f"torchrun{rank}").read_text())
        place = given.index("-m")
        options = dict(option.split("=") for option in given[:place])
        assert options["--nnodes"] == "2" and options["--nproc_per_node"] == "4"
        assert options["--rdzv_endpoint"] == f"127.0.0.1:{20000 + cluster.job % 10000}"
        assert options["--rdzv_id"] == str(cluster.job) and options["--rdzv_backend"] == "c10d"
        assert given[place + 1 :] == ["moe_engine.train", "--dp_replicate=2", "--data_dir", "a b", "--max_iters=3"]
    assert f"start 1 of job {cluster.job}: 2 nodes with 4 processes each" in cluster.log()


@pytest.mark.parametrize(("status", "left", "requeued"), [(143, 1, True), (0, 0, False)], ids=["stopped", "finished"])
def test_a_stop_reaches_the_processes_and_not_torchrun(cluster, tmp_path, status, left, requeued):
    """A torchrun that took the signal would end with another status, and its processes with it."""
    job = cluster(QUICK_TORCHRUN, SIGNALS=1, STATUS=status)
    for rank in (0, 1):
        wait_for(tmp_path / f"ready{rank}", job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == left, cluster.log()
    assert cluster.requeued() == (f"requeue {cluster.job}\n" if requeued else "")


@pytest.mark.slow
def test_a_process_that_was_still_starting_is_told_again(cluster, tmp_path):
    job = cluster(QUICK_TORCHRUN, SIGNALS=2, STATUS=143)
    for rank in (0, 1):
        wait_for(tmp_path / f"ready{rank}", job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(90) == 1 and cluster.requeued(), cluster.log()


def test_an_error_is_not_tried_again(cluster):
    job = cluster(QUICK_TORCHRUN, SIGNALS=0, STATUS=2)
    assert job.wait(60) == 1 and cluster.requeued() == ""


def test_a_term_of_slurm_is_waited_out(cluster, tmp_path):
    """SLURM ends a job with SIGTERM to all of it: whether it comes back is not the script's to decide then."""
    job = cluster(QUICK_TORCHRUN, SIGNALS=1, STATUS=143)
    for rank in (0, 1):
        wait_for(tmp_path / f"ready{rank}", job)
    job.send_signal(signal.SIGTERM)
    for process in psutil.Process(job.pid).children(recursive=True):
        if "ready" in process.cmdline()[-1]:
            process.send_signal(signal.SIGTERM)
    assert job.wait(60) == 1 and cluster.requeued() == ""


@pytest.mark.slow
def test_a_job_is_stopped_queued_again_and_finishes(cluster, small_run, tmp_path):
    """torchrun itself, two nodes: USR1 in the middle, a checkpoint, and the same command once more."""
    config = small_run(max_iters=ITERATIONS, save_every=0, model={"top_k": 4})
    (tmp_path / "run.toml").write_text(to_toml(config))
    flags = ["--config", str(tmp_path / "run.toml")]
    job = cluster(TORCHRUN, *flags)
    wait_for(tmp_path / "held", job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(200) == 1, cluster.log()[-3000:]
    assert cluster.requeued() == f"requeue {cluster.job}\n"
    folder = Path(config.out_dir)
    assert [path.name for path in folder.glob("ckpt/step_*")] == [f"step_{HELD + 1:08}"]
    assert "stopped by SIGTERM at iteration 7" in cluster.log()
    assert cluster(TORCHRUN, *flags).wait(200) == 0, cluster.log()[-3000:]
    assert cluster.requeued().count("\n") == 1 and f"start 2 of job {cluster.job}" in cluster.log()
    rows = [r["iter"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    assert rows == list(range(1, ITERATIONS + 1))
    assert json.loads((folder / f"ckpt/step_{ITERATIONS:08}/state.json").read_text())["ranks"] == 2
