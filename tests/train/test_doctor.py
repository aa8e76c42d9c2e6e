"""`moe-doctor`: a good folder passes, every fault is found by the right check, and none hides another."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_engine.model import Transformer
from moe_engine.presets import PRESETS, preset
from moe_engine.router import Router
from moe_engine.train.config import TrainConfig
from moe_engine.train.doctor import check as doctor_check
from moe_engine.train.doctor import data as doctor_data
from moe_engine.train.doctor import machine as doctor_machine
from moe_engine.train.doctor import model as doctor_model
from moe_engine.train.doctor.check import Setup
from moe_engine.train.doctor.command import DoctorConfig, main
from moe_engine.train.errors import InputError
from moe_engine.train.prepare import PrepareConfig, prepare
from moe_engine.train.tokenizer import load_tokenizer

SPEC, VOCAB = "o200k_base:1024", 1025
MACHINE = ["python", "torch", "triton", "devices", "memory", "packages", "disk"]
DATA = ["meta.json", "tokenizer", "vocabulary", "train shards", "val shards"]
NAMES = [*MACHINE, *DATA, "train tokens", "val tokens", "train windows", "val windows", "forward/backward", "router"]
FIRST, SECOND, VAL = "toy_train_000000.npy", "toy_train_000001.npy", "toy_val_000000.npy"
UNSEEN = 20_000  # a position of FIRST between two spans that a sample looks at


@pytest.fixture(scope="module", autouse=True)
def ranks():
    """GPU hosts may have neither the ranks nor a network."""
    try:
        load_tokenizer(SPEC)
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """The same verdicts wherever the tests run; those about GPUs set up their own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)


def write(folder, name, tokens):
    np.save(folder / name, tokens)


def write_meta(folder, **changes):
    """meta.json with a record of every shard that is there, keys changed or (with ...) removed."""
    shards = [
        {"file": p.name, "tokens": len(np.load(p)), "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in sorted(folder.glob("*.npy"))
    ]
    meta = {"tokenizer": SPEC, "vocab_size": VOCAB, "dataset": "toy", "eot": 1024, "dtype": "uint16", "shards": shards}
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in (meta | changes).items() if v is not ...}))


def change_meta(folder, **changes):
    """Keys of meta.json changed, the records of the shards kept as they were."""
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path):
    """A good data folder: two training shards, one of them larger than a sample, and one for validation."""
    folder, random = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    for name, count in ((FIRST, 400_000), (SECOND, 1000), (VAL, 500)):
        write(folder, name, random.integers(0, VOCAB, count, dtype=np.uint16))
    write_meta(folder)
    return folder


def small_run(folder, out_dir):
    return ["--data_dir", str(folder), "--out_dir", str(out_dir), "--preset", "tiny", "--block_size", "16"]


def set_token(folder, name, position, value):
    tokens = np.load(folder / name)
    tokens[position] = value
    write(folder, name, tokens)


@pytest.fixture
def examine(tmp_path, capsys):
    """Runs the command with --json; returns its exit status and the checks by name."""

    def run(folder, *flags):
        given = [
            "--data_dir",
            str(folder),
            "--preset",
            "tiny",
            "--block_size",
            "16",
            "--out_dir",
            str(tmp_path / "out"),
        ]
        status = main([*given, "--json", *flags])
        report = json.loads(capsys.readouterr().out)
        checks = {check["name"]: check for check in report["checks"]}
        assert len(checks) == len(report["checks"]) == report["passed"] + report["warned"] + report["failed"]
        assert report["failed"] == sum(check["status"] == "FAIL" for check in checks.values())
        assert status == (1 if report["failed"] else 0)
        for check in checks.values():
            assert set(check) == {"name", "status", "found", "remedy"}
            assert check["found"] and "\n" not in check["found"] + check["remedy"]
            assert bool(check["remedy"]) == (check["status"] != "PASS"), check
        return status, checks

    return run


