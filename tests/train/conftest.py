"""Small data folders and configurations for the tests of the driver, and what the tests of preparation share."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from moe_engine.train import loop, plots
from moe_engine.train.config import ModelOverrides, TrainConfig, resolve
from moe_engine.train.errors import InputError
from moe_engine.train.prepare import PrepareConfig, prepare
from moe_engine.train.tokenizer import load_tokenizer

MODEL = {
    "num_layers": 2,
    "d_model": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 32,
    "num_experts": 4,
    "top_k": 2,
    "sliding_window": 8,
    "vocab_size": 264,
}


def text_like(rng, count, vocab=61):
    """Ids with structure to learn: each is one of three successors of the one before it."""
    successors = rng.integers(0, vocab, (vocab, 3))
    choices = rng.integers(0, 3, count)
    tokens = np.empty(count, dtype=np.uint16)
    token = 0
    for i in range(count):
        token = successors[token, choices[i]]
        tokens[i] = token
    return tokens


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory):
    """Two training shards and one for validation, with the guide's own three-key meta.json."""
    folder = tmp_path_factory.mktemp("tokens")
    tokens = text_like(np.random.default_rng(0), 24_000)
    np.save(folder / "toy_train_000000.npy", tokens[:12_000])
    np.save(folder / "toy_train_000001.npy", tokens[12_000:20_000])
    np.save(folder / "toy_val_000000.npy", tokens[20_000:])
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "o200k_base:256", "vocab_size": 257, "dataset": "toy"}))
    return folder


_SAVE = plots.save


def _touch(_figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture(scope="module", autouse=True)
def short_extras():
    """What a run of seconds would spend most of its time with: timing the CPU, and turning figures into PNG files.

    It still times one matrix product, with random numbers as ever, and still makes every figure.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "peak_flops", functools.partial(loop.peak_flops, seconds=0.0))
        patch.setattr(plots, "save", _touch)
        yield


@pytest.fixture
def rendered(monkeypatch):
    """For tests of the pictures themselves: they are written."""
    monkeypatch.setattr(plots, "save", _SAVE)


@pytest.fixture(scope="session")
def small_run_in(token_folder):
    """Makes a `TrainConfig` for a run of seconds in a given folder; keywords replace its values."""

    def make(out_dir, **values) -> TrainConfig:
        model = MODEL | values.pop("model", {})
        defaults = {
            "data_dir": str(token_folder),
            "out_dir": str(out_dir),
            "preset": "tiny",
            "batch_size": 4,
            "block_size": 16,
            "max_iters": 12,
            "lr_decay_iters": 12,
            "warmup_iters": 3,
            "log_interval": 1,
            "eval_interval": 6,
            "eval_iters": 2,
            "save_every": 6,
            "sample_every": 0,
            "sample_tokens": 8,
        }
        config = resolve({**defaults, **values, "model": model})
        assert isinstance(config.model, ModelOverrides)
        return config

    return make


@pytest.fixture
def small_run(small_run_in, tmp_path):
    """The same in a folder of the test's own, unless `out_dir` names another."""

    def make(**values) -> TrainConfig:
        return small_run_in(values.pop("out_dir", tmp_path / "run"), **values)

    return make


# -- several processes --

# Imports once and then forks the ranks of one case after the other, which saves each of them seconds.
_FORK = """
import functools, json, os, sys, traceback
import torch._dynamo
from moe_engine.train import __main__ as command, loop, plots

loop.peak_flops = functools.partial(loop.peak_flops, seconds=0.0)
loop.draw_plots = lambda *args, **kwargs: None
for line in sys.stdin:
    case, pids = json.loads(line), []
    for rank in range(case["count"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            if case["count"] > 1:
                os.environ |= case["env"] | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{case['folder']}/{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            try:
                exec(case["before"], {"rank": rank})
                status = command.main(case["flags"])
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)  # the end of an interpreter takes seconds
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


class ForkedRanks:
    """Runs of `moe-train` on so many ranks. Calling it gives exit statuses, outputs and errors, by rank."""

    def __init__(self, folder):
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _FORK], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def __call__(self, count, config, before="", timeout=180, **extra):
        """Runs a configuration; `before` is Python that each rank executes first, with its `rank`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        case = {"count": count, "folder": str(self.folder), "before": before, "flags": command_line(config, **extra)}
        case["env"] = {name: str(value) for name, value in env.items()}
        timer = threading.Timer(timeout, os.killpg, (self.process.pid, signal.SIGKILL))
        timer.start()
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        statuses = json.loads(self.process.stdout.readline())
        timer.cancel()
        outputs = ([(self.folder / f"{name}{rank}").read_text() for rank in range(count)] for name in ("out", "err"))
        return statuses, *outputs

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def command_line(config, **extra):
    """The flags that give a configuration."""
    table = dataclasses.asdict(config)
    table |= {f"model.{name}": value for name, value in table.pop("model").items()} | extra
    return [f"--{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in table.items() if v is not None]


@pytest.fixture(scope="session")
def rewrite_state():
    """Changes values in a checkpoint's state.json, as if it had been written so: its checksum follows."""

    def rewrite(checkpoint, **changes):
        path, sums = checkpoint / "state.json", checkpoint / "SHA256SUMS"
        text = json.dumps(json.loads(path.read_text()) | changes)
        before, after = (hashlib.sha256(data).hexdigest() for data in (path.read_bytes(), text.encode()))
        path.write_text(text)
        sums.write_text(sums.read_text().replace(before, after))

    return rewrite


@pytest.fixture(scope="session")
def forked_ranks(tmp_path_factory):
    ranks = ForkedRanks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture
def in_small_tmpfs(tmp_path):
    """Runs Python code in a process that has a file system of 1 MiB of its own, at `MOUNT`."""
    mount = tmp_path / "small"
    mount.mkdir()
    inside = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"', str(mount)]
    try:
        possible = subprocess.run([*inside, "true"], capture_output=True, timeout=60).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("this machine lets nobody mount a file system of their own (unshare -rm)")

    def run(code):
        script = tmp_path / "inside.py"
        script.write_text(f"import os, subprocess, sys\nMOUNT = {str(mount)!r}\n" + textwrap.dedent(code))
        return subprocess.run([*inside, sys.executable, str(script)], capture_output=True, text=True, timeout=120)

    return run


# -- shards that count --


@pytest.fixture(scope="session")
def write_meta():
    """Writes the guide's three keys to meta.json, changed or (with ...) removed."""

    def write(folder, **changes):
        meta = {"tokenizer": "gpt2", "vocab_size": 1000, "dataset": "toy"} | changes
        (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if v is not ...}))

    return write


