"""Configurations: every bad field is named, counts and FLOPs agree with the model and with brute force."""

import dataclasses
import math

import pytest
import torch

from moe_engine import ModelConfig, MoEConfig, Transformer, preset
from moe_engine.presets import PRESETS

LAYER = {"d_model": 16, "d_ff": 8}
MODEL = {
    "vocab_size": 64,
    "num_layers": 2,
    "d_model": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 8,
}

BAD_LAYER = [
    ("d_model", {"d_model": 0}, "a positive integer"),
    ("d_model", {"d_model": 16.0}, "a positive integer"),
    ("d_ff", {"d_ff": -8}, "a positive integer"),
    ("d_ff", {"d_ff": True}, "a positive integer"),
    ("num_experts", {"num_experts": 0}, "a positive integer"),
    ("num_experts", {"num_experts": 257}, "at most 256"),
    ("top_k", {"top_k": 0}, "a positive integer"),
    ("top_k", {"top_k": 4, "num_experts": 3}, "at most min(num_experts, 8) = 3"),
    ("top_k", {"top_k": 9, "num_experts": 64}, "at most min(num_experts, 8) = 8"),
    ("activation", {"activation": "gelu"}, "one of swiglu, swiglu_oai"),
    ("gate", {"gate": "sigmoid"}, "one of softmax_over_topk, softmax_then_topk"),
    ("router_balance", {"router_balance": "none"}, "one of loss, bias"),
    ("router_jitter", {"router_jitter": -0.01}, "a number in [0, 1)"),
    ("router_jitter", {"router_jitter": 1.0}, "a number in [0, 1)"),
    ("router_jitter", {"router_jitter": math.nan}, "a number in [0, 1)"),
    ("backend", {"backend": "cuda"}, "one of auto, torch, triton"),
    ("init_std", {"init_std": 0.0}, "a positive number"),
    ("init_std", {"init_std": math.nan}, "a positive number"),
]
BAD_MODEL = [
    ("vocab_size", {"vocab_size": 0}, "a positive integer"),
    ("num_layers", {"num_layers": 0}, "a positive integer"),
    ("num_heads", {"num_heads": 0}, "a positive integer"),
    ("num_heads", {"num_heads": 3}, "a multiple of num_kv_heads = 2"),
    ("num_kv_heads", {"num_kv_heads": 0}, "a positive integer"),
    ("head_dim", {"head_dim": 0}, "a positive integer"),
    ("head_dim", {"head_dim": 7}, "an even number"),
    ("rope_original_context", {"rope_original_context": 0}, "a positive integer"),
    ("sliding_window", {"sliding_window": -1}, "0 (off) or a positive integer"),
    ("sliding_window", {"sliding_window": 64.5}, "0 (off) or a positive integer"),
    ("rope_factor", {"rope_factor": 0.5}, "at least 1"),
    ("rope_factor", {"rope_factor": math.nan}, "at least 1"),
    ("rope_theta", {"rope_theta": 1.0}, "more than 1"),
    ("rope_beta_fast, rope_beta_slow", {"rope_beta_fast": 1.0}, "beta_fast > beta_slow > 0"),
    ("rope_beta_fast, rope_beta_slow", {"rope_beta_slow": 0.0}, "beta_fast > beta_slow > 0"),
    ("norm_eps", {"norm_eps": 0.0}, "a positive number"),
    # the expert fields are checked by MoEConfig, and reach the user through ModelConfig too
    *BAD_LAYER,
]


def _assert_names(error, field, bad, expected):
    message = str(error.value)
    assert message.startswith(f"{field}: expected {expected}"), message
    assert "\n" not in message
    first = next(iter(bad))
    assert repr(bad[first]) in message.partition("got")[2], f"{message} does not say what came"


