"""`moe-bench roofline`: what is counted on paper is what the code computes, moves and sends; nothing looks measured."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from moe_engine import MoEConfig, reference
from moe_engine.bench import projection, promises, roofline, roofline_plots
from moe_engine.bench.__main__ import main
from moe_engine.bench.gpus import GPUS
from moe_engine.bench.scaling import Links, collective_seconds, meta_model, project, volume
from moe_engine.bench.shapes import LayerShape
from moe_engine.bench.targets import TRAINING_TIMES
from moe_engine.bench.work import EXPERTS, FORWARD, HEAD, RECOMPUTED, UPDATE, Work, layer_work, step_work
from moe_engine.loss import linear_cross_entropy
from moe_engine.presets import preset
from moe_engine.testing import normal
from moe_engine.train import config as settings
from moe_engine.train.parallel import World
from moe_engine.train.step import Engine, build_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
A100, CPU = GPUS["a100-80gb"], torch.device("cpu")


def run_config(**options):
    return settings.resolve({"preset": "tiny", "batch_size": 1, "block_size": 16, **options}, {"data_dir": ""})


# -- what is computed and moved --


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
@pytest.mark.parametrize("name", ["tiny", "8b"])
def test_the_flops_of_a_step_are_those_of_its_mfu(name, checkpointing):
    model = preset(name)
    config = run_config(preset=name, block_size=512, batch_size=2, grad_accum_steps=3, checkpointing=checkpointing)
    works = step_work(config, model, 1e9)
    tokens = 2 * 512 * 3
    assert sum(w.model_flops for w in works) == pytest.approx(tokens * model.flops_per_token(512), rel=1e-12)
    recomputed = sum(w.flops for w in works if w.phase == RECOMPUTED)
    blocks = sum(w.flops for w in works if w.phase == FORWARD and w.part != HEAD)
    scores = sum(w.flops for w in works if w.phase == FORWARD and "scores" in w.name)
    assert recomputed == {"none": 0, "block": blocks, "selective": scores}[checkpointing]
    half = step_work(replace(config, checkpoint_every=2), model, 1e9)
    assert sum(w.flops for w in half if w.phase == RECOMPUTED) == pytest.approx(recomputed / 2, rel=0.6)


def test_the_flops_of_a_layer_are_those_that_pytorch_counts():
    moe = MoEConfig(48, 32, 4, 2)
    x = normal(24, 48, seed=1, dtype=torch.float32).requires_grad_()
    shapes = {"router.weight": (4, 48), "w_up": (4, 48, 64), "w_down": (4, 32, 48)}
    params = {name: normal(*shape, seed=2, dtype=torch.float32).requires_grad_() for name, shape in shapes.items()}
    with FlopCounterMode(display=False) as counter:
        reference.moe(x, params, moe).out.sum().backward()
    assert sum(work.flops for work in layer_work(moe, 24)) == counter.get_total_flops()


@pytest.mark.parametrize("save", ["h", "x"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_bytes_of_the_launches_add_up_to_the_floors(save, bias):
    shape = LayerShape(70, 110, 130, 6, 2)
    works = [w for w in layer_work(MoEConfig(110, 130, 6, 2, save=save, expert_bias=bias), 70) if w.part == EXPERTS]
    forward = sum(w.bytes for w in works if w.phase == FORWARD)
    backward = sum(w.bytes for w in works if w.phase != FORWARD)
    row_sums = 2 * 70 * 110 if bias else 0  # not of the floors: docs/kernels.md
    assert {"forward": forward, "backward": backward - row_sums} == shape.floors(save)


@pytest.mark.parametrize("save", ["h", "x"])
def test_launches_move_what_was_counted_of_the_kernels(save):
    """Against the committed rows of `moe-bench traffic`: partial sums of biases and sectors of 32 bytes are on top."""
    lines = (ROOT / "bench/results/traffic.jsonl").read_text(encoding="utf-8").splitlines()
    row = [row for row in map(json.loads, lines) if row["settings"]["save"] == save][-1]
    s = row["settings"]
    moe = MoEConfig(s["d_model"], s["d_ff"], s["experts"], s["top_k"], save=save)
    works = [w for w in layer_work(moe, s["tokens"]) if w.name not in ("router", "router backward")]
    assert len(works) == len(row["launches"])
    for work, launch in zip(works, row["launches"], strict=True):
        assert (work.phase == FORWARD) == (launch["phase"] == "forward")
        large = launch["read"] + launch["written"]
        if work.name != "gate statistics":  # a dozen sectors
            assert work.bytes == pytest.approx(large or launch["apart"], rel=0.1), work.name


class Passes(TorchDispatchMode):
    """Bytes of the operations that go over logits or multiply matrices: their inputs and their result."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        untouched = ("gather", "scatter", "empty")  # or one column of it
        if not func.is_view and not any(word in func.name() for word in untouched):
            tensors = [t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.itemsize for t in tensors if t.numel() >= 4096)
        return out


