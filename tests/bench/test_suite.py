"""`moe-bench all` and `moe-bench gpu`: what is run, within which time, and what is left of it."""

import json
import re
import subprocess
import sys
import time
from importlib import metadata

import pytest
import torch

from moe_engine.bench import __main__ as command
from moe_engine.bench import all as everything
from moe_engine.bench import gpu, suite
from moe_engine.bench.suite import Ended, Step

# What a GPU host has (besides the standard library), and so what `moe-bench gpu` may import, with what that needs.
HOST = ("torch", "triton", "numpy", "pytest", "pytest-benchmark", "pytest-timeout", "hypothesis", "tiktoken", "rich",
        "typer", "click", "tensorboard", "matplotlib", "pyarrow", "safetensors", "transformers", "tokenizers", "psutil",
        "setuptools", "wheel")  # fmt: skip


def test_a_process_ends_or_is_ended(tmp_path):
    assert suite.run_process([sys.executable, "-c", "raise SystemExit(3)"], 30) == 3
    note = tmp_path / "note"
    code = f"import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n open({str(note)!r}, 'w').write('asked')"
    begin = time.perf_counter()
    assert suite.run_process([sys.executable, "-c", code], 1.5) is None
    assert time.perf_counter() - begin < 1.5 + suite.GRACE and note.read_text() == "asked"


def test_a_process_that_does_not_listen_is_killed(monkeypatch):
    monkeypatch.setattr(suite, "GRACE", 0.5)
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    begin = time.perf_counter()
    assert suite.run_process([sys.executable, "-c", code], 1.0) is None
    assert time.perf_counter() - begin < 20


def test_all_leaves_rows_pictures_report_and_one_json(monkeypatch, tmp_path, capfd):
    steps = [
        Step("memory", ("--preset", "tiny", "--batch_size", "1", "--block_size", "32", "--device", "cpu"), 60, False),
        Step("roofline", ("--card", "nonsense"), 60),
    ]
    monkeypatch.setattr(everything, "steps", lambda quick, on_gpu: steps)
    out = tmp_path / "out"
    assert command.main(["all", "--quick", "--out", str(out)]) == 1, "a step that failed fails all of it"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [(step["name"], step["status"]) for step in results["steps"]] == [
        ("memory", 0),
        ("roofline", 2),
        ("report", 0),
    ]
    assert [row["benchmark"] for row in results["rows"]] == ["memory"] and results["versions"]["torch"]
    assert "memory" in (out / "REPORT.md").read_text(encoding="utf-8")
    assert re.search(r"^roofline +\d+  status 2$", capfd.readouterr().out, re.M)
    assert command.main(["all", "--out", str(out)]) == 2
    assert f"error: --out {out}: expected a new or an empty folder" in capfd.readouterr().err


def test_every_step_is_a_command_and_the_quick_ones_take_ten_minutes():
    for steps in (everything.steps(True, False), everything.steps(False, True), gpu.steps(480, 80e9)):
        assert all(step.name in command.COMMANDS for step in steps)
    assert sum(step.seconds for step in everything.steps(True, False)) <= 600 - 60
    assert sum(step.seconds for step in gpu.steps(480, 80e9)) <= 0.75 * 480


def test_gpu_runs_correctness_first_and_within_its_time(monkeypatch, tmp_path):
    ran: list[tuple[str, float]] = []

    def run(step, out, seconds):
        ran.append((step.name, min(seconds, step.seconds)))
        return Ended(step.name, 0, 0.0)

    def correctness(out, seconds):
        ran.append(("correctness", seconds))
        return Ended("correctness", 0, 0.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "memory_total", lambda device: 80e9)
    monkeypatch.setattr(gpu, "run_step", run)
    monkeypatch.setattr(gpu, "correctness", correctness)
    monkeypatch.setattr(gpu, "finish", lambda out, ended, device: len(ended))
    assert gpu.main(["--out", str(tmp_path / "out"), "--minutes", "8"]) == 4
    assert [name for name, _ in ran] == ["correctness", "kernels", "layer", "throughput"]
    assert sum(seconds for _, seconds in ran) + 60 <= 8 * 60 + 10
    assert gpu.main(["--minutes", "0", "--out", str(tmp_path / "other")]) == 2


def test_without_torchao_8b_is_cut_to_what_fits(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert [gpu.depth(memory) for memory in (1e9, 40e9, 80e9, 141e9, 1e12)] == [1, 1, 6, 14, 24]
    flags = gpu.training(80e9)
    assert flags[:4] == ("--preset", "8b", "--model.num_layers", "6") and "--allow_unchecked" in flags
    assert "8b is cut to 6 of its layers" in capsys.readouterr().out
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    assert gpu.training(80e9) == ()


def test_gpu_needs_one(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
    assert "expected a CUDA or ROCm device, found none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tests", "status", "note"),
    [
        ("def test_a(): pass\ndef test_b(): pass", 0, "2 passed, 0 failed, 0 skipped"),
        ("def test_a(): pass\ndef test_b(): assert 0", 1, "1 passed, 1 failed, 0 skipped"),
        (
            "import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)",
            0,
            "1 passed, 0 failed, 0 skipped; the rest was not reached in time",
        ),
        ("import time\ndef test_a(): time.sleep(60)", None, "0 passed, 0 failed, 0 skipped"),
    ],
    ids=["pass", "fail", "cut off", "nothing in time"],
)
def test_correctness_counts_the_tests(monkeypatch, tmp_path, tests, status, note):
    (tmp_path / "tests").mkdir()
    (tmp_path / "rows").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(tests)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    monkeypatch.setattr(gpu, "TESTS", tmp_path / "tests")
    monkeypatch.setattr(gpu, "CORRECTNESS", ("test_it.py",))
    ended = gpu.correctness(tmp_path, 3.0 if "sleep" in tests else 60.0)
    assert (ended.status, ended.note) == (status, note)
    monkeypatch.setattr(gpu, "TESTS", tmp_path / "nowhere")
    assert gpu.correctness(tmp_path, 1.0).note.startswith("only a source tree has tests/")


def _closure(names: tuple[str, ...]) -> set[str]:
    """Distributions and what they require, as installed here."""
    found, todo = set(), [name.lower() for name in names]
    while todo:
        name = todo.pop().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        todo += [re.match(r"[\w.-]+", line)[0].lower() for line in requirements if "extra ==" not in line]
    return found


BLOCKER = """
import importlib, importlib.machinery

find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = (
    lambda name, path=None, target=None: None if name in {blocked} else find(name, path, target)
)
for name in ("gpu", "kernels", "layer", "throughput", "report"):
    importlib.import_module("moe_engine.bench." + name)
import moe_engine.train.loop
"""


def test_the_path_of_a_gpu_host_imports_what_is_there():
    """The commands of `moe-bench gpu` and the loop start where nothing but such a host's packages can be imported."""
    allowed = _closure(HOST) | {"moe-engine"}
    blocked = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not {owner.lower().replace("_", "-") for owner in owners} & allowed
    }
    assert blocked & {"pip", "ruff", "xdist"} and not blocked & {"torch", "click", "numpy"}
    subprocess.run([sys.executable, "-c", BLOCKER.format(blocked=sorted(blocked))], check=True)