@pytest.fixture
def data_dir(tmp_path, write_meta):
    """Two training shards and one validation shard; token i of the data set is i, so that order can be read off."""
    write_meta(tmp_path)
    # With a block of 8: 12 windows and 3 tokens in the tail, then 7 windows and no tail.
    np.save(tmp_path / "toy_train_000000.npy", np.arange(0, 100, dtype=np.uint16))
    np.save(tmp_path / "toy_train_000001.npy", np.arange(100, 157, dtype=np.uint16))
    np.save(tmp_path / "toy_val_000000.npy", np.arange(500, 600, dtype=np.uint16))
    return tmp_path


# -- preparation --


@pytest.fixture(scope="session")
def spec():
    """A small vocabulary. GPU hosts may have neither the ranks nor a network."""
    spec = "o200k_base:1024"
    try:
        load_tokenizer(spec)
    except InputError as error:
        pytest.skip(str(error))
    return spec


@pytest.fixture(scope="session")
def random_texts():
    """Makes so many different documents of random words."""

    def make(count, words=40):
        random = np.random.default_rng(count)
        vocabulary = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "12", "naïve", "世界", "birds.\n"]
        return [f"{i} " + " ".join(random.choice(vocabulary, words)) for i in range(count)]

    return make


@pytest.fixture(scope="session")
def write_jsonl():
    """Writes documents as JSON lines, packed as the path's ending says; returns the path."""

    def write(path, documents, key="text"):
        data = "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(documents)).encode()
        if path.suffix == ".gz":
            data = gzip.compress(data)
        elif path.suffix == ".zst":
            zstandard = pytest.importorskip("zstandard")
            half = len(data) // 2  # two frames, as concatenated files have
            data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
        path.write_bytes(data)
        return path

    return write


@pytest.fixture(scope="session")
def write_parquet():
    """Writes documents as a parquet file of several row groups; returns the path."""

    def write(path, documents, column="text"):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"id": list(range(len(documents))), column: documents}), path, row_group_size=7)
        return path

    return write


@pytest.fixture(scope="session")
def run_prepare(spec, read_prepared):
    """Prepares with a small vocabulary in this process; returns (meta, documents of train, documents of val)."""

    def run(out_dir, *inputs, **options):
        options = {"tokenizer": spec, "workers": 1, **options}
        prepare(PrepareConfig(out_dir=str(out_dir), input=[str(i) for i in inputs], **options))
        return read_prepared(out_dir)

    return run


@pytest.fixture(scope="session")
def read_prepared():
    """Reads meta.json and the decoded documents, after checking every record in it against the files."""

    def read(out_dir):
        meta = json.loads((out_dir / "meta.json").read_text())
        tokenizer = load_tokenizer(meta["tokenizer"])
        assert (meta["vocab_size"], meta["eot"]) == (tokenizer.vocab_size, tokenizer.eot)
        streams = {"train": [], "val": []}
        for shard in meta["shards"]:
            path = out_dir / shard["file"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
            if meta["format"] == "npy":
                array = np.load(path, mmap_mode="r")
            else:
                array = np.fromfile(path, dtype=np.dtype(meta["dtype"]).newbyteorder("<"))
            assert array.ndim == 1 and array.dtype == meta["dtype"] and len(array) == shard["tokens"]
            streams[shard["split"]].append(np.array(array))
        files = {p.name for p in out_dir.iterdir()}
        assert files == {"meta.json", *(shard["file"] for shard in meta["shards"])}, "leftovers"
        documents = {}
        for split, arrays in streams.items():
            stream = np.concatenate(arrays)
            ends = np.flatnonzero(stream == tokenizer.eot)
            assert ends[-1] == len(stream) - 1, "every document ends with the end-of-text token"
            assert len(ends) == meta["documents"][split] and len(stream) == meta["tokens"][split]
            documents[split] = [tokenizer.decode(part) for part in np.split(stream, ends + 1)[:-1]]
            documents[split] = [text.removesuffix("<|endoftext|>") for text in documents[split]]
        return meta, documents["train"], documents["val"]

    return read
