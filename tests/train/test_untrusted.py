"""Run folders and data folders from anywhere: no file of them runs code, what is wrong with one is said in a line."""

import ast
import dataclasses
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_engine.train import __main__ as command
from moe_engine.train import sample
from moe_engine.train.doctor import command as doctor
from moe_engine.train.prepare import command as preparation

ROOT = Path(__file__).resolve().parents[2]
STEP, RANK0 = "ckpt/step_00000002", "ckpt/step_00000002/ckpt_rank00000.safetensors"
STATE, METADATA = f"{STEP}/state.json", f"{STEP}/metadata.json"
DEEP = "[" * 100_000
HUGE = "1" + "0" * 5000  # more digits than Python reads


class Bomb:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code has run"


@pytest.fixture(params=["pickle", "torch", "npy"])
def bomb(request, marker, tmp_path):
    """A file that makes the marker where somebody unpickles it, in the three forms that loaders know."""
    path = tmp_path / f"bomb.{request.param}"
    if request.param == "pickle":
        path.write_bytes(pickle.dumps(Bomb(marker)))
    elif request.param == "torch":
        torch.save(Bomb(marker), path)
    else:
        with open(path, "wb") as file:
            np.save(file, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    return path.read_bytes()


def test_the_bomb_would_go_off(bomb, marker, tmp_path):
    path = tmp_path / "planted"
    path.write_bytes(bomb)
    loads = (
        lambda: pickle.loads(bomb),
        lambda: torch.load(path, weights_only=False),
        lambda: np.load(path, allow_pickle=True),
    )
    for load in loads:
        try:
            load()
        except Exception:  # of another form
            continue
    assert marker.exists()


@pytest.fixture(scope="module")
def trained(small_run_in, tmp_path_factory):
    """A run of two iterations, and the flags that go on with it in another folder."""
    folder = tmp_path_factory.mktemp("trained")
    config = small_run_in(folder / "run", max_iters=2, save_every=2, eval_interval=0)
    assert command.train(config) == 0

    def flags(out_dir, **values):
        table = dataclasses.asdict(dataclasses.replace(config, out_dir=str(out_dir), **values))
        table |= {f"model.{name}": value for name, value in table.pop("model").items()}
        return [f"--{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in table.items() if v is not None]

    return folder / "run", flags


def sign(folder):
    """Write checksums that agree, as whoever made the files can."""
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if not line.endswith("  SHA256SUMS\n")))


@pytest.fixture
def outcomes(trained, tmp_path, capsys):
    """What moe-train and moe-sample make of the run folder once `change` has been at it: status and standard error."""
    original, flags = trained

    def run(change, signed=True):
        found = {}
        run, text = tmp_path / "run", ["--tokens", "1", "--device", "cpu"]
        for name, main in (
            ("moe-train", lambda: command.main(flags(run))),
            ("moe-sample", lambda: sample.main(["--out_dir", str(run), *text])),
        ):
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(original, run)
            change(run)
            if signed and (run / STEP).is_dir():
                sign(run / STEP)
            capsys.readouterr()
            status = main()
            found[name] = status, capsys.readouterr().err
        return found

    return run


def assert_one_line(found, programs):
    for program in programs:
        status, error = found[program]
        assert (status, error.count("\n")) == (2, 1) and error.startswith("error: "), (program, found[program])
    for program in found.keys() - set(programs):
        assert found[program] == (0, ""), program


BOTH, TRAIN, SAMPLE = ("moe-train", "moe-sample"), ("moe-train",), ("moe-sample",)


# Code


def test_no_file_of_a_run_folder_runs_code(outcomes, trained, bomb, marker):
    """Each that is read, with checksums that agree, and names that other programs load."""
    original, _ = trained
    read = {STATE, METADATA, RANK0, f"{STEP}/SHA256SUMS", "config.toml", "env.json", "metrics.jsonl", "ckpt/latest"}
    assert read <= {str(path.relative_to(original)) for path in original.rglob("*")}
    assert_one_line(outcomes(lambda run: [(run / name).write_bytes(bomb) for name in sorted(read)]), BOTH)
    for name, programs in ((STATE, BOTH), (METADATA, BOTH), (RANK0, BOTH), ("metrics.jsonl", TRAIN)):
        assert_one_line(outcomes(lambda run, name=name: (run / name).write_bytes(bomb)), programs)
    others = ["env.json", "ckpt/latest", "ckpt/best", "lock", "logs.txt", "sitecustomize.py", "conftest.py", "model.pt"]
    others += [f"{STEP}/{name}" for name in ("rng_rank00000.pt", ".metadata", "__0_0.distcp", "state.json.tmp")]
    assert_one_line(outcomes(lambda run: [(run / name).write_bytes(bomb) for name in others], signed=False), ())
    assert not marker.exists()


