"""Blocks compiled by torch.compile with its default backend, inductor: one graph each, eager's numbers, compiled once.

On a CPU inductor writes C++, which takes seconds a graph; `aot_eager` stands in for it in the tests of single parts.
"""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler

from moe_engine.checkpointing import MODES
from moe_engine.config import ModelConfig
from moe_engine.model import Transformer
from moe_engine.router import balance_loss, z_loss
from moe_engine.testing import assert_budget_bites, assert_close, parameters

LENGTH = 24
SUMS = 16  # roundings to grant gradients of a few elements, sums over 48 tokens that have come through up to 6 layers
# Layers 0, 2, … slide, the others are full. Heads of a size that FlexAttention takes where there is a GPU.
CONFIG = ModelConfig(
    vocab_size=61, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=32, num_experts=4, top_k=2,
    sliding_window=8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    """No graphs of other tests: they count against the limit of recompilations."""
    try:
        get_cpp_compiler()
    except RuntimeError as error:  # torch's InvalidCxxCompiler
        pytest.skip(f"inductor needs a C++ compiler: {error}")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(backend: str, modes: tuple[str, ...]) -> tuple[Transformer, Transformer, Transformer]:
    """Three times the same model, a block for each mode: to be compiled; eager; exact, in fp64 on the CPU."""
    if backend == "triton":
        pytest.importorskip("triton")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    models = []
    for kind, dtype, place in [(backend, torch.float32, device)] * 2 + [("torch", torch.float64, "cpu")]:
        model = Transformer(dataclasses.replace(CONFIG, backend=kind, num_layers=len(modes))).to(place, dtype)
        model.load_state_dict(parameters(model))
        for block, mode in zip(model.blocks, modes, strict=True):
            block.checkpointing = mode
        models.append(model)
    return tuple(models)


def batch(seed: int) -> Tensor:
    return torch.randint(0, 61, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def step(model: Transformer, tokens: Tensor, function=None) -> dict[str, Tensor]:
    """Loss, statistics and every gradient."""
    tokens = tokens.to(model.embedding.weight.device)
    out = (model if function is None else function)(tokens, tokens.roll(-1, 1))
    loss = out.loss / tokens.numel() + balance_loss(out.stats, 2).sum() + z_loss(out.stats, 2).sum()
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()))
    return {"loss": loss, **out.stats._asdict(), **dict(zip(named, grads, strict=True))}


def hold(models: tuple[Transformer, ...], tokens: Tensor, function=None) -> Tensor:
    """The compiled model's results to the error budget that eager's have; the experts' counts."""
    actual = step(models[0], tokens, function)
    eager, exact = (step(model, tokens) for model in models[1:])
    counts = actual.pop("expert_counts")
    assert torch.equal(counts, eager.pop("expert_counts")) and torch.equal(counts.cpu(), exact.pop("expert_counts"))
    for name, value in actual.items():
        assert_close(value, exact[name], eager[name], roundings=SUMS, name=name)
    return counts.cpu()


def overload(model: Transformer, expert: int) -> None:
    """Make one expert every token's first choice."""
    with torch.no_grad():
        for block in model.blocks:
            block.moe.router.bias[expert] += 50


ALL = tuple(mode for mode in MODES for _ in range(2))  # a sliding layer and a full one of each


@pytest.mark.parametrize(
    ("backend", "modes"),
    [
        ("torch", ("none", "selective")),
        pytest.param("triton", ("block",), marks=pytest.mark.slow),
        pytest.param("torch", ALL, marks=pytest.mark.slow),
        pytest.param("triton", ALL, marks=pytest.mark.slow),
    ],
    ids=["torch", "triton", "torch, all", "triton, all"],
)
def test_blocks_are_compiled_once_and_give_eagers_numbers(backend, modes):
    """Whatever the tokens, the weights and the routing."""
    models = make(backend, modes)
    for block in models[0].blocks:
        block.compile(fullgraph=True)
    seen = [hold(models, batch(0))]
    assert counters["stats"]["unique_graphs"] == len(modes) and not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        seen.append(hold(models, batch(1)))
        seen.append(hold(models, torch.full((2, LENGTH), 5)))
        for model in models:
            model.load_state_dict(parameters(model, seed=1))
        seen.append(hold(models, batch(0)))
        for model in models:
            overload(model, expert=2)
        seen.append(hold(models, batch(0)))
    assert len({str(counts) for counts in seen}) == len(seen)
    assert (seen[-1][:, 2] == 2 * LENGTH).all()
    assert counters["stats"]["unique_graphs"] == len(modes)


def test_the_checks_of_this_page_can_fail():
    """A second shape is a recompilation, and is noticed; the budget rejects wrong gradients."""
    models = make("torch", MODES[:1])
    models[0].blocks[0].compile(fullgraph=True)
    hold(models, batch(0))
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompil"):
        hold(models, batch(0)[:, :11])
    eager, exact = (step(model, batch(0)) for model in models[1:])
    for name in ("blocks.0.moe.w_up", "blocks.0.moe.router.weight", "blocks.0.attention.sinks"):
        assert_budget_bites(exact[name], eager[name])


def test_layers_of_one_kind_share_a_graph():
    """Any number of blocks is two graphs, and two more where there are no gradients: a limit of 8 is never reached."""
    model = Transformer(dataclasses.replace(CONFIG, num_layers=12))
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")
    for graphs, gradients in ((2, True), (4, False)):
        with torch.set_grad_enabled(gradients):
            model(batch(0), batch(1))
        assert counters["stats"]["unique_graphs"] == graphs
    with torch.compiler.set_stance("fail_on_recompile"):
        step(model, batch(2))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_whole_model_is_one_graph(backend):
    """And a second one from the second step on, since the first makes the rotary table."""
    models = make(backend, MODES[:2])
    compiled = torch.compile(models[0], fullgraph=True)
    for seed in (0, 1):
        hold(models, batch(seed), compiled)
        assert counters["stats"]["unique_graphs"] == seed + 1
    with torch.compiler.set_stance("fail_on_recompile"):
        hold(models, torch.full((2, LENGTH), 5), compiled)
