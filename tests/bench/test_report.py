"""The report: what it says of results, of those that are not there, and that the committed page is not out of date."""

import json
import re
from pathlib import Path

import pytest

from moe_engine.bench import report
from moe_engine.bench.__main__ import main

RESULTS = Path(report.__file__).parent / "results"
TIMED = {"p20": 0.0098, "p50": 0.01, "p80": 0.0103, "band": 0.06, "rounds": 9}
LAYER = {
    "shape": "8b",
    "tokens": 100,
    "d_model": 4,
    "d_ff": 8,
    "experts": 8,
    "top_k": 2,
    "routing": "balanced",
    "dtype": "bf16",
}
STEP = {"preset": "tiny", "batch_size": 2, "block_size": 50, "dtype": "float32"}


def result(benchmark, name, settings, device="a card", day="2026-01-01", **values):
    about = {
        "threads": None,
        "versions": {"torch": "2.11.0"},
        "commit": "0123456789abcdef+",
        "time": f"{day}T00:00:00+0000",
    }
    own = {"benchmark": benchmark, "name": name, "settings": settings, "device": device}
    return own | about | values


def projections():
    """Some of the roofline."""
    run = {"preset": "8b", "batch_size": 2, "block_size": 50, "grad_accum_steps": 1}
    shares = {"efficiency": 0.4, "bandwidth_efficiency": 0.8}
    many = {"gpus": 8, "replicas": 1, "link": 450e9, "network": 50e9}
    launch = {"flops": 1e9, "bytes": 1e6, "seconds_at_peak": 1e-5}
    found = [
        ("up", {"kind": "launch", "layer": "8b", "tokens": 100} | shares, launch),
        (
            "one card",
            {"kind": "step"} | run,
            {"tokens_per_second_at_peak": 2e3, "tokens_per_second": 1e3, "mfu": 0.3},
        ),
        ("FSDP2", {"kind": "scaling"} | run | many, {"tokens": 800, "hidden": 7000.0, "exposed": 6000.0}),
        (
            "10 B tokens",
            {"kind": "budget", "price": 2.0} | run,
            {"hours_at_peak": 50.0, "hours": 150.0, "dollars": 300.0},
        ),
    ]
    about = {"device": "none, projected for H100 80 GB", "card": "h100", "projected": True}
    return [result("roofline", name, settings, **about, **values) for name, settings, values in found]


def rows():
    """Some of every benchmark."""
    two, parts = STEP | {"ranks": 2}, {"attention": 0.25, "experts": 0.5, "other": 0.25}
    sizes = dict.fromkeys(("weights", "gathered", "gradients", "optimizer", "activations", "workspace"), 1_500_000_000)
    machine = {"preset": "8b", "arch": "sm_80", "constants": {"BLOCK_M": 128}, "warps": 8, "stages": 3}
    spilled = {"registers": 255, "stack": 8, "spill_loads": 4, "shared": 2048, "violations": ["stack or spills"]}
    ours = {"flops": 2e9, "peak_bytes": 3e6, "saved_bytes": 123_400, "ratio": 1.5}
    return [
        *projections(),
        result("layer", "BLAS, one after the other", LAYER, **TIMED, status="ok", flops=2e9, ratio=1.0, ours=False),
        result("layer", "moe_engine, gpt-oss", LAYER | {"style": "gpt-oss"}, **TIMED, status="ok", **ours, ours=True),
        result("layer", "MegaBlocks", LAYER, status="not installed: pip install megablocks"),
        result("throughput", "moe_engine", STEP | {"ranks": 1}, **TIMED, tokens=100, tokens_per_second=10_000.0,
               mfu=0.255, memory=2.5e9, parts=parts, ratio=1.25, baseline="a peer"),
        result("throughput", "moe_engine", two, **TIMED, tokens=200, parts=None, tokens_per_second=1.5e4),
        result("targets", "8b_1x80gb.toml", {}, measured=2500.0, target=2000.0, moonshot=1e4, verdict="PASS"),
        result("targets", "8b_1x80gb.toml", {"old": 1}, day="2025-01-01", measured=1.0, target=2.0, verdict="FAIL"),
        result("targets", "8b_8x80gb.toml", {}, measured=9.0, target=3.0, verdict="PASS", scaled=True),
        result("targets", "8b_1x40gb.toml", {}, target=1000.0, moonshot=1e4, verdict="not checked: no GPU"),
        result("checkpoint", "stall", STEP, **TIMED, first=0.02, parts={"plan": 0.002, "copy": 0.008}),
        result("checkpoint", "load", STEP, **TIMED, bytes=2e9, bandwidth=2e11, parts=None),
        result("checkpoint", "share of training time", STEP, derived=True, share=0.0123, target=0.05, verdict="PASS"),
        result("kernels", "gate, triton", LAYER, **TIMED, fraction=0.5, flops=1e6, bytes=1e6, status="ok"),
        result("kernels", "gate, torch", LAYER, **TIMED | {"p50": 0.02}, fraction=0.25, status="ok"),
        result("kernels", "ceiling, copy", {}, **TIMED, bytes=1e6, status="ok"),
        result("kernels", "mlp, triton", LAYER, status="wrong: grad_x"),
        result("memory", "8b_1x80gb.toml", STEP | {"ranks": 1}, bytes=sizes, total=9e9, reserved=9.54e9,
               card="A100 80 GB", required=70, verdict="within the aim"),
        result("traffic", "layer", {"tokens": 256, "save": "h"}, bytes={"forward": 100, "backward": 105},
               floor={"forward": 100, "backward": 100}, launches=[{"phase": "forward"}, {"phase": "backward"}] * 2),
        result("compile", "_up_fwd_kernel", machine, "none, compiled for A100", **spilled, default=True),
        result("compile", "_gate_fwd_kernel", machine, "none, compiled for A100", registers=40, default=True),
        result("modes", "adamw", {"flags": [], "iterations": 3}, val_loss=4.0, difference=0.0, bitwise_equal=True),
    ]  # fmt: skip


