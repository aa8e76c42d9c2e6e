"""Several nodes: torchruns that find one another, nodes that are lost and come back.

A torchrun with its processes stands for a host: several of them on this machine, over loopback or, in namespaces of
their own, over a cable that can be pulled.
"""

import dataclasses
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
import torch
from safetensors.torch import load_file

from moe_engine.train import __main__ as command
from moe_engine.train.config import to_toml
from moe_engine.train.errors import InputError
from moe_engine.train.loop import Trainer
from moe_engine.train.metrics import read_metrics
from moe_engine.train.parallel import World, accumulation_for

ONE, CPU = World(0, 1, 0), torch.device("cpu")
ITERATIONS, SAVED, HELD = 12, 4, 6
# Every expert for every token: no choice that a rounding could turn.
EVERY_EXPERT = {"top_k": 4}
# A node that is gone is missed after 8 s in place of 15. A busy machine's heartbeats are up to some seconds late.
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=8,last_call_timeout=2,join_timeout=300"

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
# Each meeting of the nodes has a store of its own. Else a torchrun that starts anew waits for an address that the
# others have from the first meeting and do not give again, until it and they have timed out (docs/clusters.md).
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

# `moe-train`; where a file is named, this node stops at an iteration, once, and says so there.
NODE = """
import functools, json, os, sys, threading, time
from pathlib import Path
from moe_engine.train import loop, parallel
from moe_engine.train.__main__ import main

held, at, *flags = sys.argv[1:]
make_mesh = parallel.make_mesh

def mesh(*arguments):
    made = make_mesh(*arguments)
    print("mesh", json.dumps([os.environ["RANK"], os.environ["GROUP_RANK"], made.mesh.tolist()]), flush=True)
    return made

parallel.make_mesh = mesh
loop.peak_flops = functools.partial(loop.peak_flops, seconds=0.0)
loop.draw_plots = lambda *a, **k: None
train_step = loop.Trainer.train_step

def step(self):
    mine = held and self.world.local_rank == 0
    if mine and self.iteration == int(at) and not Path(held).exists():
        Path(held + ".tmp").write_text(str(os.getpid()))
        os.replace(held + ".tmp", held)
        give_up = time.monotonic() + 200
        while self.stop_signal is None and not Path(held + ".go").exists() and time.monotonic() < give_up:
            threading.Event().wait(0.02)
    return train_step(self)

loop.Trainer.train_step = step
sys.exit(main(flags))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition, seconds, what):
    """Poll another process's work; fail after some seconds. Returns the seconds that it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + seconds, f"not within {seconds} s: {what()}"
        time.sleep(0.02)
    return time.monotonic() - begin


