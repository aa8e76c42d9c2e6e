"""`moe-bench memory`: the guide's table as committed, and the command."""

import json
import sys
from pathlib import Path

import pytest

from moe_engine.bench import memory
from moe_engine.memory import KINDS
from moe_engine.train import config as settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows():
    """The newest committed result of each configuration."""
    lines = (ROOT / "bench/results/memory.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["name"]: row for row in map(json.loads, lines)}


@pytest.mark.parametrize("row", memory.GUIDE, ids=lambda row: row.file)
def test_the_committed_rows_are_those_of_the_configurations(rows, row):
    config = settings.resolve({}, {"data_dir": "", **settings.read_toml(memory.CONFIGS / row.file)})
    result = rows[row.file]
    for name in ("preset", "batch_size", "block_size", "grad_accum_steps", "optimizer", "optimizer_in_backward",
                 "param_dtype", "checkpointing", "checkpoint_every", "dp_replicate", "dtype"):  # fmt: skip
        assert result["settings"][name] == getattr(config, name), name
    assert result["settings"]["ranks"] == row.ranks and result["total"] == sum(result["bytes"].values())
    assert result["reserved"] / 1e9 <= row.required_gb and result["verdict"] in ("PASS", "within the aim")
    assert result["formula"] == pytest.approx(result["total"], rel=0.05)


@pytest.mark.parametrize("row", memory.GUIDE, ids=lambda row: row.file)
def test_the_pages_show_the_committed_rows(rows, row):
    result = rows[row.file]
    sizes = [result["bytes"][kind] for kind in KINDS] + [result[name] for name in ("total", "reserved", "formula")]
    cells = " | ".join(f"{size / 1e9:.2f}" for size in sizes)
    line = f"| `{row.file}` | {row.ranks} | {cells} |"
    assert line in (ROOT / "docs/training.md").read_text(encoding="utf-8").splitlines(), line
    cell = f"| ~{row.guide_gb:g} | {result['reserved'] / 1e9:.1f} | [`{row.file}`](configs/{row.file}) |"
    assert cell in (ROOT / "README.md").read_text(encoding="utf-8"), cell


@pytest.mark.slow
def test_the_guides_table_is_kept(tmp_path, capsys):
    """Anew, from the configurations: every row within what is required of it."""
    pytest.importorskip("triton")
    pytest.importorskip("torchao")
    output = tmp_path / "memory.jsonl"
    assert memory.main(["--output", str(output)]) == 0
    assert len(output.read_text(encoding="utf-8").splitlines()) == len(memory.GUIDE)
    assert "FAIL" not in capsys.readouterr().out


def test_one_run_and_the_largest_batch_that_fits(tmp_path, capsys):
    output = tmp_path / "memory.jsonl"
    flags = [
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--batch_size",
        "2",
        "--block_size",
        "64",
        "--model.num_layers",
        "1",
    ]
    picture = tmp_path / "memory.png"
    files = ["--output", str(output), "--picture", str(picture)]
    assert memory.main([*flags, "--memory_gb", "0.1", *files]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    (result,) = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    out = capsys.readouterr().out
    assert f"largest batch_size in 0.1 GB: {result['largest_batch']}" in out and result["largest_batch"] >= 2
    assert memory.main([*flags, "--memory_gb", "0.001"]) == 1
    assert "no batch fits 0.001 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "tiny", "--ranks", "0"], "--ranks: expected more than 0, got 0"),
        (["--preset", "tiny", "--memory_gb", "-1"], "--memory_gb: expected more than 0, got -1.0"),
        (["--preset", "tiny", "--cpu_offload"], "--cpu_offload: its memory is not estimated, got true"),
        (["--config", "nothing.toml"], "--config nothing.toml: No such file or directory"),
        (["--prest", "tiny"], "no such flag --prest; did you mean --preset?"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys):
    assert memory.main(flags) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_without_torchao_the_rows_that_need_it_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchao", None)
    flags = ["--preset", "tiny", "--block_size", "16", "--optimizer", "adamw8bit"]
    assert memory.main(flags) == 2
    assert capsys.readouterr().err.startswith("error: --optimizer adamw8bit: its memory is estimated with torchao")
    monkeypatch.setattr(memory, "GUIDE", memory.GUIDE[:2])
    assert memory.main([]) == 2
    shown = capsys.readouterr()
    assert shown.out.count("not estimated: ") == 2
    assert shown.err == ("error: not all of the guide's rows could be estimated: 8b_1x40gb.toml, 8b_1x80gb.toml\n")