def test_the_head_moves_what_its_loss_moves(monkeypatch):
    """Passes over the logits and products, in bf16, in chunks, as PyTorch is asked for them."""
    model, tokens = replace(preset("tiny"), vocab_size=9_000), 256
    x = normal(tokens, model.d_model, seed=1, dtype=torch.bfloat16).requires_grad_()
    weight = normal(model.vocab_size, model.d_model, seed=2, dtype=torch.bfloat16).requires_grad_()
    targets = torch.arange(tokens)
    counted, seen = [], []
    for chunk in (1 << 30, 1):  # all words at once; three chunks of 4096
        monkeypatch.setattr("moe_engine.loss.CHUNK_LOGITS", chunk)
        monkeypatch.setattr("moe_engine.bench.work.CHUNK_LOGITS", chunk)
        works = [w for w in step_work(run_config(block_size=tokens), model, 0) if w.part == HEAD]
        with Passes() as passes:
            torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight))
        counted.append(sum(w.bytes for w in works))
        seen.append(passes.bytes)
    assert counted == pytest.approx(seen, rel=0.01)
    assert counted[1] - counted[0] == seen[1] - seen[0]  # of x and its gradient, in every chunk


def test_the_optimizer_moves_what_it_keeps():
    def update(**options):
        works = step_work(run_config(**options), preset("tiny"), 1000)
        return {w.name: w.bytes / 1000 for w in works if w.phase == UPDATE}

    assert update() == {"accumulation": 0, "clipping": 12, "step": 28}
    assert update(grad_accum_steps=3, grad_clip=0.0) == {"accumulation": 24, "clipping": 4, "step": 28}
    narrow = update(optimizer="adamw8bit", param_dtype="bfloat16", dtype="bfloat16", grad_accum_steps=2)
    assert narrow == {"accumulation": 6, "clipping": 6, "step": pytest.approx(10.0625)}


def test_a_bound_is_the_larger_of_two_times():
    work = Work(EXPERTS, "w", FORWARD, flops=312e12, bytes=2039e9 / 4)
    assert work.bound(A100) == "compute" and work.seconds(A100) == 1
    assert work.seconds(A100, 0.5, 0.1) == 2.5 and work.times(3).seconds(A100) == 3
    assert replace(work, bytes=4 * 2039e9).bound(A100) == "memory"


# -- what is sent --