class Node:
    """A torchrun with its processes.

    Args:
        log: file for what they print.
        flags: of moe-train.
        port: where the nodes meet; 0: this is the only one.
        nodes, ranks, restarts: of torchrun.
        host: where they meet.
        held, at: a file to make when iteration `at` is reached, and to stop there until the test goes on.
        before: a command to run torchrun with.
        more, conf: more options of torchrun, and of its --rdzv_conf.
        node_rank: this node's number, for the static rendezvous.
        env: more variables.
    """

    def __init__(self, log, flags, port=0, nodes="2", ranks=1, restarts=0, host="127.0.0.1", held="", at=HELD,
                 before=(), more=(), conf="", node_rank=None, env=None):  # fmt: skip
        self.log = log
        script = log.with_suffix(".py")
        script.write_text(NODE)
        meet = ["--standalone"]
        if node_rank is not None:
            meet = [f"--nnodes={nodes}", f"--node_rank={node_rank}", f"--master_addr={host}", f"--master_port={port}"]
        elif port:
            meet = [f"--nnodes={nodes}", "--rdzv_backend=c10d", f"--rdzv_endpoint={host}:{port}", "--rdzv_id=nodes",
                    f"--rdzv_conf={QUICK}{conf}"]  # fmt: skip
        arguments = [f"--nproc_per_node={ranks}", f"--max_restarts={restarts}", *meet, *more]
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                [*before, *TORCHRUN, *arguments, script, str(held), str(at), *flags],
                env=os.environ | ENVIRONMENT | (env or {}),
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def text(self):
        return self.log.read_text(errors="replace")

    def tail(self):
        return f"{self.log.name}: {self.text()[-3000:]}"

    def status(self, seconds=200):
        """Its exit status, once it has ended by itself."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there after {seconds} s: {self.tail()}")

    def kill(self):
        """The host loses its power: everything in it ends at once."""
        if self.process.poll() is None:
            agent = psutil.Process(self.process.pid)
            for process in [agent, *agent.children(recursive=True)]:
                process.kill()
        self.process.wait(20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def start(folder):
    """Starts nodes, and stops what is left of them."""
    started = []

    def node(name, flags, **options):
        started.append(Node(folder / f"{name}.log", flags, **options))
        return started[-1]

    yield node
    for one in started:
        one.kill()


@pytest.fixture(scope="module")
def make(small_run_in, folder):
    """A run of twelve iterations of 8 sequences, and the flags that say so."""

    def config(name, **values):
        defaults = {"max_iters": ITERATIONS, "save_every": SAVED, "model": EVERY_EXPERT}
        made = small_run_in(folder / name, **defaults | values)
        (folder / f"{name}.toml").write_text(to_toml(made))
        return made, ["--config", str(folder / f"{name}.toml")]

    return config


@pytest.fixture(scope="module")
def two(start):
    """Starts a node, which is where they meet, and once it is there another; keywords that start with b_ are for it."""

    def nodes(name, flags, **options):
        port = free_port()
        second = options | {k.removeprefix("b_"): v for k, v in options.items() if k.startswith("b_")}
        first, second = ({k: v for k, v in o.items() if not k.startswith("b_")} for o in (options, second))
        a = start(f"{name} a", flags, port=port, **first)
        wait_for(lambda: listens(port), 200, a.tail)
        return a, start(f"{name} b", flags, port=port, **second), port

    return nodes


def listens(port):
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


def curve(config, key="loss"):
    """A value of every iteration; each is there once."""
    rows = [r for r in read_metrics(Path(config.out_dir) / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["iter"] for r in rows] == list(range(1, ITERATIONS + 1))
    return [r[key] for r in rows]


def newest(config):
    return Path(config.out_dir) / "ckpt" / f"step_{ITERATIONS:08}"


def state_of(config, iteration=ITERATIONS):
    return json.loads((Path(config.out_dir) / "ckpt" / f"step_{iteration:08}" / "state.json").read_text())


def assert_bitwise(config, other):
    """Both ended with the same weights and moments, and had the same losses on the way."""
    assert curve(config) == curve(other) and curve(config, "grad_norm") == curve(other, "grad_norm")
    files = [sorted(newest(one).glob("*.safetensors")) for one in (config, other)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] and files[0]
    for pair in zip(*files, strict=True):
        a, b = map(load_file, pair)
        assert a.keys() == b.keys() and len(a) > 50
        for name in a:  # the random state may differ: nothing in training draws from it
            assert torch.equal(a[name], b[name]) or name.startswith("rng."), name


# Micro-steps for another number of processes

TOKENS = 8 * 4 * 16 * 2  # 8 processes, 4 sequences of 16 tokens, 2 micro-steps


@pytest.mark.parametrize(
    ("ranks", "changed", "steps"),
    [
        (8, {}, 2),
        (4, {}, 4),
        (1, {}, 16),
        (16, {}, 1),
        (32, {}, 2),  # less than a micro-step: as configured, which is then refused
        (3, {}, 2),  # cannot be divided
        (4, {"grad_accum_steps": 4}, 4),  # by hand
        (4, {"grad_accum_steps": 3}, 3),
        (4, {"batch_size": 8}, 2),
    ],
)
def test_micro_steps_make_up_for_processes(small_run, ranks, changed, steps):
    known = {"tokens_per_iteration": TOKENS, "arguments": {"batch_size": 4, "grad_accum_steps": 2}}
    config = small_run(**{"batch_size": 4, "grad_accum_steps": 2} | changed)
    assert accumulation_for(config, known, ranks) == steps


def test_steps_in_backward_know_one_micro_step_only(small_run):
    known = {"tokens_per_iteration": TOKENS // 2, "arguments": {"batch_size": 4, "grad_accum_steps": 1}}
    config = small_run(batch_size=4, grad_accum_steps=1, optimizer_in_backward=True)
    assert [accumulation_for(config, known, ranks) for ranks in (8, 4)] == [1, 1]


@pytest.fixture
def of_two(small_run, rewrite_state):
    """A run folder that says that two processes made it, six iterations of 2 × 4 sequences."""
    config = small_run(max_iters=6, router_aux_coef="0", batch_size=8)
    assert command.train(config) == 0
    arguments = state_of(config, 6)["arguments"] | {"batch_size": 4}
    rewrite_state(Path(config.out_dir) / "ckpt/step_00000006", arguments=arguments, ranks=2)
    return dataclasses.replace(config, batch_size=4, max_iters=ITERATIONS)


def test_half_the_processes_go_on_with_twice_the_micro_steps(of_two, small_run, tmp_path, capsys):
    """Without the balance loss, which is of a micro-step, the curve does not notice. What was configured is kept."""
    assert command.train(of_two) == 0
    whole = small_run(out_dir=tmp_path / "whole", router_aux_coef="0", batch_size=8)
    assert command.train(whole) == 0
    assert curve(of_two) == pytest.approx(curve(whole), abs=1e-5)
    assert curve(of_two, "grad_norm") == pytest.approx(curve(whole, "grad_norm"), abs=1e-4)
    assert curve(of_two, "tokens") == curve(whole, "tokens")
    note = "--grad_accum_steps 2 in place of 1"
    assert capsys.readouterr().out.count(note) == 1
    state = state_of(of_two)
    assert (state["arguments"]["grad_accum_steps"], state["ranks"]) == (1, 1)
    assert "\ngrad_accum_steps = 1\n" in (Path(of_two.out_dir) / "config.toml").read_text()
    # And again: the checkpoint of one process, which had been two, does not say how many they should be.
    trainer = Trainer(of_two, ONE, CPU)
    trainer.resume(newest(of_two))
    assert trainer.engine.grad_accum_steps == 2


@pytest.mark.parametrize("changed", [{"grad_accum_steps": 4}, {"batch_size": 3}, {"batch_size": 2}])
def test_what_is_changed_by_hand_has_to_fit(of_two, changed):
    trainer = Trainer(dataclasses.replace(of_two, **changed), ONE, CPU)
    with pytest.raises(InputError, match="--batch_size × --grad_accum_steps × devices"):
        trainer.resume(Path(of_two.out_dir) / "ckpt/step_00000006")


# Two nodes


@pytest.fixture(scope="module")
def whole(make, two):
    """A run on two nodes that nothing disturbs."""
    config, flags = make("whole")
    for node in two("whole", flags)[:2]:
        assert node.status() == 0, node.tail()
    return config


def test_two_nodes_train_as_one_process(whole, make):
    one, _ = make("one", batch_size=8)
    assert command.train(one) == 0
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert curve(whole, key) == pytest.approx(curve(one, key), abs=tolerance)
    files = {path.name for path in newest(whole).iterdir()}
    assert {"ckpt_rank00000.safetensors", "ckpt_rank00001.safetensors"} <= files
    assert state_of(whole)["ranks"] == 2
    assert len(list(Path(whole.out_dir).glob("ckpt/step_*"))) == ITERATIONS // SAVED


@pytest.mark.slow
def test_a_lost_node_is_waited_for_and_both_go_on(whole, make, two, start, folder):
    """With a restart to spare, the other node stays, and starts anew when the lost one is back."""
    config, flags = make("lost")
    held = folder / "lost.held"
    a, b, port = two("lost", flags, restarts=1, b_held=held)
    wait_for(held.exists, 200, b.tail)
    b.kill()
    b = start("lost b", flags, port=port, restarts=1, held=held)
    assert [a.status(), b.status()] == [0, 0], a.tail()
    assert a.text().count(f"resuming from {Path(config.out_dir) / 'ckpt/step_00000004'}") == 1
    assert_bitwise(config, whole)


@pytest.mark.slow
def test_without_a_restart_the_other_node_leaves(whole, make, two, folder):
    config, flags = make("leaves")
    held = folder / "leaves.held"
    a, b, _ = two("leaves", flags, b_held=held)
    wait_for(held.exists, 200, b.tail)
    b.kill()
    begin = time.monotonic()
    assert a.status(60) == 1
    print(f"left after {time.monotonic() - begin:.1f} s")
    assert state_of(config, SAVED)["iteration"] == SAVED and not newest(config).exists()
    for node in two("leaves again", flags)[:2]:
        assert node.status() == 0, node.tail()
    assert_bitwise(config, whole)


@pytest.mark.slow
def test_without_the_place_to_meet_the_other_node_leaves(make, two, folder):
    """Restarts do not help: the store was with the node that is lost."""
    config, flags = make("place")
    held = folder / "place.held"
    a, b, _ = two("place", flags, restarts=1, b_held=held)
    wait_for(held.exists, 200, b.tail)
    Path(f"{held}.go").touch()
    a.kill()
    assert b.status() == 1
    assert not newest(config).exists()


@pytest.mark.slow
def test_a_killed_process_is_started_again(whole, make, start, folder):
    """`--max_restarts` on one node: the run goes on from its checkpoint by itself."""
    config, flags = make("restart")
    held = folder / "restart.held"
    node = start("restart", flags, ranks=2, restarts=2, held=held)
    wait_for(held.exists, 200, node.tail)
    os.kill(int(held.read_text()), signal.SIGKILL)
    assert node.status() == 0, node.tail()
    assert_bitwise(config, whole)


@pytest.mark.slow
def test_the_rest_goes_on_without_a_node_that_is_lost_for_good(make, two, folder):
    """`--nnodes=1:2`: one process takes the micro-steps of two."""
    config, flags = make("elastic", router_aux_coef="0")
    held = folder / "elastic.held"
    a, b, _ = two("elastic", flags, nodes="1:2", restarts=1, conf=",last_call_timeout=25", b_held=held)
    wait_for(held.exists, 200, b.tail)
    b.kill()
    begin = time.monotonic()
    assert a.status() == 0, a.tail()
    print(f"done after {time.monotonic() - begin:.1f} s")
    assert "--grad_accum_steps 2 in place of 1" in a.text()
    assert [state_of(config, i)["ranks"] for i in (SAVED, ITERATIONS)] == [2, 1]
    one, _ = make("elastic one", router_aux_coef="0", batch_size=8)
    assert command.train(one) == 0
    assert curve(config) == pytest.approx(curve(one), abs=1e-5)


@pytest.mark.slow
def test_a_node_that_comes_back_is_taken_in(make, two, start, folder):
    """`--nnodes=1:2`: torchrun ends the processes that are there with SIGTERM, so they save, and starts all anew."""
    config, flags = make("grows", router_aux_coef="0", grad_accum_steps=2)
    held, port = folder / "grows.held", free_port()
    elastic = {
        "port": port,
        "nodes": "1:2",
        "restarts": 1,
        "conf": ",keep_alive_max_attempt=60",
    }  # alone by mistake: never
    a = start("grows a", flags, held=held, **elastic)
    wait_for(held.exists, 200, a.tail)
    assert state_of(config, SAVED)["ranks"] == 1
    b = start("grows b", flags, **elastic)
    assert [a.status(), b.status()] == [0, 0], a.tail()
    assert "--grad_accum_steps 1 in place of 2" in a.text()
    assert state_of(config)["ranks"] == 2
    one, _ = make("grows one", router_aux_coef="0", batch_size=8)
    assert command.train(one) == 0
    assert curve(config) == pytest.approx(curve(one), abs=1e-5)


@pytest.mark.slow
def test_each_node_has_a_whole_copy(make, start):
    """HSDP: two nodes of two processes; those that share a copy are on one node. Here the nodes have given ranks."""
    config, flags = make("copies", batch_size=2, dp_replicate=2)
    port = free_port()
    nodes = [start(f"copies {i}", flags, port=port, ranks=2, node_rank=i) for i in (0, 1)]
    for node in nodes:
        assert node.status() == 0, node.tail()
    lines = [line.split(" ", 1)[1] for node in nodes for line in node.text().splitlines() if line.startswith("mesh ")]
    found = [json.loads(line) for line in lines]
    node_of = {int(rank): node for rank, node, _ in found}
    assert len(found) == len(node_of) == 4 and set(node_of.values()) == {"0", "1"}
    for _, _, copies in found:
        assert copies == [[0, 1], [2, 3]] and [len({node_of[rank] for rank in copy}) for copy in copies] == [1, 1]
    one, _ = make("copies one", batch_size=8)
    assert command.train(one) == 0
    assert curve(config) == pytest.approx(curve(one), abs=1e-5)


# A cable between two hosts


@pytest.fixture
def cable():
    """Two network namespaces with a cable between them; returns each one's name, device and address."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root, and ip of iproute2")
    ends = [(f"moe{os.getpid()}{x}", f"v{os.getpid()}{x}", f"10.77.0.{i}") for i, x in ((1, "a"), (2, "b"))]
    (a, device_a, _), (b, device_b, _) = ends

    def ip(*arguments, check=True):
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if done.returncode and check:
            pytest.skip(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

    try:
        for name, _, _ in ends:
            ip("netns", "add", name)
        ip("link", "add", device_a, "netns", a, "type", "veth", "peer", "name", device_b, "netns", b)
        for name, device, address in ends:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            for up in ("lo", device):
                ip("-n", name, "link", "set", up, "up")
        yield ends, ip
    finally:
        for name, _, _ in ends:
            ip("netns", "del", name, check=False)


@pytest.fixture
def apart(cable, start):
    """Starts a node in each of the two namespaces; the first one is where they meet."""
    ends, ip = cable

    def nodes(name, flags, held="", **options):
        for (namespace, device, address), end in zip(ends, "ab", strict=True):
            yield start(
                f"{name} {end}",
                flags,
                port=29400,  # nobody else is in there
                host=ends[0][2],
                before=["ip", "netns", "exec", namespace],
                more=[f"--local_addr={address}"],
                conf=f",is_host={int(end == 'a')}",
                held=held if end == "b" else "",
                env={"GLOO_SOCKET_IFNAME": device, **options},
            )

    def set_cable(to):
        ip("-n", ends[1][0], "link", "set", ends[1][1], to)

    return lambda *a, **k: list(nodes(*a, **k)), set_cable


@pytest.mark.slow
def test_two_hosts_with_a_cable_train_as_one_process(apart, make, whole):
    config, flags = make("apart")
    for node in apart[0]("apart", flags):
        assert node.status() == 0, node.tail()
    assert_bitwise(config, whole)


def has_ended(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_pulled_cable_ends_the_processes_in_time(apart, make, folder):
    """No connection is closed then: what ends the wait is the time limit of a collective.

    A torchrun that is cut off from where the nodes meet has no such limit of its own: it waits for an answer.
    """
    config, flags = make("pulled")
    held, limit = folder / "pulled.held", 20
    (a, b), set_cable = apart[0]("pulled", [*flags, f"--timeout={limit}"], held=held), apart[1]
    wait_for(held.exists, 200, b.tail)
    begin = time.monotonic()
    set_cable("down")
    Path(f"{held}.go").touch()
    wait_for(lambda: has_ended(int(held.read_text())), limit + 40, b.tail)
    assert a.status(limit + 40) == 1, a.tail()
    print(f"{time.monotonic() - begin:.1f} s after the cable was pulled; second torchrun: {b.process.poll()}")
    set_cable("up")
    assert b.status(150) == 1, b.tail()
    print(f"and {time.monotonic() - begin:.1f} s until the second torchrun had left, with the cable back")
    assert state_of(config, SAVED)["iteration"] == SAVED and not newest(config).exists()