def with_status(checks, status):
    """Triton left out: whether it is there is up to the machine, and has a test of its own."""
    return [name for name, check in checks.items() if check["status"] == status and name != "triton"]


def test_a_good_folder_passes(examine, folder, tmp_path):
    status, checks = examine(folder)
    assert status == 0 and list(checks) == NAMES
    assert not with_status(checks, "WARN"), with_status(checks, "WARN")
    assert "2 of uint16, 401,000 tokens" in checks["train shards"]["found"]
    assert "263,144 of 401,000" in checks["train tokens"]["found"] and "every token" in checks["val tokens"]["found"]
    # (400000 - 1) // 16 + 999 // 16 windows, in batches of the preset's 8
    assert "25,061 windows" in checks["train windows"]["found"]
    assert "3,132.6 iterations of 8 (batch_size 8" in checks["train windows"]["found"]
    assert "31 windows" in checks["val windows"]["found"]
    assert "0.005" in checks["router"]["found"]
    assert not (tmp_path / "out").exists(), "the doctor writes nothing"


def test_deep_reads_everything(examine, folder):
    status, checks = examine(folder, "--deep")
    assert status == 0 and {*checks} == {*NAMES, "train checksums", "val checksums"}
    assert "every token" in checks["train tokens"]["found"]


def test_the_batch_is_what_the_flags_say(examine, folder):
    found = examine(folder, "--batch-size=3", "--grad_accum_steps=5")[1]["train windows"]["found"]
    assert "1,670.7 iterations of 15 (batch_size 3 × grad_accum_steps 5 × 1 device(s))" in found


def test_a_folder_that_prepare_made(examine, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(f"{i} the cat sat on the mat, and looked at number {i * 7919}.\n" * 9)
    prepare(PrepareConfig(out_dir=str(tmp_path / "data"), input=[str(text)], tokenizer=SPEC, workers=1, format="bin"))
    status, checks = examine(tmp_path / "data", "--deep")
    assert status == 0 and not with_status(checks, "WARN")
    assert " the cat sat" in checks["train tokens"]["found"], "how the data begins"


def truncate(folder):
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-10])


def odd_bin(folder):
    for path in folder.glob("*.npy"):
        path.unlink()
    (folder / "train.bin").write_bytes(bytes(2001))
    (folder / "val.bin").write_bytes(bytes(2000))
    write_meta(folder, shards=...)


def without_val(folder):
    (folder / VAL).unlink()
    write_meta(folder)


def as_uint32(folder):
    write(folder, SECOND, np.load(folder / SECOND).astype(np.uint32))