def test_no_file_of_a_data_folder_runs_code(trained, token_folder, bomb, marker, tmp_path, capsys):
    _, flags = trained
    names = [path.name for path in token_folder.iterdir()]
    assert {"meta.json", "toy_train_000000.npy", "toy_val_000000.npy"} <= set(names)
    for name in names:
        data = tmp_path / "data"
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(token_folder, data)
        (data / name).write_bytes(bomb)
        given = flags(tmp_path / "run", data_dir=str(data))
        assert command.main(given) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert doctor.main(["--data_dir", str(data), "--preset", "tiny"]) == 1
        assert name in capsys.readouterr().out
    assert not marker.exists()


def test_what_moe_prepare_left_behind_runs_no_code(prepare_in, bomb, marker):
    assert prepare_in(lambda out: (out / ".preparing/commit.json").write_bytes(bomb)) == (0, "")
    assert prepare_in(lambda out: (out / "meta.json").write_bytes(bomb)) == (0, "")
    assert not marker.exists()


FORBIDDEN = {"eval", "exec", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml", "pickle", "jsonpickle"}


def loads_code(tree):
    """Lines of a module that could run what a file holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if any(name.split(".")[0] in FORBIDDEN for name in names):
                yield node.lineno
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
        options = {k.arg: ast.unparse(k.value) for k in node.keywords} if called.endswith("load") else {}
        if called in ("eval", "exec", "__import__", "pandas.read_pickle", "torch.package.PackageImporter"):
            yield node.lineno
        if called in ("torch.load", "torch.jit.load", "torch.export.load") and options.get("weights_only") != "True":
            yield node.lineno
        if called in ("np.load", "numpy.load") and (options.get("allow_pickle", "False") != "False" or None in options):
            yield node.lineno


def test_no_source_loads_code():
    found = []
    for folder in ("kernels", "moe_engine", "train", "bench"):
        paths = list((ROOT / folder).rglob("*.py"))
        assert paths, folder
        for path in paths:
            found += [f"{path.relative_to(ROOT)}:{n}" for n in loads_code(ast.parse(path.read_text(encoding="utf-8")))]
    assert found == []


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "import yaml", "eval(x)", "torch.load(f)", "np.load(f, **options)",
     "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)", "import marshal as m", "exec(x)"],
)  # fmt: skip
def test_the_look_at_sources_sees(line):
    assert list(loads_code(ast.parse(line))) == [1]


def test_the_look_at_sources_lets_the_rest_be():
    fine = "torch.load(f, weights_only=True)\nnp.load(f, mmap_mode='r')\nmodel.eval()\nimport json"
    assert list(loads_code(ast.parse(fine))) == []


# One line


def in_state(**values):
    def change(run):
        table = json.loads((run / STATE).read_text())
        (run / STATE).write_text(json.dumps({k: v for k, v in (table | values).items() if v is not ...}))

    return change


def in_first_tensor(**values):
    def change(run):
        table = json.loads((run / METADATA).read_text())
        tensor = table["tensors"]["model.embedding.weight"]
        for key, value in values.items():
            (tensor if key in tensor else tensor["chunks"][0])[key.removesuffix("_of_chunk")] = value
        (run / METADATA).write_text(json.dumps(table))

    return change


def in_random_state(**values):
    def change(run):
        tensors = load_file(run / RANK0)
        tensors = {k: v for k, v in (tensors | {f"rng.{k}": v for k, v in values.items()}).items() if v is not ...}
        save_file(tensors, run / RANK0)

    return change


def text(name, content):
    return lambda run: (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())


CASES = {
    "state nested": (text(STATE, DEEP), BOTH),
    "state no text": (text(STATE, b"\xff"), BOTH),
    "iteration huge": (text(STATE, f'{{"iteration": {HUGE}}}'), BOTH),
    "iteration beyond names": (in_state(iteration=10**4000), BOTH),
    "iteration negative": (in_state(iteration=-1), BOTH),
    "iteration true": (in_state(iteration=True), BOTH),
    "loader missing": (in_state(loader=...), BOTH),
    "arguments missing": (in_state(arguments=...), BOTH),
    "arguments wrong": (in_state(arguments={"batch_size": "4"}), BOTH),
    "tokens text": (in_state(tokens_per_iteration="64"), BOTH),
    "tokens NaN": (in_state(tokens_per_iteration=float("nan")), BOTH),
    "counters list": (in_state(counters=[1]), BOTH),
    "history text": (in_state(counters={"spike_history": {"loss": ["x"]}}), BOTH),
    "loss text": (in_state(best_val_loss="x"), BOTH),
    "undone": (in_state(undone=["__init__"]), BOTH),
    "tokenizer": (in_state(tokenizer="/etc/passwd"), SAMPLE),
    "tokenizer number": (in_state(tokenizer=5), BOTH),
    "vocabulary": (in_state(vocab_size="x"), BOTH),
    "metadata nested": (text(METADATA, DEEP), BOTH),
    "metadata list": (text(METADATA, '{"tensors": [1]}'), BOTH),
    "chunk elsewhere": (in_first_tensor(file="../step_00000002/ckpt_rank00000.safetensors"), BOTH),
    "chunk absolute": (in_first_tensor(file="/ckpt_rank00000.safetensors"), BOTH),
    "chunk missing": (in_first_tensor(file="ckpt_rank00009.safetensors"), BOTH),
    "chunk beyond": (in_first_tensor(offset=[10**6, 0]), BOTH),
    "chunk far beyond": (in_first_tensor(offset=[10**30, 0]), BOTH),
    "chunk small": (in_first_tensor(shape_of_chunk=[1, 1]), BOTH),
    "chunk negative": (in_first_tensor(shape_of_chunk=[-1, 1]), BOTH),
    "no chunks": (in_first_tensor(chunks=[]), BOTH),
    "no dtype": (in_first_tensor(dtype="load"), BOTH),
    "header": (text(RANK0, b"\xff" * 64), BOTH),
    "header of nothing": (text(RANK0, b"\x02" + b"\0" * 7 + b"{}"), BOTH),
    "random state short": (in_random_state(torch=torch.zeros(5, dtype=torch.uint8)), TRAIN),
    "random state of Python": (in_random_state(python=torch.zeros(5, dtype=torch.int64)), TRAIN),
    "random state of numpy": (in_random_state(numpy=torch.zeros(5, dtype=torch.int64)), TRAIN),
    "random state gone": (in_random_state(gauss=...), TRAIN),
    "metrics nested": (text("metrics.jsonl", DEEP + "\n"), TRAIN),
    "metrics no text": (text("metrics.jsonl", b"\xff\n"), TRAIN),
    "metrics huge": (text("metrics.jsonl", f'{{"kind": "train", "iter": {HUGE}}}\n'), TRAIN),
    "config nested": (text("config.toml", f"a = {DEEP}"), BOTH),
    "config no text": (text("config.toml", b"\xff"), BOTH),
    "config no TOML": (text("config.toml", "a = = "), BOTH),
    "config huge": (text("config.toml", f"lr = {HUGE}"), BOTH),
    "config model": (text("config.toml", 'model = "x"'), BOTH),
    "env nested": (text("env.json", DEEP), ()),
    "latest": (text("ckpt/latest", b"../../etc\xff"), ()),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_with_a_run_is_one_line(outcomes, case):
    change, programs = CASES[case]
    assert_one_line(outcomes(change), programs)


def test_a_config_of_sizes_that_no_memory_has(outcomes):
    def change(run):
        path = run / "config.toml"
        path.write_text(path.read_text().replace("d_model = 32", f"d_model = {10**30}"))

    assert_one_line(outcomes(change), BOTH)


# Links: what they lead to is not the run's


def test_links_are_not_followed_to_what_is_removed_or_replaced(outcomes, tmp_path):
    precious = tmp_path / "precious"

    def change(run):
        precious.mkdir(exist_ok=True)
        (precious / "file").write_text("mine")
        (run / "ckpt/step_00000003.tmp-0").symlink_to(precious)
        (run / "ckpt/step_00000004.old").symlink_to(precious)
        for name in ("config.toml.tmp", "env.json.tmp", "metrics.jsonl.tmp"):
            (run / name).symlink_to(precious / "file")

    assert_one_line(outcomes(change), ())
    assert (precious / "file").read_text() == "mine"


def test_fresh_does_not_begin_beside_the_checkpoints_of_an_older_run(trained, tmp_path, capsys):
    """What stayed there, later than its own, would be what the next start goes on with."""
    original, flags = trained
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(original, run)
    shutil.move(run / "ckpt", elsewhere)
    (run / "ckpt").symlink_to(elsewhere)
    assert command.main(flags(run, fresh=True)) == 2
    assert capsys.readouterr().err == (
        f"error: --fresh: {run / 'ckpt'} is a link to {elsewhere}: empty that, or remove the link\n"
    )
    assert (run / "config.toml").exists() and (elsewhere / "step_00000002").exists()


# Data


@pytest.mark.parametrize(
    "changed",
    [
        {"shards": [{"file": "../toy_train_0.npy", "tokens": 1}]},
        {"shards": [{"file": "/toy_train_0.npy", "tokens": 1}]},
        {"shards": [{"file": "toy_train_\0.npy", "tokens": 1}]},
        {"shards": [{"file": "toy_train_\ud800.npy", "tokens": 1}]},
        {"shards": [{"file": "toy_train_000000.npy", "tokens": 10**4000}]},
        {"vocab_size": 10**4000},
        {"vocab_size": float("nan")},
        {"tokenizer": f"o200k_base:{HUGE}"},
    ],
    ids=str,
)
def test_what_is_wrong_with_meta_json_is_one_line(trained, token_folder, tmp_path, capsys, changed):
    _, flags = trained
    data = tmp_path / "data"
    shutil.copytree(token_folder, data)
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | changed))
    assert command.main(flags(tmp_path / "run", data_dir=str(data))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.fixture
def prepare_in(tmp_path, capsys):
    """Status and standard error of a moe-prepare into a folder that `change` has been at."""
    (tmp_path / "book.txt").write_text("once upon a time " * 2000)

    def run(change):
        out = tmp_path / "prepared"
        shutil.rmtree(out, ignore_errors=True)
        (out / ".preparing").mkdir(parents=True)
        change(out)
        flags = ["--input", str(tmp_path / "book.txt"), "--out_dir", str(out), "--tokenizer", "o200k_base:256"]
        status = preparation.main([*flags, "--overwrite"])
        return status, capsys.readouterr().err

    return run


def test_what_moe_prepare_left_behind_is_held_against_what_it_writes(prepare_in):
    for plan in ("x", DEEP, "5", "[5]", '["a\\u0000.npy"]', '["\\ud800.npy"]', f"[{HUGE}]"):
        assert prepare_in(lambda out, plan=plan: (out / ".preparing/commit.json").write_text(plan)) == (0, ""), plan
    for meta in (DEEP, '{"shards": [{"file": "a\\u0000.npy"}]}', '{"shards": {"file": 5}}'):
        assert prepare_in(lambda out, meta=meta: (out / "meta.json").write_text(meta)) == (0, ""), meta


def test_moe_prepare_removes_nothing_outside_its_folder(prepare_in, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "mine.npy").touch()

    def plan(out):
        (out / ".preparing/commit.json").write_text(json.dumps(["../precious/mine.npy", str(precious / "mine.npy")]))

    def link(out):
        (out / ".preparing").rmdir()
        (out / ".preparing").symlink_to(precious)

    assert prepare_in(plan) == (0, "")
    status, error = prepare_in(link)
    assert status == 2 and error.endswith(".preparing is a link; remove it\n") and error.count("\n") == 1
    assert (precious / "mine.npy").exists()
