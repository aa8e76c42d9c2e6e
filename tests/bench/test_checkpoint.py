"""`moe-bench checkpoint`: what it measures and derives, and that a checkpoint that is wrong has no time."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_engine.bench import checkpoint as bench
from moe_engine.bench import report
from moe_engine.bench.__main__ import main
from moe_engine.bench.runner import read_rows
from moe_engine.bench.targets import SAVING_SHARE
from moe_engine.train import storage
from moe_engine.train.checkpoint import Checkpoints

SIZES = {"num_layers": 1, "d_model": 32, "num_heads": 4, "head_dim": 8, "d_ff": 24, "vocab_size": 64}
SMALL = ["--preset", "tiny", "--batch_size", "1", "--block_size", "16", "--device", "cpu"]
SMALL += [text for name, value in SIZES.items() for text in (f"--model.{name}", str(value))]


def run(tmp_path, *flags):
    """Status and rows, None if there are none."""
    output = tmp_path / "rows.jsonl"
    status = main(["checkpoint", *SMALL, "--out_dir", str(tmp_path / "disk"), "--output", str(output), *flags])
    assert list((tmp_path / "disk").iterdir()) == [], "nothing is left on the disk"
    return status, {row["name"]: row for row in read_rows(output)} if output.exists() else None


def test_it_measures_saves_and_loads_and_derives_the_share(tmp_path, capsys):
    status, rows = run(tmp_path, "--rounds", "2", "--save_every", "1000000", "--grad_accum_steps", "2")
    shown = capsys.readouterr().out
    assert status == 0 and "came back bit for bit" in shown and "PASS" in shown and "random ids" in shown
    timed = [bench.STEP, bench.BESIDE, bench.STALL, bench.WRITE, bench.SYNC, bench.LOAD]
    assert list(rows) == [*timed, *bench.SHARES.values()]
    for name in timed:
        row = rows[name]
        assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["rounds"] == 2 and name in shown
        assert row["settings"]["save_every"] == 1_000_000 and row["settings"]["disk"]
    stall, slower = rows[bench.STALL], rows[bench.BESIDE]
    assert set(stall["parts"]) == {"plan", "copy", "publish"} and stall["first"] > 0
    assert set(rows[bench.WRITE]["parts"]) == {"write", "fsync", "checksum"} and slower["steps"] >= 1
    assert set(rows[bench.LOAD]["parts"]) == {"checksum", "read"}
    for name in (bench.STALL, bench.SYNC, bench.WRITE, bench.LOAD):
        assert all(part > 0 for part in rows[name]["parts"].values()), name
    for name in (bench.WRITE, bench.SYNC, bench.LOAD):
        row = rows[name]
        assert row["bytes"] > 12 * 64 * 32 * 2 and row["bandwidth"] == pytest.approx(row["bytes"] / row["p50"])
    derived = rows[bench.SHARES[bench.STALL]]
    cost = stall["p50"] + max(slower["slowdown"], 0.0)
    assert derived["derived"] and "p50" not in derived
    assert derived["share"] == pytest.approx(cost / (1e6 * rows[bench.STEP]["p50"]))

    text = "\n".join(report.make_page(list(rows.values())).lines)
    table = text.split("## Checkpoints\n")[1].split("\n## ")[0]
    assert f"| {bench.LOAD} |" in table and f"- {bench.SHARES[bench.STALL]}: 0.00%, target < 5%: PASS" in table


def test_the_share_is_of_save_every_steps_and_held_against_the_target():
    assert SAVING_SHARE == 0.05
    found = bench.share(stall=2.0, slowdown=3.0, step=1.0, save_every=200)
    assert found == {"derived": True, "share": 0.025, "target": 0.05, "verdict": "PASS"}
    assert bench.share(2.0, 3.0, 1.0, 100)["verdict"] == "FAIL"
    assert bench.share(2.0, -1.0, 1.0, 100)["share"] == 0.02, "noise does not pay for the stall"


def test_a_save_at_every_step_misses_the_target(tmp_path, capsys):
    status, rows = run(tmp_path, "--rounds", "1", "--save_every", "1")
    assert status == 1 and rows[bench.SHARES[bench.STALL]]["verdict"] == "FAIL"
    assert "target < 5%: FAIL" in capsys.readouterr().out


def _flip(monkeypatch):
    """A byte of the file is another one than its checksum is of."""
    write = storage.Staging.write

    def spoilt(self, folder, extra):
        result = write(self, folder, extra)
        path = folder / result["file"]
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return result

    monkeypatch.setattr(storage.Staging, "write", spoilt)
    return "damaged or truncated"


def _no_copy(monkeypatch):
    """What is written are the tensors that training goes on to change."""
    monkeypatch.setattr(storage.Staging, "_copy", lambda self, key, tensor: tensor.detach())
    return "does not come back as it was saved"


def _one_bit(monkeypatch):
    """The file is sound, but a moment in it is off by one in its last place."""

    def spoilt(tensors, path):
        name = next(key for key in tensors if key.endswith("exp_avg_sq"))
        save_file({**tensors, name: torch.nextafter(tensors[name], torch.tensor(1.0))}, path)

    monkeypatch.setattr(storage, "save_file", spoilt)
    return "exp_avg_sq does not come back as it was saved (1 of "


def _not_loaded(monkeypatch):
    monkeypatch.setattr(Checkpoints, "load", lambda *args: {})
    return "does not come back as it was saved"


@pytest.mark.parametrize("spoil", [_flip, _no_copy, _one_bit, _not_loaded], ids=lambda f: f.__name__.strip("_"))
def test_a_spoilt_checkpoint_has_no_time(spoil, tmp_path, monkeypatch, capsys):
    reason = spoil(monkeypatch)
    status, rows = run(tmp_path, "--rounds", "1")
    shown = capsys.readouterr()
    assert status == 1 and rows is None and shown.out == ""
    assert shown.err.startswith("error: wrong result: checkpoint step_") and shown.err.count("\n") == 1
    assert reason in shown.err and shown.err.endswith("no time\n")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    status, rows = run(tmp_path)
    error = capsys.readouterr().err
    assert status == 2 and rows is None and error.count("\n") == 1
    assert f"--out_dir {tmp_path / 'disk'}: checkpoint not written: No space left" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--save_every", "0"], "--save_every: expected at least 1, got 0"),
        (["--out_dir", f"{__file__}/below"], f"--out_dir {__file__}/below: expected a folder to write to, got "),
        (["--output", f"{__file__}/rows.jsonl"], "--output: expected a file that can be written, got "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(flags, message, tmp_path, capsys):
    assert main(["checkpoint", *SMALL, "--out_dir", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["checkpoint", *SMALL]) == 2
    assert "expected one process, got 2" in capsys.readouterr().err


def test_committed_rows_keep_the_target():
    path = Path(report.__file__).parent / "results" / "checkpoint.jsonl"
    if not path.exists():
        pytest.skip("not measured yet")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    newest = {row["name"]: row for row in rows if row["settings"]["preset"] == "small"}
    assert newest[bench.SHARES[bench.STALL]]["verdict"] == "PASS"