FAULTS = {
    "truncated": (truncate, (), "train shards", [SECOND, "truncated"]),
    "shard missing": (lambda f: (f / SECOND).unlink(), (), "train shards", [SECOND, "missing"]),
    "not npy": (lambda f: (f / SECOND).write_bytes(b"text"), (), "train shards", [SECOND, "not a readable .npy"]),
    "other dtype": (as_uint32, (), "train shards", [SECOND, "uint32"]),
    "other length": (lambda f: write(f, VAL, np.zeros(9, np.uint16)), (), "val shards", [VAL, "500 tokens"]),
    "odd .bin": (odd_bin, (), "train shards", ["train.bin", "2001 bytes"]),
    "no val files": (without_val, (), "val shards", ["no val files"]),
    "bad id at the start": (
        lambda f: set_token(f, FIRST, 3, VOCAB), (), "train tokens", [FIRST, f"id {VOCAB} at position 3", str(VOCAB)],
    ),
    "bad id at the end": (lambda f: set_token(f, VAL, 499, 9999), (), "val tokens", [VAL, "id 9999 at position 499"]),
    "bad id in the middle": (
        lambda f: (set_token(f, FIRST, UNSEEN, 1025), write_meta(f)),
        ("--deep",), "train tokens", [FIRST, f"id 1025 at position {UNSEEN}"],
    ),
    "checksum": (lambda f: set_token(f, FIRST, UNSEEN, 0), ("--deep",), "train checksums", [FIRST, "sha256"]),
    "no meta.json": (lambda f: (f / "meta.json").unlink(), (), "meta.json", ["meta.json: missing"]),
    "not JSON": (lambda f: (f / "meta.json").write_text("{"), (), "meta.json", ["not JSON"]),
    "no vocab_size": (lambda f: write_meta(f, vocab_size=...), (), "meta.json", ["vocab_size must be"]),
    "unknown tokenizer": (
        lambda f: write_meta(f, tokenizer="o200k_bse"), (), "tokenizer", ["o200k_bse", "did you mean o200k_base"],
    ),
    "vocabulary beyond all": (
        lambda f: write_meta(f, vocab_size=9000), (), "vocabulary", ["9000", "1025", "tiny", "4160"],
    ),
    "ids cut off": (
        lambda f: write_meta(f, tokenizer="o200k_base", vocab_size=200019, eot=...),
        (), "vocabulary", ["uint16", "cannot hold ids up to 200018"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_one_fail(examine, folder, fault):
    make, flags, name, words = FAULTS[fault]
    make(folder)
    status, checks = examine(folder, *flags)
    assert status == 1 and with_status(checks, "FAIL") == [name]
    for word in words:
        assert word in checks[name]["found"]


@pytest.mark.parametrize("fault", ["bad id in the middle", "checksum"])
def test_what_only_deep_finds(examine, folder, fault):
    FAULTS[fault][0](folder)
    assert examine(folder)[0] == 0


@pytest.mark.parametrize("where", ["missing", "a file", "empty"])
def test_a_data_dir_that_is_none(examine, tmp_path, where):
    path = tmp_path / "nothing"
    if where == "a file":
        path.write_text("")
    elif where == "empty":
        path.mkdir()
    status, checks = examine(path, "--deep")
    assert status == 1 and with_status(checks, "FAIL") == ["meta.json"]
    assert str(path) in checks["meta.json"]["found"]
    of_machine = [*(name for name in MACHINE if name != "triton"), "forward/backward", "router"]
    assert with_status(checks, "PASS") == of_machine, "the machine is looked at all the same"
    for name in set(checks) - {*MACHINE, "meta.json", "forward/backward", "router"}:
        assert checks[name]["found"].startswith("not checked: ")


def test_shards_are_checked_without_meta_json(examine, folder):
    for name in (FIRST, SECOND, VAL):  # not the dtype that would be assumed
        write(folder, name, np.load(folder / name).astype(np.uint32))
    truncate(folder)
    set_token(folder, VAL, 7, 4160)  # the first id outside the preset's vocabulary
    (folder / "meta.json").unlink()
    _, checks = examine(folder)
    assert with_status(checks, "FAIL") == ["meta.json", "train shards", "val tokens"]
    assert SECOND in checks["train shards"]["found"] and FIRST not in checks["train shards"]["found"]
    assert "4160 of the preset" in checks["val tokens"]["found"]
    assert with_status(checks, "WARN") == ["tokenizer", "vocabulary"]


def test_without_meta_json_a_bin_is_not_judged(examine, folder):
    odd_bin(folder)
    (folder / "meta.json").unlink()
    _, checks = examine(folder)
    assert with_status(checks, "FAIL") == ["meta.json"]
    assert "train.bin" in checks["train shards"]["found"] and checks["train shards"]["status"] == "WARN"


def test_all_faults_are_reported(examine, folder):
    truncate(folder)
    set_token(folder, FIRST, 0, 2000)
    write(folder, VAL, np.zeros(10, np.uint16))
    change_meta(folder, tokenizer="nonsense")
    status, checks = examine(folder)
    assert status == 1
    assert with_status(checks, "FAIL") == ["tokenizer", "train shards", "val shards", "train tokens"]
    assert checks["val windows"]["found"] == "not checked: no val shard can be read"


def test_many_bad_shards_are_counted(examine, folder):
    for i in range(9):
        (folder / f"toy_train_1{i:05}.npy").write_bytes(b"")
    change_meta(folder, shards=None)
    found = examine(folder)[1]["train shards"]["found"]
    assert found.count(".npy: not a readable") == 5 and found.endswith("and 4 more")


def test_block_size_against_the_shards(examine, folder):
    status, checks = examine(folder, "--block_size", "999")
    assert status == 1 and with_status(checks, "FAIL") == ["val windows"]
    assert "--block_size 999" in checks["val windows"]["found"] and "500" in checks["val windows"]["found"]
    status, checks = examine(folder, "--block_size", "1000")
    assert "1 of 2 train shards" in checks["train windows"]["found"] and checks["train windows"]["status"] == "WARN"


def test_fewer_windows_than_one_iteration(examine, folder):
    status, checks = examine(folder, "--batch_size", "25062")
    assert status == 0 and "fewer than the 25,062" in checks["train windows"]["found"]
    assert with_status(checks, "WARN") == ["train windows"]


WARNINGS = {
    # As in the guide's own meta.json: 200000, for a tokenizer of 200019.
    "smaller than the tokenizer's": ({"vocab_size": 1024, "eot": ...}, "vocabulary", ["1024", "1025"]),
    "larger than the tokenizer's": ({"vocab_size": 1100}, "vocabulary", ["1100", "1025"]),
    "end of text": ({"eot": 5}, "tokenizer", ["1024", "eot 5"]),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_warnings_about_meta_json(examine, folder, case):
    changes, name, words = WARNINGS[case]
    for shard in (FIRST, SECOND, VAL):
        write(folder, shard, np.minimum(np.load(folder / shard), 1000))
    write_meta(folder, **changes)
    status, checks = examine(folder)
    assert status == 0 and with_status(checks, "WARN") == [name]
    for word in words:
        assert word in checks[name]["found"]


def test_a_vocabulary_that_the_model_grows_for(examine, folder):
    """moe-train makes the model's vocabulary larger by itself, so this is no FAIL."""
    write_meta(folder, tokenizer="o200k_base:8192", vocab_size=8193, eot=8192)
    status, checks = examine(folder)
    assert status == 0 and with_status(checks, "WARN") == ["vocabulary"]
    assert "grows to 8256" in checks["vocabulary"]["found"]


def test_tokens_of_another_tokenizer(examine, folder):
    set_token(folder, SECOND, 12, 1050)
    write_meta(folder, vocab_size=1100)
    status, checks = examine(folder)
    assert status == 0 and with_status(checks, "WARN") == ["vocabulary", "train tokens"]
    assert "no ids from 1025" in checks["train tokens"]["found"]


def test_no_checksums_recorded(examine, folder):
    write_meta(folder, shards=...)
    status, checks = examine(folder, "--deep")
    assert status == 0 and with_status(checks, "WARN") == ["train checksums", "val checksums"]
    assert "0 of 2 shards" in checks["train checksums"]["found"]


def test_a_sample_holds_both_ends_and_little_else():
    spans = list(doctor_data._sample(10**9, 16))
    assert spans[0][0] == 0 and spans[-1][1] == 10**9 and len(spans) == 16
    assert all(end - begin == doctor_data._SPAN for begin, end in spans)
    assert list(doctor_data._sample(5, 2)) == [(0, 5)] and list(doctor_data._sample(0, 2)) == []
    chunk = doctor_data._CHUNK
    assert list(doctor_data._every(2 * chunk + 1)) == [(0, chunk), (chunk, 2 * chunk), (2 * chunk, 2 * chunk + 1)]


# The machine


@pytest.fixture
def setup(folder, tmp_path):
    """What the checks look at, for a preset; `gpus` makes believe that there are some."""

    def make(preset="tiny", gpus=0, **options):
        config = DoctorConfig(str(folder), preset, block_size=16, out_dir=str(tmp_path / "out"), **options)
        made = Setup(config.train_config())
        made.devices = [torch.device("cuda", i) for i in range(gpus)]
        return made

    return make


def result(setup, name):
    checks = [*doctor_machine.machine_checks(), *doctor_data.data_checks(True), *doctor_model.model_checks()]
    return next(check for check in checks if check.name == name).run(setup)


def test_floors_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={doctor_machine._floor('python')}"
    assert f"torch>={doctor_machine._floor('torch')}" in project["dependencies"]


@pytest.mark.parametrize(("version", "enough"), [("2.11.0+cu130", True), ("3.0", True), ("2.9.1", False), ("?", False)])
def test_torch_version(setup, monkeypatch, version, enough):
    monkeypatch.setattr(torch, "__version__", version)
    found = result(setup(), "torch")
    assert found.status == ("PASS" if enough else "FAIL") and version in found.found
    assert enough or found.remedy == 'pip install "torch>=2.11"'


def test_python_version(setup, monkeypatch):
    monkeypatch.setattr(doctor_machine.platform, "python_version", lambda: "3.10.12")
    assert result(setup(), "python").status == "FAIL"


@pytest.mark.parametrize(("gpus", "status"), [(0, "WARN"), (1, "FAIL")])
@pytest.mark.parametrize("kind", ["missing", "old"])
def test_triton(setup, monkeypatch, gpus, status, kind):
    old = SimpleNamespace(__version__="3.5.1") if kind == "old" else None
    monkeypatch.setitem(sys.modules, "triton", old)  # None makes the import fail
    found = result(setup(gpus=gpus), "triton")
    assert found.status == status and "triton>=3.6" in found.remedy
    assert ("torch backend" in found.remedy) == (gpus == 0)


def test_devices(setup, monkeypatch):
    assert "no GPU" in result(setup(), "devices").found
    monkeypatch.setattr(shutil, "which", lambda name: "found" if name == "nvidia-smi" else None)
    found = result(setup(), "devices")
    assert found.status == "WARN" and "nvidia-smi" in found.found
    monkeypatch.setattr(doctor_machine, "device_name", lambda device: "Some GPU")
    for bf16, status in ((True, "PASS"), (False, "WARN")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=bf16: answer)
        found = result(setup(gpus=2), "devices")
        assert found.status == status and found.found.startswith("2 × Some GPU")
    assert "--dtype float16" in found.remedy


def test_gpus_are_counted_where_cuda_works(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    config = TrainConfig(str(folder))
    assert Setup(config).ranks == 1 and Setup(config).device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Setup(config).ranks == 4 and Setup(config).device == torch.device("cuda", 0)


# 8.17 B parameters x 16 bytes: 131 GB.
@pytest.mark.parametrize(
    ("name", "gpus", "gigabytes", "status", "remedy"),
    [
        ("8b", 0, 140, "PASS", ""),
        ("8b", 0, 17, "WARN", "--preset small fits"),
        ("8b", 2, 80, "PASS", ""),
        ("8b", 1, 80, "WARN", "--preset small fits; 8b needs at least 2 devices like this"),
        ("8b", 1, 110, "WARN", "--preset 6b fits; 8b needs at least 2 devices like this"),
        ("8b", 3, 16, "WARN", "--preset small fits; 8b needs at least 9 devices like this"),
        ("tiny", 0, 0.01, "WARN", "free memory, or take a larger machine"),
    ],
)
def test_memory(setup, monkeypatch, name, gpus, gigabytes, status, remedy):
    monkeypatch.setattr(doctor_machine, "memory_total", lambda device: int(gigabytes * 1e9))
    found = result(setup(name, gpus), "memory")
    assert (found.status, found.remedy) == (status, remedy)


def test_memory_is_that_of_the_smallest_device(setup, monkeypatch):
    monkeypatch.setattr(doctor_machine, "memory_total", lambda device: [80, 16][device.index] * 10**9)
    assert result(setup("8b", 2), "memory").status == "WARN"


def test_parameters_are_all_counted():
    assert doctor_machine.count_parameters(preset("tiny")) == sum(
        p.numel() for p in Transformer(preset("tiny")).parameters()
    )


def test_packages(setup, monkeypatch):
    absent = {"zstandard", "datasets"}
    monkeypatch.setattr(doctor_machine, "_installed", lambda name: name not in absent)
    found = result(setup(), "packages")
    assert found.status == "PASS" and "zstandard" in found.found and "datasets" in found.found
    absent.add("bpe_openai")
    assert result(setup(), "packages").status == "PASS", "the tokenizer loads without it"
    monkeypatch.setattr(doctor_check, "load_tokenizer", lambda spec: (_ for _ in ()).throw(InputError("no ranks")))
    assert result(setup(), "packages").remedy == "pip install bpe-openai"
    absent |= {"tensorboard", "matplotlib"}
    found = result(setup(), "packages")
    assert found.status == "WARN" and found.remedy == "pip install tensorboard matplotlib bpe-openai"


def test_the_tokenizer_is_tried_once(setup, monkeypatch):
    """Without an answer from the network each try takes a minute."""
    tries = []

    def load(spec):
        tries.append(spec)
        raise InputError("no ranks")

    monkeypatch.setattr(doctor_check, "load_tokenizer", load)
    made = setup()
    for name in ("packages", "tokenizer", "vocabulary", "train tokens", "val tokens"):
        assert result(made, name).status == ("FAIL" if name == "tokenizer" else "PASS")
    assert tries == [SPEC]


# A checkpoint of tiny: 9.1 M parameters x 12 bytes, 0.11 GB; six of them 0.66 GB.
@pytest.mark.parametrize(
    ("gigabytes", "status", "words"),
    [(1, "PASS", ""), (0.4, "WARN", "--keep_last_n 2"), (0.12, "WARN", "more room"), (0.1, "FAIL", "more room")],
)
def test_disk(setup, monkeypatch, gigabytes, status, words):
    usage = SimpleNamespace(free=int(gigabytes * 1e9))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = result(setup(), "disk")
    assert found.status == status and words in found.remedy and "0.11 GB" in found.found
    assert "--keep_last_n 0" not in found.remedy, "0 keeps all"


def test_out_dir_is_a_file(setup, tmp_path):
    (tmp_path / "out").write_text("")
    assert result(setup(), "disk").status == "FAIL"


def test_out_dir_cannot_be_written(setup, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in result(setup(), "disk").found


# The small model


@pytest.mark.parametrize("name", PRESETS)
def test_the_miniature_is_of_the_presets_kind(name):
    config = preset(name)
    small = doctor_model.miniature(config)
    for field in ("activation", "num_experts", "top_k", "attention_sinks", "sliding_window", "rope_factor", "gate"):
        assert getattr(small, field) == getattr(config, field)
    assert small.num_kv_heads < small.num_heads, "grouped, as in the preset"
    assert doctor_machine.count_parameters(small) < 500_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt-oss", "mixtral"])
def test_a_tiny_run(kind, dtype):
    config = doctor_model.miniature(preset("8b"))
    if kind == "mixtral":
        plain = {"attention_bias": False, "attention_sinks": False, "sliding_window": 0, "router_bias": False}
        config = doctor_model.replace(config, activation="swiglu", expert_bias=False, rope_factor=1.0, **plain)
    run = doctor_model.tiny_run(config, 0.005, torch.device("cpu"), dtype)
    assert abs(run.loss - math.log(config.vocab_size)) < 0.05
    assert run.faulty == [] and all(pull > 1e-6 for pull in run.router_pull)
    assert len(run.balance) == 2 and all(0.99 < value < 1.1 for value in run.balance)


@pytest.fixture
def uncached():
    doctor_model.tiny_run.cache_clear()
    yield
    doctor_model.tiny_run.cache_clear()


@pytest.mark.usefixtures("uncached")
def test_a_model_that_computes_nan(setup, monkeypatch):
    monkeypatch.setattr(Transformer, "initial_constant", staticmethod(lambda name: math.nan))
    assert "loss nan" in result(setup(), "forward/backward").found
    assert result(setup(), "forward/backward").status == result(setup(), "router").status == "FAIL"


@pytest.mark.usefixtures("uncached")
def test_a_router_that_learns_nothing(setup, monkeypatch):
    forward = Router.forward
    monkeypatch.setattr(Router, "forward", lambda self, x: forward(self, x).detach())
    assert result(setup(), "router").status == "FAIL"


@pytest.mark.parametrize(
    ("changes", "name", "status", "words"),
    [
        ({"loss": 7.1}, "forward/backward", "FAIL", "loss 7.100"),
        ({"loss": math.nan}, "forward/backward", "FAIL", "loss nan"),
        ({"faulty": ["head.weight"]}, "forward/backward", "FAIL", "head.weight"),
        ({"router_pull": [1.0, 0.0]}, "router", "FAIL", "no gradient"),
        ({"router_pull": [math.nan, 1.0]}, "router", "FAIL", "no gradient"),
        ({"balance": [1.0, 1.5]}, "router", "WARN", "1.500"),
        ({}, "router", "PASS", "1.000"),
        ({}, "forward/backward", "PASS", "loss 6.908"),
    ],
)
def test_verdicts_on_a_tiny_run(setup, monkeypatch, changes, name, status, words):
    run = doctor_model.TinyRun(math.log(1000), [1.0, 1.0], 29, [], [0.1, 0.1])._replace(**changes)
    monkeypatch.setattr(doctor_model, "tiny_run", lambda *arguments: run)
    found = result(setup(), name)
    assert found.status == status and words in found.found


# The command


def test_an_unforeseen_error_stops_one_check_only(examine, folder, monkeypatch):
    def broken(config):
        raise RuntimeError("driver too old\nand more")

    monkeypatch.setattr(doctor_machine, "count_parameters", broken)
    status, checks = examine(folder)
    assert status == 1 and list(checks) == NAMES and with_status(checks, "FAIL") == ["memory", "disk"]
    assert checks["memory"]["found"] == "RuntimeError: driver too old"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data_dr", "x"], "--data_dir"),
        (["--data_dir", "x", "--prest", "tiny"], "--preset"),
        (["--data_dir", "x", "--batch_size", "0"], "--batch_size: expected at least 1"),
        (["--data_dir", "x", "--block_size", "-1"], "--block_size: expected at least 1"),
        (["--data_dir", "x", "--preset", "9b"], "--preset: expected one of tiny"),
        ([], "--data_dir is required"),
    ],
)
def test_bad_flags(capsys, flags, words):
    assert main([*flags, "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and words in shown.err and shown.err.count("\n") == 1


def test_the_report_for_people(folder, tmp_path, capsys):
    truncate(folder)
    change_meta(folder, eot=3)
    assert main(small_run(folder, tmp_path / "out")) == 1
    lines = capsys.readouterr().out.splitlines()
    results = [line for line in lines if line[:4] in ("PASS", "WARN", "FAIL")]
    assert [line[6:24].strip() for line in results] == NAMES
    assert len([line for line in lines if line.strip().startswith("remedy: ")]) == 2
    bad = next(i for i, line in enumerate(lines) if line.startswith("FAIL"))
    assert SECOND in lines[bad] and lines[bad + 1].strip().startswith("remedy: copy")
    assert lines[-1].startswith(f"{len(NAMES)} checks in ") and "1 with a warning, 1 failed" in lines[-1]
    assert len(lines) == len(NAMES) + 3 and "\x1b" not in "".join(lines)


def test_as_a_module_and_on_a_terminal_without_unicode(folder, tmp_path):
    named = tmp_path / "dätä"
    folder.rename(named)
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "moe_engine.train.doctor", *small_run(named, tmp_path / "out")],
        env=environment, cwd=tmp_path, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"d\\xe4t\\xe4: dataset toy" in done.stdout