@pytest.fixture
def page(tmp_path):
    """Writes rows to a folder, and returns the report of it."""

    def make(given, name="rows"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "some.jsonl").write_text("".join(json.dumps(r) + "\n" for r in given))
        assert main(["report", "--results", str(folder), "--out", str(folder / "out")]) == 0
        return (folder / "out" / report.PAGE).read_text(), folder / "out"

    return make


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_every_table(page):
    text, out = page(rows())
    layer = section(text, "A layer against peers")
    assert "| moe_engine, gpt-oss | 10 | 9.8 to 10.3 | ± 6 % | 1.500 | 200 | 3 | 1,234 |" in layer
    assert "- MegaBlocks: not installed: pip install megablocks" in layer
    steps = section(text, "Training steps against peers")
    assert "| moe_engine | 10 | 9.8 to 10.3 | ± 6 % | 10,000 | 25.5% | 2.50 | 1.25 |" in steps
    assert "against a peer." in steps
    assert "|  | attention | experts | other |" in steps and "| moe_engine | 25.0 | 50.0 | 25.0 |" in steps
    assert "| moe_engine | 2 | 10 | 15,000 | 75 % |" in section(text, "Scaling over ranks")
    targets = section(text, "The guide's targets")
    assert "| 8b_1x80gb.toml | a card | 2,500 | 2,000 | 1.25 | 10,000 | 0.25 | PASS |" in targets
    assert "| 8b_1x40gb.toml | a card | – | 1,000 | – | 10,000 | – | not checked: no GPU |" in targets
    assert "| 8b_8x80gb.toml | a card | 9 | 3* | 3.00 | – | – | PASS |" in targets and "scaled by the peaks" in targets
    assert "FAIL" not in targets and "impossible" in targets
    checkpoints = section(text, "Checkpoints")
    of_it = "plan 0.002, copy 0.008; the first save's 0.02"
    assert f"| stall | 0.01 | 0.0098 to 0.0103 | ± 6 % | – | – | {of_it} |" in checkpoints
    assert "| load | 0.01 | 0.0098 to 0.0103 | ± 6 % | 2.00 | 200.00 | – |" in checkpoints
    assert "- share of training time: 1.23%, target < 5%: PASS" in checkpoints and "derived" in checkpoints
    kernels = section(text, "Kernels")
    assert "| gate | 10 ± 6 % | 50% | 20 ± 6 % | 25% |" in kernels
    assert "- ceiling, copy: 0.1 GB/s (a card)" in kernels
    assert "- mlp, triton: wrong: grad_x" in kernels and "| mlp" not in kernels
    roofline = section(text, "Roofline, projected")
    assert "| H100 80 GB | 2,000 | 1,000 | 30% |" in roofline
    assert "| H100 80 GB, FSDP2 | 8 | 1 | 450, 50 | 800 | 7,000 | 6,000 |" in roofline
    assert "| H100 80 GB | 10 B tokens | 50 | 150 | $2.00 | $300 |" in roofline
    tables = [line for line in roofline.splitlines() if line.startswith("| projected")]
    assert len(tables) == 3 and roofline.count("\n![") == 2 == len(re.findall(r"!\[[^]]*projected", roofline))
    memory = section(text, "Memory of a training step")
    assert "| 8b_1x80gb.toml, A100 80 GB | 2 × 50 | 1 |" + " 1.5 |" * 6 + " 9.0 | 9.5 | 70 | within the aim |" in memory
    traffic = section(text, "Memory traffic of the kernels")
    assert "| tokens 256, save h; a card | 1.000 | 1.050 | 2 + 2 |" in traffic
    code = " ".join(section(text, "Machine code of the kernels").split())
    assert "**sm_80 (A100)**: 2 kernels; most registers of a thread 255 (_up_fwd_kernel)" in code
    assert "memory of a block 2 KB (_up_fwd_kernel); stack or spills in 1 (_up_fwd_kernel), rules broken by 1." in code
    assert "| plain | 4.0000 | +0.00 % |  |" in section(text, "The loss with ways to save memory")
    where = section(text, "Where and when")
    assert "| layer | a card | 3 | 2026-01-01 | 0123456789+ | torch 2.11.0 |" in where
    assert {path.name for path in out.iterdir()} == {report.PAGE, *re.findall(r"\]\((\w+\.png)\)", text)}
    assert {"layer.png", "throughput.png", "kernels.png", "memory.png", "roofline.png", "scaling.png"} == {
        path.name for path in out.glob("*.png")
    }


