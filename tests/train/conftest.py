"""A small data folder and small configurations for the tests of the driver."""

import json

import numpy as np
import pytest
from moe_engine.train.config import ModelOverrides, TrainConfig, resolve

MODEL = {
    "num_layers": 2,
    "d_model": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 32,
    "num_experts": 4,
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


@pytest.fixture
def small_run(token_folder, tmp_path):
    """Makes a `TrainConfig` for a run of seconds; keywords replace its values."""

    def make(**values) -> TrainConfig:
        model = MODEL | values.pop("model", {})
        defaults = {
            "data_dir": str(token_folder),
            "out_dir": str(tmp_path / "run"),
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