@pytest.mark.parametrize(("field", "bad", "expected"), BAD_LAYER, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_layer_config_names_the_bad_field(field, bad, expected):
    with pytest.raises(ValueError) as error:
        MoEConfig(**LAYER | bad)
    _assert_names(error, field, bad, expected)


@pytest.mark.parametrize(("field", "bad", "expected"), BAD_MODEL, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_model_config_names_the_bad_field(field, bad, expected):
    with pytest.raises(ValueError) as error:
        ModelConfig(**MODEL | bad)
    _assert_names(error, field, bad, expected)


def test_bounds_themselves_are_allowed():
    MoEConfig(**LAYER, num_experts=256, top_k=8)
    MoEConfig(**LAYER, num_experts=1, top_k=1)
    ModelConfig(**MODEL, sliding_window=0, rope_factor=1.0)
    ModelConfig(**MODEL, sliding_window=1)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoEConfig(**LAYER).top_k = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(**MODEL).top_k = 3


def test_the_layers_config_takes_every_expert_field_of_the_models():
    changed = {
        "num_experts": 5,
        "top_k": 3,
        "activation": "swiglu",
        "expert_bias": False,
        "router_bias": False,
        "gate": "softmax_then_topk",
        "router_balance": "bias",
        "router_jitter": 0.01,
        "backend": "torch",
        "save": "x",
        "autotune": True,
        "init_std": 0.03,
    }
    assert ModelConfig(**MODEL, **changed).moe == MoEConfig(**LAYER, **changed)
    shared = {f.name for f in dataclasses.fields(MoEConfig)} & {f.name for f in dataclasses.fields(ModelConfig)}
    assert shared == {f.name for f in dataclasses.fields(MoEConfig)} == set(LAYER) | set(changed)


def test_windows_alternate_from_the_first_layer():
    config = ModelConfig(**MODEL, sliding_window=128)
    assert [config.window(layer) for layer in range(4)] == [128, 0, 128, 0]
    assert ModelConfig(**MODEL, sliding_window=0).window(0) == 0


def _numbers(config):
    """Parameters on the meta device: all, in matrices without the embedding table, and those of one expert."""
    with torch.device("meta"):
        model = Transformer(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    matrices = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.dim() > 1 and not name.endswith(("b_up", "b_down")) and name != "embedding.weight"
    }
    experts = sum(n for name, n in matrices.items() if name.endswith(("w_up", "w_down")))
    return sum(sizes.values()), sum(matrices.values()), experts, sizes


@pytest.mark.parametrize("name", PRESETS)
def test_matrix_parameters_equal_the_model_that_is_built(name):
    config = preset(name)
    total, matrices, experts, _ = _numbers(config)
    active = matrices - experts + experts * config.top_k // config.num_experts
    assert config.matrix_parameters() == (matrices, active)
    assert total > matrices


def test_8b_has_the_size_of_its_name():
    total, _, experts, sizes = _numbers(preset("8b"))
    tables = sizes["embedding.weight"] + sizes["head.weight"]
    active = total - tables - experts * 6 // 8
    assert round(total / 1e9, 2) == 8.17
    # Counted without the inactive experts' weights; their biases (0.01 % of it) are left in.
    assert round(active / 1e9, 2) == 2.23
    assert round((active + sizes["head.weight"]) / 1e9, 2) == 2.81


def test_6b_small_and_tiny_have_the_sizes_of_their_names():
    assert round(_numbers(preset("6b"))[0] / 1e9, 2) == 6.58
    total, _, experts, _ = _numbers(preset("small"))
    assert 95e6 < total < 105e6
    assert 38e6 < total - experts * 6 // 8 < 42e6
    assert 5e6 < _numbers(preset("tiny"))[0] < 20e6


def test_tied_embeddings_drop_one_table_and_count_it_as_the_head():
    config = preset("tiny", tie_embeddings=True)
    total, matrices, _, sizes = _numbers(config)
    assert "head.weight" not in sizes
    assert config.matrix_parameters()[0] == matrices + sizes["embedding.weight"]
    assert config.matrix_parameters() == preset("tiny").matrix_parameters()
    assert total == _numbers(preset("tiny"))[0] - sizes["embedding.weight"]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("window", [0, 1, 8, 100])
def test_mean_keys_against_brute_force(length, window):
    config = ModelConfig(**MODEL, sliding_window=window)
    for layer in (0, 1):
        reach = config.window(layer) or length
        seen = [sum(0 <= query - key < reach for key in range(length)) for query in range(length)]
        assert config.mean_keys(layer, length) == pytest.approx(sum(seen) / length, rel=1e-12)


def test_flops_per_token():
    config = ModelConfig(**MODEL, sliding_window=4)
    attention = 16 * (4 * 8 + 2 * 2 * 8) + 4 * 8 * 16
    active = 2 * (attention + 16 * 8 + 2 * 3 * 16 * 8) + 64 * 16
    scores = 2 * 2 * (4 * 8) * (config.mean_keys(0, 10) + config.mean_keys(1, 10))  # QK and PV, 2 FLOPs each
    assert config.flops_per_token(10) == pytest.approx(6 * active + 3 * scores, rel=1e-12)
    assert preset("8b").flops_per_token(4096) == pytest.approx(18.1e9, rel=0.005)


def test_presets_take_overrides_and_name_what_is_wrong():
    assert preset("tiny", num_layers=2) == dataclasses.replace(preset("tiny"), num_layers=2)
    with pytest.raises(ValueError, match="preset: expected one of tiny, small, 6b, 8b, got 'huge'"):
        preset("huge")
    with pytest.raises(ValueError, match="top_k: expected at most"):
        preset("tiny", top_k=9)
    with pytest.raises(TypeError, match="experts"):
        preset("tiny", experts=4)
