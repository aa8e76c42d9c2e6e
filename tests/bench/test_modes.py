"""The comparison of memory-saving modes: what it runs, what it accepts, what it draws."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moe_engine.bench import modes as bench
from moe_engine.train.metrics import RunLog, read_metrics

CURVE = {0: 8.4, 50: 5.0, 100: 4.0}


@pytest.fixture
def runs(tmp_path):
    """Finished runs of every mode, with one curve; keywords replace their last losses."""

    def make(**losses):
        for name in bench.MODES:
            folder = tmp_path / "runs" / name
            with RunLog(folder, console=False) as log:
                log.truncate_after(-1)
                for iteration, loss in CURVE.items():
                    log.metrics("train", iteration, loss=loss, tokens_per_second=1.0)
                    log.metrics("eval", iteration, loss=losses.get(name, loss) if iteration == 100 else loss)
            environment = {
                "device": name,
                "versions": {"torch": "1"},
                "git": {"commit": "0", "changed": True},
                "command": [],
            }
            (folder / "env.json").write_text(json.dumps(environment))
        return ["--data_dir", "nowhere", "--out", str(tmp_path / "runs"), "--max_iters", "100"]

    return make


def test_rows_table_and_picture(runs, tmp_path, capsys):
    picture, output = tmp_path / "images" / "modes.png", tmp_path / "rows.jsonl"
    given = runs(adamw8bit=4.0 * 1.0199, in_backward=4.5)
    assert bench.main([*given, "--picture", str(picture), "--output", str(output)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert "| plain | 4.0000 | +0.00 % |  |" in table
    assert "| `--checkpointing block` | 4.0000 | +0.00 % | bitwise equal |" in table
    assert "| `--optimizer adamw8bit` | 4.0796 | +1.99 % | differ |" in table
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert [p.name for p in picture.parent.iterdir()] == ["modes.png"]
    rows = {row["name"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert list(rows) == list(bench.MODES) and all(row["kept"] for row in rows.values())
    assert rows["adamw8bit"]["device"] == "adamw8bit" and rows["adamw8bit"]["versions"] == {"torch": "1"}
    assert rows["adamw8bit"]["commit"] == "0+"
    assert rows["in_backward"]["difference"] == pytest.approx(0.125) and not rows["in_backward"]["bitwise_equal"]


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("checkpointing_block", math.nextafter(4.0, 5.0)),
        ("checkpointing_selective", math.nextafter(4.0, 3.0)),
        ("save_x", math.nextafter(4.0, 5.0)),
        ("adamw8bit", 4.0 * 1.0201),
        ("adamw8bit", 4.0 * 0.9799),
        ("in_backward", math.nan),
    ],
)
def test_what_is_not_kept_is_said(runs, name, loss, capsys):
    """A last bit is enough where runs have to be equal."""
    assert bench.main(runs(**{name: loss})) == 1
    assert capsys.readouterr().err == f"not within its bound: {name}\n"


@pytest.mark.slow
def test_a_run_is_made_once(tmp_path, monkeypatch, capfd):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    tokens = np.random.default_rng(0).integers(0, 61, 6000, dtype=np.uint16)
    np.save(data / "toy_train_000000.npy", tokens)
    np.save(data / "toy_val_000000.npy", tokens[:600])
    meta = {"tokenizer": "o200k_base:256", "vocab_size": 257, "dataset": "toy"}
    (data / "meta.json").write_text(json.dumps(meta))
    monkeypatch.setattr(bench, "MODES", {bench.PLAIN: bench.MODES[bench.PLAIN]})
    given = ["--data_dir", str(data), "--out", str(out), "--max_iters", "1"]
    assert bench.main(given) == 0
    assert "1 threads" in capfd.readouterr().out
    before = read_metrics(out / "adamw" / "metrics.jsonl")
    assert [r["iter"] for r in before if r["kind"] == "eval"] == [0, 1]
    assert bench.main(given) == 0
    assert "moe_engine.train" not in capfd.readouterr().out
    assert bench.main(["--data_dir", str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "ended with status 2" in capfd.readouterr().err


def test_the_page_has_the_newest_rows():
    root = Path(__file__).resolve().parents[2]
    rows = [json.loads(line) for line in (root / "bench/results/modes.jsonl").read_text().splitlines()]
    newest = {row["name"]: row for row in rows}
    assert list(newest) == list(bench.MODES) and all(row["kept"] for row in newest.values())
    page = (root / "docs/training.md").read_text(encoding="utf-8")
    assert "\n".join(bench.table_line(row) for row in newest.values()) in page
