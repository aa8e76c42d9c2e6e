"""Parameters at initialisation: their sizes, and that a seed and a name are all they depend on."""

import dataclasses
import math

import pytest
import torch

from moe_engine import ModelConfig, Transformer

INIT = ModelConfig(256, 3, 64, 4, 2, 16, 48, num_experts=5, init_std=0.03)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_parameter_starts_as_its_kind_does(tied):
    model = Transformer(dataclasses.replace(INIT, tie_embeddings=tied))
    down = 0.03 / math.sqrt(2 * 3)
    kinds = {
        "embedding.weight": 0.03,
        "head.weight": 0.03,
        "attention.qkv.weight": 0.03,
        "attention.out.weight": down,
        "moe.router.weight": 0.03,
        "moe.w_up": 0.03,
        "moe.w_down": down,
        "norm.weight": 1,
        "qkv.bias": 0,
        "out.bias": 0,
        "router.bias": 0,
        "b_up": 0,
        "b_down": 0,
        "sinks": 0,
    }
    used = set()
    for name, p in model.named_parameters():
        kind, value = next((kind, value) for kind, value in kinds.items() if name.endswith(kind))
        used.add(kind)
        if value in (0, 1):
            assert (p == value).all(), name
        else:
            assert p.std().item() == pytest.approx(value, rel=5 / math.sqrt(2 * p.numel())), name
            assert abs(p.mean().item()) < 5 * value / math.sqrt(p.numel()), name
    assert used == set(kinds) - ({"head.weight"} if tied else set())


def test_no_two_parameters_start_alike():
    """Each has a stream of its own: two layers, or two matrices of one shape, do not share values."""
    starts = {}
    for name, p in Transformer(INIT).named_parameters():
        if p.dim() > 1 and p.any():
            starts.setdefault(round(p.flatten()[0].item() / p.std().item(), 3), []).append(name)
    assert all(len(names) == 1 for names in starts.values()), starts


def test_the_seed_decides_and_nothing_else():
    first = Transformer(INIT).state_dict()
    torch.manual_seed(5)
    with torch.device("meta"):
        model = Transformer(INIT)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(math.nan)
    model.init_weights(1337)
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    model.init_weights(1338)
    for name, value in model.state_dict().items():
        assert value.isfinite().all()
        if model.initial_std(name) is not None:
            assert not torch.equal(value, first[name]), name
    # Deeper layers do not change the ones that are there, but for the scale of what adds to the residual stream.
    deeper = Transformer(dataclasses.replace(INIT, num_layers=4)).state_dict()
    assert torch.equal(deeper["blocks.2.moe.w_up"], first["blocks.2.moe.w_up"])


def test_16_bit_parameters_start_at_the_same_values_rounded():
    first = Transformer(INIT).state_dict()
    with torch.device("meta"):
        model = Transformer(INIT).to(torch.bfloat16)
    model.to_empty(device="cpu").init_weights()
    assert all(torch.equal(value, first[name].bfloat16()) for name, value in model.state_dict().items())