def test_the_newest_counts_and_the_page_depends_on_nothing_else(page):
    old = [r | {"p50": 9.0, "time": "2025-01-01T00:00:00+0000"} if "p50" in r else r for r in rows()]
    (first, _), (again, _) = page([*old, *rows()], "a"), page(rows(), "b")
    assert first == again


def test_runs_apart_have_their_own_tables_and_pictures(page):
    own = [r for r in rows() if r["benchmark"] == "layer"]
    other = [r | {"device": "another card"} for r in own]
    text, out = page([*own, *other])
    assert text.count("| moe_engine, gpt-oss |") == 2
    assert (out / "layer.png").exists() and (out / "layer_2.png").exists()


def test_a_target_that_was_judged_stays_when_something_else_is_run(page):
    judged = result("targets", "8b", {"ranks": 1}, day="2025-01-01", measured=1.0, target=2.0, verdict="FAIL")
    text, _ = page([judged, result("targets", "8b", {}, measured=None, target=2.0, verdict="not checked: other")])
    assert "| FAIL |" in text and "not checked: other" not in text


def test_pictures_of_an_earlier_report_are_removed_and_no_others(page):
    own = [r for r in rows() if r["benchmark"] == "layer"]
    _, out = page([*own, *(r | {"device": "another card"} for r in own)])
    (out / "mine.png").touch()
    (out / "layer_7.png").touch()
    assert main(["report", "--results", str(out.parent), "--out", str(out)]) == 0
    assert {path.name for path in out.glob("*.png")} == {"layer.png", "layer_2.png", "mine.png"}


def test_sections_without_rows_name_the_command(page):
    text, out = page([r for r in rows() if r["benchmark"] == "traffic"])
    for one in report.SECTIONS:
        missing = f"No results yet: `{one.command} --output bench/results/{one.file}.jsonl`"
        assert (missing in section(text, one.title)) == (one.title != "Memory traffic of the kernels")
    assert [path.name for path in out.iterdir()] == [report.PAGE]


def test_rows_without_a_time_alone_have_no_picture(page):
    text, out = page([r for r in rows() if r["benchmark"] in ("layer", "kernels") and "p50" not in r])
    assert "- MegaBlocks: not installed" in text and [path.name for path in out.iterdir()] == [report.PAGE]


def test_the_committed_page_is_that_of_the_committed_rows():
    page = report.make_page(report.read_results(RESULTS))
    text = (RESULTS / report.PAGE).read_text(encoding="utf-8")
    assert text == "\n".join(page.lines) + "\n", "bench/results has changed: moe-bench report"
    assert set(page.pictures) == {path.name for path in RESULTS.glob("*.png")}


@pytest.mark.parametrize(("content", "message"), [(None, "expected a folder with results"), ("{broken\n", "line 1")])
def test_bad_input_is_one_line_and_status_2(content, message, tmp_path, capsys):
    if content:
        (tmp_path / "rows.jsonl").write_text(content)
    assert main(["report", "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(tmp_path) in error and error.count("\n") == 1
