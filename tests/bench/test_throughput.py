"""Training steps by the clock: the command, its exit status, its refusal of what is wrong; targets; peers; ranks."""

import json
from dataclasses import replace
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest
import torch

from moe_engine import Transformer, attention, preset, torch_backend
from moe_engine.attention import attend
from moe_engine.bench import checks, goals, plan, ranks, speeds, steps
from moe_engine.bench import throughput as bench
from moe_engine.bench.__main__ import main
from moe_engine.bench.parts import PARTS
from moe_engine.bench.peers import MIXTRAL_STYLE, mixtral
from moe_engine.bench.runner import read_rows
from moe_engine.bench.targets import GUIDE
from moe_engine.train import config as settings
from moe_engine.train.cli import parse
from moe_engine.train.errors import InputError
from moe_engine.train.parallel import World

SIZES = {"num_layers": 2, "d_model": 32, "num_heads": 4, "head_dim": 8, "d_ff": 24, "vocab_size": 64}
SMALL = ["--batch_size", "1", "--block_size", "16", "--rounds", "2", "--part_steps", "1"]
SMALL += [text for name, value in SIZES.items() for text in (f"--model.{name}", str(value))]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def throughput(*flags):
    return main(["throughput", *SMALL, *flags])


# The command


def test_on_a_cpu_it_measures_says_that_no_target_is_checked_and_writes_rows(tmp_path, capsys):
    output, picture = tmp_path / "rows" / "throughput.jsonl", tmp_path / "throughput.png"
    flags = ["--peers", "false", "--output", str(output), "--picture", str(picture), "--checkpointing", "block"]
    assert throughput(*flags) == 3
    shown = capsys.readouterr().out
    assert shown.count("not checked: no GPU") == 4 and "random token ids" in shown and "head + loss" in shown
    row, *targets = read_rows(output)
    assert row["name"] == steps.OURS and row["rounds"] == 2 and row["settings"]["checkpointing"] == "block"
    assert row["tokens"] == 16 and row["tokens_per_second"] == pytest.approx(16 / row["p50"])
    assert 0 < row["mfu"] < 1 and row["memory"] > 1e7 and row["gradient_error"] < 1e-5
    assert tuple(row["parts"]) == PARTS and row["parts"]["communication"] == 0
    assert all(row["parts"][part] > 0 for part in PARTS if part != "communication")
    assert [t["name"] for t in targets] == ["8b_1x40gb", "8b_1x80gb", "8b_8x40gb", "8b_8x80gb"]
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def measured(monkeypatch):
    """A measurement that takes no time, of one micro-step fewer than configured."""
    values = {name: 1.0 for name in ("p20", "p50", "p80", "tokens_per_second", "mfu", "memory", "gradient_error")}
    of = {"data": "text", "ranks": 1, "preset": "tiny", "batch_size": 1, "block_size": 16, "grad_accum_steps": 1}
    of |= {"dtype": "float32", "optimizer": "adamw", "checkpointing": "none", "memory": "own"}
    of |= {"optimizer_in_backward": True, "configured_grad_accum_steps": 2}
    row = {"benchmark": "throughput", "name": "ours", "device": "cpu", "threads": 1, "settings": of, **values}
    monkeypatch.setattr(bench, "measure", lambda _: [row | {"parts": None}])