class Sent(TorchDispatchMode):
    """Bytes that collectives are called on, and by all-reduces of floats only: counts of rows are integers."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("c10d::"):
            whole = {"c10d::_allgather_base_": args[0], "c10d::_reduce_scatter_base_": args[1]}.get(name, args[0])
            for tensor in tree_leaves(whole):
                if tensor.is_floating_point():
                    self.bytes[name] += tensor.numel() * tensor.itemsize
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("ranks", "replicas", "options"),
    [
        (8, 1, {"checkpointing": "block"}),  # recomputation gathers nothing again
        (16, 2, {"grad_accum_steps": 2}),  # every micro-step reduces, and sums over replicas
        (48, 1, {"reshard_after_forward": "never"}),
        (80, 1, {}),  # divides no dimension of an expert: 8 are padded to 80
        (4, 4, {}),
    ],
)
def test_the_volume_is_what_fsdp2_sends(ranks, replicas, options, monkeypatch):
    """A step of the real code among ranks that are not there, every collective seen."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # PyTorch puts one of its own there with every group
    model = replace(preset("tiny"), num_layers=2, backend="torch")
    config = run_config(dtype="bfloat16", dp_replicate=replicas, **options)
    world = World(0, ranks, 0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        transformer = build_model(config, model, world, CPU, torch.bfloat16, sharded=True)
        transformer.to_empty(device=CPU)
        for parameter in transformer.parameters():
            torch.nn.init.zeros_(parameter.to_local())
        engine = Engine(config, transformer, world, CPU, torch.bfloat16)
        tokens = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64)
        with Sent() as sent:
            engine.step([(tokens, tokens)] * config.grad_accum_steps, 0)
    finally:
        dist.destroy_process_group()
    expected = volume(meta_model(model), config, ranks, replicas)
    steps = config.grad_accum_steps
    assert sent.bytes["c10d::_allgather_base_"] == steps * expected.gathered
    assert sent.bytes["c10d::_reduce_scatter_base_"] == steps * expected.reduced
    loss = 8  # of all ranks, once an iteration
    assert sent.bytes["c10d::allreduce_"] == steps * expected.summed + loss
    assert sum(sent.bytes.values()) > 0


def test_the_time_of_a_collective():
    links = Links(host=100.0, network=10.0)
    assert collective_seconds(800.0, 8, 8, links) == 7.0  # each rank receives 700
    # A host receives 8/16 of it through 8 cards: as long as 5.0, less than 15/16 within a host.
    assert collective_seconds(800.0, 16, 8, links) == 7.5
    assert collective_seconds(800.0, 64, 8, Links(100.0, 1.0)) == 7 / 8 * 800 / 8
    assert collective_seconds(80.0, 8, 1, links) == 7.0  # one card of each host
    assert collective_seconds(80.0, 1, 1, links) == 0


def test_two_bounds_of_communication_and_a_fixed_batch():
    model, config = preset("8b"), run_config(preset="8b", block_size=4096, grad_accum_steps=1)
    one, eight = (project(config, model, A100, ranks, 1, Links(300e9, 50e9), 0.4, 0.8) for ranks in (1, 8))
    hsdp = project(config, model, A100, 64, 8, Links(300e9, 50e9), 0.4, 0.8)
    assert one.communication == 0 and sum(one.received) == 0 and one.hidden == one.exposed == one.compute
    assert (one.tokens, eight.tokens, hsdp.tokens) == (4096, 8 * 4096, 64 * 4096)
    assert eight.hidden == max(eight.compute, eight.communication) < eight.exposed
    assert eight.exposed == eight.compute + eight.communication
    assert eight.compute < one.compute  # an eighth of the optimizer's work
    parameters = 8.17e9
    # Gathered twice but for head and embedding, in 2 bytes; reduced in 4; a rank has an eighth itself.
    assert eight.received[:2] == pytest.approx([(4 * parameters - 4 * 579e6) * 7 / 8, 4 * parameters * 7 / 8], rel=1e-3)
    assert hsdp.received[2] == pytest.approx(2 * 4 * parameters / 8 * 7 / 8, rel=1e-3)
    assert eight.padding == 1
    # Within a host by its links; on eight hosts each has to receive 7/8 through 8 cards; replicas are a host apart.
    sent = sum(eight.received[:2])
    assert eight.communication == pytest.approx(sent / 300e9)
    assert hsdp.communication == pytest.approx(sent / 300e9 + hsdp.received[2] / 50e9)
    wide = project(config, model, A100, 64, 1, Links(300e9, 10e9))
    assert wide.communication == pytest.approx(sum(wide.received) / (63 / 64) * 7 / 8 / 80e9)
    halves = project(config, model, A100, 8, 2, Links(300e9, 50e9))  # both replicas are on the host
    assert halves.communication == pytest.approx(sum(halves.received) / 300e9)
    assert project(config, model, A100, 512, 1, Links(300e9, 50e9)).padding > 15  # 8 experts' w_down cut in 512


# -- promises --