@pytest.mark.parametrize(
    ("verdicts", "flags", "expected"),
    [
        (["not checked: no GPU"] * 4, [], 3),
        (["not checked: no GPU"] * 4, ["--allow_unchecked"], 0),
        (["PASS", "not checked: needs 8 × A100 40 GB"], [], 0),
        (["FAIL", "not checked: needs 8 × A100 40 GB"], ["--allow_unchecked"], 1),
    ],
)
def test_exit_status(measured, monkeypatch, capsys, verdicts, flags, expected):
    rows = goals.target_rows(CPU, None, {"ranks": 1}, 1.0)
    rows = [row | {"verdict": verdict} for row, verdict in zip(rows, verdicts, strict=False)]
    monkeypatch.setattr(bench, "target_rows", lambda *_: rows)
    assert throughput(*flags) == expected
    assert "the configuration has 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--part_steps", "-1"], "--part_steps: expected at least 0, got -1"),
        (["--ranks", "0"], "--ranks: expected at least 1, got 0"),
        (["--ranks", "1", "--peers"], "--peers: expected no --ranks"),
        (["--target", "8b_1x40gb"], "--target 8b_1x40gb: expected a GPU, found none"),
        (["--target", "9b"], "--target: expected one of auto, 8b_1x40gb"),
        (["--peers", "--dtype", "bfloat16"], "--peers: expected one process on a CPU, float32"),
        (["--peers", "--model.tie_embeddings"], "1 on cpu, float32, tiny, another model"),
        (["--peers", "--checkpointing", "block"], "1 on cpu, float32, tiny, checkpointing"),
        (["--memory", "same", "--peers", "false"], "--memory: expected peers, which it is about, got same and none"),
        (["--output", f"{__file__}/rows.jsonl"], "--output: expected a file that can be written, got "),
        (["--picture", "."], "--picture: expected a file that can be written, got . (Is a directory)"),
        (["--model.backend", "triton"], "got Triton's interpreter, in which nothing is timed"),
        (["--data_dir", "nowhere"], "--data_dir nowhere: no such folder"),
    ],
)
def test_bad_options_are_one_line_and_status_2(capsys, flags, message):
    assert throughput(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


# What is wrong has no time


def _too_large(expert_mlp):
    return lambda x, *rest: 1.01 * expert_mlp(x, *rest)


def _wrong_expert(expert_mlp):
    return lambda x, w_up, b_up, w_down, *rest: expert_mlp(x, w_up, b_up, w_down.roll(1, 0), *rest)


@pytest.mark.parametrize(
    ("fault", "dtype"), [(_too_large, "float32"), (_wrong_expert, "float32"), (_wrong_expert, "bfloat16")]
)
def test_a_wrong_model_has_no_time(monkeypatch, tmp_path, capsys, fault, dtype):
    monkeypatch.setattr(torch_backend, "expert_mlp", fault(torch_backend.expert_mlp))
    output = tmp_path / "rows.jsonl"
    assert throughput("--dtype", dtype, "--allow_unchecked", "--output", str(output)) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and not output.exists()
    assert shown.err.startswith("error: wrong result: our loss is off by ") and shown.err.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_model_is_well_within_the_tolerance(dtype):
    error = checks.check_exact(
        preset("tiny", **SIZES), settings.resolve({"data_dir": "", "preset": "tiny"}), CPU, dtype
    )
    assert error < checks.GRADIENT_TOLERANCE[dtype] / 3


def test_the_check_is_long_enough_for_windows_and_for_the_tiles_of_many_rows(monkeypatch):
    assert [checks.checked_tokens(preset("8b"), timed) for timed in (16, 256, 1 << 14)] == [64, 256, 512]
    many = preset("8b", num_experts=256, top_k=4)
    assert checks.checked_tokens(many, 1 << 14) == checks.MOST_TOKENS
    config, run = preset("tiny", **SIZES), settings.resolve({"data_dir": "", "preset": "tiny"})
    monkeypatch.setattr(attention, "attend", lambda q, k, v, sinks, window: attend(q, k, v, sinks, 0))
    with pytest.raises(checks.WrongResult):
        checks.check_exact(config, run, CPU, torch.float32)


# Targets


@pytest.fixture
def card(monkeypatch):
    """Makes every GPU one of that name and memory."""

    def use(name, memory):
        for module in (goals, plan):
            monkeypatch.setattr(module, "device_name", lambda _: name)
            monkeypatch.setattr(module, "memory_total", lambda _: memory)
        monkeypatch.setattr(goals, "make_row", lambda _, name, of, device, **values: {"name": name, **values})

    return use


A100_80, A100_40 = ("NVIDIA A100-SXM4-80GB", 85.1e9), ("NVIDIA A100-SXM4-40GB", 42.3e9)
H100 = ("NVIDIA H100 80GB HBM3", 85.0e9)


@pytest.mark.parametrize(
    ("gpu", "ranks", "row", "speed", "verdict", "target", "moonshot"),
    [
        (A100_80, 1, "8b_1x80gb", 2000.0, "PASS", 2000, 10_000),
        (A100_80, 1, "8b_1x80gb", 1999.0, "FAIL", 2000, 10_000),
        (A100_40, 8, "8b_8x40gb", 24_000.0, "PASS", 16_000, 80_000),
        (H100, 1, "8b_1x80gb", 6340.0, "PASS", 2000 * 989 / 312, 25_000),
        (H100, 8, "8b_8x80gb", 100_000.0, "FAIL", 32_000 * 989 / 312, 200_000),
        (("NVIDIA L40S", 47.7e9), 1, "8b_1x40gb", 2000.0, "PASS", 1000 * 362 / 312, 10_000 * 362 / 312),
    ],
)
def test_a_target_is_of_the_card_or_scaled_by_peak(card, gpu, ranks, row, speed, verdict, target, moonshot):
    card(*gpu)
    table, chosen = plan._table({}, "auto", GPU, ranks)
    assert chosen == row and table["preset"] == "8b"
    found = {r["name"]: r for r in goals.target_rows(GPU, chosen, {"ranks": ranks}, speed)}
    judged = found.pop(row)
    assert judged["verdict"] == verdict and judged["scaled"] is ("A100" not in gpu[0])
    assert judged["target"] == pytest.approx(target) and judged["ratio"] == pytest.approx(speed / target)
    assert judged["moonshot"] == pytest.approx(moonshot)
    assert judged["moonshot_ratio"] == pytest.approx(speed / moonshot)
    assert all(r["verdict"].startswith("not checked: needs") and r["measured"] is None for r in found.values())


@pytest.mark.parametrize(
    ("gpu", "ranks", "given", "preset_name", "verdict"),
    [
        (A100_80, 1, {"preset": "small"}, None, "not checked: another configuration was run, see --target"),
        (A100_80, 1, {"model": {"num_layers": 2}}, "8b", "not checked: another configuration was run, see --target"),
        (A100_80, 1, {"block_size": 128}, "8b", "not checked: another configuration was run, see --target"),
        (A100_80, 2, {}, "small", "not checked: needs 1 × A100 80 GB"),
        (("NVIDIA GeForce RTX 3090", 25.4e9), 1, {}, "small", "not checked: needs 1 × A100 80 GB"),
        (("Someone's card", 85e9), 1, {}, "small", "not checked: needs 1 × A100 80 GB"),
    ],
)
def test_a_target_is_not_checked(card, gpu, ranks, given, preset_name, verdict):
    card(*gpu)
    table, chosen = plan._table(given, "auto", GPU, ranks)
    assert chosen is None and table.get("preset") == preset_name
    rows = goals.target_rows(GPU, chosen, {"ranks": ranks}, 1e6)
    assert rows[1]["verdict"] == verdict and goals.status(rows, allow_unchecked=False) == 3


def test_a_target_by_name(card):
    card(*A100_80)
    assert plan._table({}, "8b_1x40gb", GPU, 1)[1] == "8b_1x40gb"
    with pytest.raises(InputError, match="--target 8b_8x80gb: expected --ranks 8, got 1"):
        plan._table({}, "8b_8x80gb", GPU, 1)
    with pytest.raises(InputError, match="expected no --config and no --preset"):
        plan._table({"preset": "8b"}, "8b_1x40gb", GPU, 1)
    with pytest.raises(InputError, match=r"expected its own model and block_size, got --model\.num_layers"):
        plan._table({"model": {"num_layers": 2}}, "8b_1x40gb", GPU, 1)
    assert plan._table({"model": {"save": "x"}, "batch_size": 1}, "8b_1x40gb", GPU, 1)[1] == "8b_1x40gb"
    scaled = goals.target_rows(GPU, "8b_1x40gb", {"ranks": 1}, 1e3)[0]
    assert scaled["scaled"] and scaled["target"] == 1000  # another card of the same peak


def test_all_configurations_are_taken_with_few_micro_steps(tmp_path, monkeypatch):
    for target in GUIDE:
        monkeypatch.setattr(plan, "_table", lambda *_, t=target: (settings.read_toml(plan.CONFIGS / t.file), t.file))
        flags = {"device": "cpu", "data_dir": "anywhere"}
        made = plan.make_plan(flags, World(0, target.ranks, 0), tmp_path)
        assert made.config.grad_accum_steps <= 4 and made.names == [steps.OURS]
        assert made.micro_steps == (8 if target.file == "8b_1x80gb.toml" else None)


# Peers


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    ours = Transformer(preset("tiny", **SIZES, **MIXTRAL_STYLE))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return ours


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_the_same_weights_are_the_same_model(pair, experts):
    pytest.importorskip("transformers", minversion="5.0")
    checks.check_same(experts, pair, mixtral(pair, experts))


@pytest.mark.parametrize(
    ("parameter", "change"),
    [
        ("model.layers.1.mlp.experts.down_proj", lambda w: w.mul_(1.01)),
        ("model.layers.0.mlp.experts.gate_up_proj", lambda w: w.copy_(w.flip(1))),  # up where gate should be
        ("model.layers.0.mlp.gate.weight", lambda w: w.copy_(w.roll(1, 0))),  # the wrong expert
        ("lm_head.weight", lambda w: w.zero_()),
    ],
)
def test_a_peer_that_differs_has_no_time(pair, parameter, change):
    pytest.importorskip("transformers", minversion="5.0")
    peer = mixtral(pair)
    with torch.no_grad():
        change(peer.get_parameter(parameter))
    with pytest.raises(checks.WrongResult, match="not the same model"):
        checks.check_same("peer", pair, peer)


def test_the_loop_over_experts_is_the_same_model_with_biases_too():
    config = preset("tiny", **SIZES)
    ours, loop = Transformer(config), Transformer(config)
    steps.use_loop(loop)
    checks.check_same("loop", ours, loop)
    with torch.no_grad():
        loop.blocks[1].moe.b_down.add_(0.1)
    with pytest.raises(checks.WrongResult, match="loop: loss"):
        checks.check_same("loop", ours, loop)


class _Here:
    """A `steps.Remote` without a process."""

    def __new__(cls, name, config, keep_memory):
        if name in steps.TRANSFORMERS:
            return steps.Peer(name, config)
        return steps.Ours(name, config, World(0, 1, 0), CPU)


def test_peers_are_compared_in_one_run(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers", minversion="5.0")
    monkeypatch.setattr(steps, "Remote", _Here)
    output = tmp_path / "rows.jsonl"
    assert throughput("--grad_accum_steps", "2", "--allow_unchecked", "--output", str(output)) == 0
    rows = read_rows(output)[:-4]
    assert [row["name"] for row in rows] == [steps.OURS, steps.OURS_PLAIN, steps.LOOP, *steps.TRANSFORMERS]
    assert all(row["tokens"] == 32 and row["baseline"] == "transformers Mixtral, grouped_mm" for row in rows)
    assert rows[3]["ratio"] == 1 and [bool(row["parts"]) for row in rows] == [True] * 3 + [False] * 2
    speeds.draw(tmp_path / "picture.png", json.loads(json.dumps(rows)))
    assert "2 micro-steps" in capsys.readouterr().out


def test_missing_peers_are_said_to_be_missing(monkeypatch, measured, capsys):
    def version(_):
        raise plan.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(plan.importlib.metadata, "version", version)
    assert throughput("--allow_unchecked") == 0
    assert capsys.readouterr().out.count("not installed (pip install 'transformers>=5')") == 2


@pytest.fixture
def small(tmp_path):
    given = {"preset": "tiny", "batch_size": 1, "block_size": 16, "model": SIZES, "device": "cpu"}
    return plan.make_plan(given | {"peers": False}, World(0, 1, 0), tmp_path).config


def test_a_process_answers_until_it_is_told_to_end(small):
    near, far = Pipe()
    for message in (steps.STEP, 1, None):
        near.send(message)
    steps._serve(far, steps._Order(steps.OURS_PLAIN, small, False, 1))
    assert near.recv() is None and tuple(near.recv()["parts"][0]) == PARTS and not near.poll()
    steps._serve(far, steps._Order(steps.OURS, replace(small, data_dir="nowhere"), False, 1))
    assert isinstance(near.recv(), InputError)


def test_a_process_of_its_own(small):
    remote = steps.Remote(steps.LOOP, small, keep_memory=True)
    remote()
    assert remote.report(0)["memory"] > 1e7
    remote.close()
    assert remote.process.exitcode == 0


# Ranks


def test_ranks(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    assert throughput("--ranks", "2", "--allow_unchecked", "--output", str(output)) == 0
    row, *targets = read_rows(output)
    assert row["settings"]["ranks"] == 2 and row["tokens"] == 32 and row["efficiency"] == 1 and len(targets) == 4
    assert row["parts"]["communication"] > 0 and row["parts"]["attention"] > 0
    shown = capsys.readouterr().out
    assert "efficiency" in shown and "share the same cores" in shown


def test_numbers_of_ranks_on_a_gpu_are_not_compared_in_different_configurations(monkeypatch, capsys):
    monkeypatch.setattr(bench, "pick_device", lambda _: GPU)
    monkeypatch.setattr(ranks.torch.cuda, "device_count", lambda: 8)
    assert throughput("--ranks", "1", "8") == 2
    assert "--ranks: expected --preset or --config with several numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stderr", "error", "message"),
    [
        ("noise\nerror: --lr: expected\nTraceback", InputError, "--lr: expected"),
        ("error: wrong result: our loss is off\n", checks.WrongResult, "our loss is off"),
        ("Traceback: killed", RuntimeError, "2 processes failed with status 1:\nTraceback: killed"),
    ],
)
def test_what_ended_a_process_ends_the_command(monkeypatch, stderr, error, message):
    done = SimpleNamespace(stderr=stderr, returncode=1)
    monkeypatch.setattr(ranks.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(error) as caught:
        ranks.over_ranks("module", [2], {}, on_gpu=False)
    assert str(caught.value) == message


def test_efficiency_is_over_the_first_row():
    rows = [{"tokens_per_second": s, "settings": {"ranks": n}} for n, s in ((2, 100.0), (8, 300.0))]
    ranks.add_efficiency(rows)
    assert [row["efficiency"] for row in rows] == [1, 0.75]


def test_options_go_on_to_the_processes():
    given = {"preset": "tiny", "fresh": True, "peers": False, "dtype": None, "model": {"top_k": 1}, "data_dir": "a b"}
    assert ranks.arguments(given) == [
        "--preset=tiny", "--fresh=true", "--peers=false", "--dtype=none", "--model.top_k=1", "--data_dir=a b",
    ]  # fmt: skip
    parsed = parse("x", plan.Flags, ranks.arguments(given))
    assert parsed == given


def test_the_target_that_was_checked_stands_for_all_ranks():
    rows = [
        {"name": "a", "measured": None, "verdict": "1"},
        {"name": "a", "measured": 1.0, "verdict": "2"},
        {"name": "a", "measured": None, "verdict": "3"},
    ]
    assert goals.merge(rows) == [rows[1]]