def test_the_readme_says_what_follows_from_the_flops():
    assert f"{promises.peak_rate(A100) / 1e3:.1f} K tok/s on an A100" in README
    assert f"{promises.peak_rate(GPUS['h100']) / 1e3:.1f} K tok/s on an H100" in README
    assert promises.thousands(promises.peak_rate(A100)) == "17.2 K"
    lines = [*promises.times_table(2.0), *promises.rates_table()]
    table = {line[0]: line[1:] for line in lines}
    assert table["10 B tokens, 1 × A100: 48–72 h"] == ("161 h", "224–336 %", "impossible")
    for hours, needs in (("161 hours", "224–336 %"), ("20 hours", "202–336 %"), ("202 hours", "202–336 %")):
        assert f"| {hours} | {needs} of peak |" in README
        assert (hours.replace("ours", ""), needs, "impossible") in table.values()
    assert table["1 × A100: 1 K and 2 K tok/s"] == ("17.2 K tok/s", "6 % and 12 %", "modest")
    assert "| 17.2 K tok/s | 6 % and 12 % of peak |" in README
    assert table["8 × A100: 16 K and 32 K tok/s"][:2] == ("137.6 K tok/s", "12 % and 23 %")
    assert "| 137.6 K tok/s | 12 % and 23 % of peak |" in README
    assert {verdict for _, _, verdict in (line[1:] for line in lines[: len(TRAINING_TIMES) + 2])} == {"impossible"}
    assert "possible" not in {promises.verdict(1.01), promises.verdict(0.1)} and promises.verdict(0.5) == "possible"


# -- the command --


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Output, rows and folder of one run of the command."""
    folder = tmp_path_factory.mktemp("roofline")
    flags = ["--preset", "8b", "--batch_size", "4", "--block_size", "4096", "--card", "a100-80gb", "h100"]
    flags += ["--gpus", "1", "8", "64", "--grad_accum_steps", "2"]
    for name in ("output", "picture", "scaling_picture"):
        flags += [f"--{name}", str(folder / name)]
    with pytest.MonkeyPatch.context() as patch:
        texts: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: texts.append(" ".join(map(str, words))))
        assert main(["roofline", *flags]) == 0
    rows = [json.loads(line) for line in (folder / "output").read_text(encoding="utf-8").splitlines()]
    return "\n".join(texts), rows, folder


def test_everything_is_called_projected(printed):
    text, rows, _ = printed
    tables = [block for block in text.split("\n\n") if "  " in block]
    assert len(tables) >= 11
    assert text.splitlines()[0].startswith("Nothing below was measured")
    for table in tables:
        assert "projected" in table.strip().splitlines()[0], table.splitlines()[0]
    for row in rows:
        assert row["projected"] is True and row["device"].startswith("none, projected for ")
        assert not {"p20", "p50", "p80"} & row.keys(), "it would look timed"
    assert {row["settings"]["kind"] for row in rows} == {"launch", "part", "step", "scaling", "budget"}


def test_the_tables_add_up(printed):
    text, rows, _ = printed
    by_kind = {kind: [r for r in rows if r["settings"]["kind"] == kind and r["card"] == "h100"] for kind in
               ("launch", "part", "step", "scaling", "budget")}  # fmt: skip
    (step,) = by_kind["step"]
    for key in ("seconds_at_peak", "seconds_at_efficiency", "flops"):
        assert sum(row[key] for row in by_kind["part"]) == pytest.approx(step[key])
    assert step["tokens"] == 2 * 4 * 4096
    assert step["model_flops"] == pytest.approx(step["tokens"] * preset("8b").flops_per_token(4096))
    assert step["mfu_at_peak"] < 1 and step["mfu"] < step["settings"]["efficiency"]
    assert [row["settings"]["replicas"] for row in by_kind["scaling"]] == [1, 1, 1, 8]
    for row in by_kind["scaling"]:
        assert row["exposed"] <= row["hidden"]
    budget = by_kind["budget"][0]
    assert budget["dollars"] == pytest.approx(2 * budget["hours"]) and budget["hours"] > budget["hours_at_peak"]
    assert f"${budget['dollars_at_peak']:,.0f}" in text
    # Every launch's time is the larger of two, and both efficiencies are in it.
    for row in by_kind["launch"]:
        times = row["flops"] / 989e12, row["bytes"] / 3350e9
        assert row["seconds_at_peak"] == pytest.approx(max(times))
        assert row["seconds_at_efficiency"] == pytest.approx(max(times[0] / 0.4, times[1] / 0.8))


def test_the_pictures_say_projected_and_show_what_was_measured(printed, tmp_path, monkeypatch):
    _, rows, folder = printed
    for name in ("picture", "scaling_picture"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    figures = []
    monkeypatch.setattr("moe_engine.bench.plots.save", lambda figure, path: figures.append(figure))
    given = {"benchmark": "kernels", "settings": {}, "p50": 1e-3, "flops": 2e11, "bytes": 1e9, "time": ""}
    h100 = given | {"name": "expert MLP forward, triton", "device": "NVIDIA H100 80GB HBM3"}
    others = [
        h100 | {"name": "expert MLP forward, torch"},
        h100 | {"device": "NVIDIA A100-SXM4-40GB"},
        h100 | {"name": "gate, triton", "flops": 0},
        h100 | {"name": "permute, triton", "p50": None},
    ]
    roofline.draw(tmp_path / "x.png", [*rows, h100, *others])
    roofline.draw_scaling(tmp_path / "y.png", rows)
    for figure in figures:
        assert any("projected" in text.get_text() for text in figure.texts)
    a100, h100_axes = figures[0].axes
    assert a100.get_title() == "A100 80 GB, projected" and h100_axes.get_title().endswith("projected and measured")
    (point,) = (line for line in h100_axes.lines if line.get_label() == "measured")
    assert point.get_xydata().tolist() == [[200.0, 200.0]] and point.get_markerfacecolor() != "white"
    assert not any(line.get_label() == "measured" for line in a100.lines)
    assert len(roofline_plots.measured_points([h100 | {"device": "NVIDIA A100-SXM4-80GB"}], A100)) == 1
    assert [axes.get_title() for axes in figures[1].axes] == ["A100 80 GB, projected", "H100 80 GB, projected"]


def test_without_a_source_tree_the_guides_rows_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(roofline, "CONFIGS", Path("nowhere"))
    assert main(["roofline", "--preset", "tiny", "--gpus", "1", "--shape", "olmoe", "--model.save", "x"]) == 0
    text = capsys.readouterr().out
    assert "which only a source tree has" in text and "8b_1x40gb.toml" not in text
    assert "MoE layer olmoe, 2048 tokens" in text and "\nup again " in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--card", "v100"], "--card: expected one of a100-40gb"),
        (["--gpus", "0"], "--gpus: expected at least 1, got 0"),
        (["--efficiency", "1.5"], "--efficiency: expected more than 0 and at most 1, got 1.5"),
        (["--bandwidth_efficiency", "0"], "--bandwidth_efficiency: expected more than 0 and at most 1, got 0"),
        (["--price", "-2"], "--price: expected more than 0, got -2"),
        (["--network_gbs", "0"], "--network_gbs: expected more than 0, got 0"),
        (["--rows", "a.jsonl"], "--rows: expected --picture too, to draw them in, got a.jsonl alone"),
        (["--tokens", "0"], "--tokens: expected more than 0, got 0"),
        (["--shape", "16b"], "--shape: expected one of 8b"),
        (["--dtype", "float32"], "--dtype: expected bfloat16 or float16"),
        (["--cpu_offload"], "--cpu_offload: its traffic to the host is not projected, got true"),
        (["--config", "nothing.toml"], "--config nothing.toml: No such file or directory"),
        (
            ["--rows", "nothing.jsonl", "--picture", "a.png"],
            "nothing.jsonl: expected a JSONL file of results, found none",
        ),
        (["--preset", "tiny", "--gpus", "6", "--dp_replicate", "4"], "--dp_replicate: expected a divisor"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_2(flags, message, capsys):
    assert main(["roofline", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(roofline_plots.InputError, match="kind launch, got none"):
        roofline.draw(tmp_path / "x.png", [])


def test_another_model_is_another_thing_in_the_rows():
    def of(**given):
        return projection.run_settings(projection.read_run({"preset": "tiny", **given}, None))

    plain = of()
    assert of(model={"num_layers": 2}) == plain | {"model": {"num_layers": 2}}
    assert of(grad_clip=0.0) == plain | {"grad_clip": 0.0} and of(lr=1e-2) == plain
