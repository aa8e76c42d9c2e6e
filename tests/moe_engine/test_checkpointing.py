"""Activation checkpointing: the same bits, fewer of them kept, and the table of docs/training.md."""

import copy
import dataclasses
import gc
import re
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moe_engine.attention import RotaryEmbedding
from moe_engine.checkpointing import KEPT, MODES, run
from moe_engine.config import ModelConfig
from moe_engine.model import Block, Transformer
from moe_engine.presets import preset
from moe_engine.router import balance_loss, z_loss
from moe_engine.testing import normal

TINY = ModelConfig(
    vocab_size=61, num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=16, num_experts=4, top_k=2,
    sliding_window=8,
)  # fmt: skip
MIXTRAL = {"attention_bias": False, "attention_sinks": False, "sliding_window": 0, "rope_factor": 1.0,
           "activation": "swiglu", "expert_bias": False, "router_bias": False}  # fmt: skip
EXPERTS = {"torch": "moe_engine::expert_mlp_torch", "triton": "moe_engine::expert_mlp"}


def make(backend: str = "torch", **changes) -> tuple[Transformer, Tensor, Tensor]:
    """A model, tokens and targets; a smaller one for the interpreter of the kernels."""
    if backend == "triton":
        pytest.importorskip("triton")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    layers, length = (3, 20) if backend == "torch" else (1, 10)
    config = dataclasses.replace(TINY, backend=backend, num_layers=layers, **changes)
    tokens = torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(3))
    return Transformer(config).to(device), tokens.to(device), tokens.roll(-1, 1).to(device)


class Calls(TorchDispatchMode):
    """Counts the operations that are carried out, forward and backward."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


def train(model: Transformer, tokens: Tensor, targets: Tensor) -> tuple[list[Tensor], Counter[str], Counter[str]]:
    """Statistics, loss and every gradient; operations of forward, and of backward."""
    with Calls() as forward:
        out = model(tokens, targets)
    loss = out.loss + balance_loss(out.stats, 2).sum() + z_loss(out.stats, 2).sum()
    with Calls() as backward:
        grads = torch.autograd.grad(loss, list(model.parameters()))
    return [*out.stats, loss, *grads], forward.count, backward.count


@pytest.mark.parametrize(
    ("backend", "changes"), [("torch", {}), ("torch", MIXTRAL), ("triton", {})], ids=["torch", "mixtral", "triton"]
)
def test_every_mode_gives_the_same_bits(backend, changes):
    """Losses, gradients and statistics; and what backward computed again is what the mode says."""
    model, tokens, targets = make(backend, **changes)
    layers = len(model.blocks)
    expected, forward, _ = train(model, tokens, targets)
    assert int(expected[0].sum()) == layers * 2 * tokens.numel()
    assert all(g.any() for g in expected[-len(list(model.parameters())) :])
    again = {}
    for mode in MODES:
        model.set_checkpointing(mode)
        actual, first, again[mode] = train(model, tokens, targets)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), mode
        assert first[EXPERTS[backend]] == forward[EXPERTS[backend]] == layers
        assert again[mode][EXPERTS[backend]] == (layers if mode == "block" else 0)
    # A linear layer with a bias is addmm in forward only, so backward has those of the blocks that run again.
    if not changes:
        assert [again[mode]["aten::addmm"] for mode in MODES] == [0, 3 * layers, 0]
    else:
        assert again["selective"]["aten::mm"] == again["none"]["aten::mm"] < again["block"]["aten::mm"]
    norm = "aten::_fused_rms_norm" if tokens.is_cuda else "aten::rsqrt_"
    assert again["none"][norm] < again["selective"][norm] <= again["block"][norm]


def test_statistics_are_counted_once():
    """The router runs again in backward; what the model returned before is neither changed nor doubled."""
    model, tokens, targets = make()
    runs = []
    for block in model.blocks:
        block.moe.router.register_forward_hook(lambda *_: runs.append(1))
    plain = model(tokens, targets).stats
    assert len(runs) == 3
    for mode in ("block", "selective"):
        runs.clear()
        model.set_checkpointing(mode)
        out = model(tokens, targets)
        before = [field.detach().clone() for field in out.stats]
        out.loss.backward()
        assert len(runs) == 6
        for now, then, expected in zip(out.stats, before, plain, strict=True):
            assert torch.equal(now, then) and torch.equal(now, expected)


def test_every_nth_block():
    model, tokens, targets = make()
    names = list(model.state_dict())
    for every, blocks in ((1, [0, 1, 2]), (2, [0, 2]), (3, [0])):
        model.set_checkpointing("block", every)
        assert [i for i, block in enumerate(model.blocks) if block.checkpointing == "block"] == blocks
        assert train(model, tokens, targets)[2][EXPERTS["torch"]] == len(blocks)
    model.set_checkpointing("none")
    assert train(model, tokens, targets)[2][EXPERTS["torch"]] == 0
    assert list(model.state_dict()) == names and not any("checkpoint" in name for name in names)


@pytest.mark.parametrize("mode", MODES)
def test_without_gradients_nothing_is_kept_or_cached(mode):
    model, tokens, _ = make()
    expected = model(tokens).logits
    model.set_checkpointing(mode)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("full",), "mode: expected one of none, block, selective, got 'full'"),
        (("block", 0), "every: expected at least 1, got 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()[0].set_checkpointing(*arguments)


def test_under_autocast():
    """The second run has the dtypes of the first."""
    model, *_ = make()
    block, x = model.blocks[0], normal(2, 20, 16, dtype=torch.float32).requires_grad_()
    rotary, results = model.rotary.table(20, like=x), []
    for mode in MODES:
        model.set_checkpointing(mode)
        with torch.autocast("cpu", torch.bfloat16):
            out, stats = block(x, rotary)
        grads = torch.autograd.grad(out.square().sum() + stats.lse_sq, [x, *block.parameters()])
        results.append([out, *stats, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("mode", "backend"), [*((mode, "torch") for mode in MODES), ("block", "triton"), ("selective", "triton")]
)
def test_a_block_compiles_to_one_graph(mode, backend):
    model, *_ = make(backend)
    block, x = model.blocks[0], normal(1, 10, 16, dtype=torch.float32).to(model.embedding.weight.device)
    x.requires_grad_()
    rotary = model.rotary.table(10, like=x)
    model.set_checkpointing(mode)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    results, experts = [], []
    for call in (block, compiled):
        out, stats = call(x, rotary)
        loss = out.square().sum() + stats.lse_sq + stats.prob_sum.square().sum()
        with Calls() as backward:
            grads = torch.autograd.grad(loss, [x, *block.parameters()])
        results.append([out, *stats, *grads])
        experts.append(backward.count[EXPERTS[backend]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert experts == [int(mode == "block")] * 2


def test_a_compiled_part_of_a_checkpointed_block():
    """As where attention's kernel on a GPU is one that torch.compile makes."""
    model, *_ = make()
    block, x = model.blocks[0], normal(2, 20, 16, dtype=torch.float32).requires_grad_()
    rotary, results = model.rotary.table(20, like=x), []
    block.attention.compile(backend="aot_eager", fullgraph=True)
    for mode in MODES:
        model.set_checkpointing(mode)
        out, stats = block(x, rotary)
        results.append([out, *torch.autograd.grad(out.square().sum() + stats.lse_sq, [x, *block.parameters()])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_selective_results_serve_one_backward():
    weight = normal(4, 4).requires_grad_()
    out = run("selective", lambda x: (x @ weight).exp(), normal(3, 4)).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="kept for one backward"):
        out.backward()


def test_a_block_that_does_not_repeat_itself_is_noticed():
    weight, x, calls = normal(4, 4).requires_grad_(), normal(3, 4), []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return (x @ weight).exp() if len(calls) == 1 else torch.addmm(x, x, weight).exp()

    out = run("selective", function, x)
    with pytest.raises(RuntimeError, match=r"mm\.default was kept where the second run of a block has aten\.addmm"):
        out.sum().backward()


def test_a_result_that_was_not_kept_is_nan_where_it_is_used():
    """The experts' output is not kept, since the block only adds it; a block that squares it must not train."""
    model, *_ = make()
    layer, x = model.blocks[0].moe, normal(5, 16, dtype=torch.float32).requires_grad_()
    out = run("selective", lambda x: layer(x)[0].square(), x)
    assert out.isfinite().all()
    out.sum().backward()
    assert x.grad.isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_a_higher_order_operation_in_the_region(mode):
    """FlexAttention is one."""
    weight, x = normal(8, 8).requires_grad_(), normal(2, 5, 8)

    def function(x: Tensor) -> Tensor:
        y = (x @ weight).exp()
        return torch.ops.higher_order.cond(y.sum() > 0, lambda y: (y.sin(),), lambda y: (y.cos(),), (y,))[0]

    expected = torch.autograd.grad((x @ weight).exp().sin().sum(), weight)[0]
    assert torch.equal(torch.autograd.grad(run(mode, function, x).sum(), weight)[0], expected)


# ---- what is kept


class Alive(TorchDispatchMode):
    """Remembers every storage that an operation returned, as long as somebody else holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen += [weakref.ref(t.untyped_storage()) for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        return out

    def bytes(self, *but: Tensor) -> int:
        """Of all that is alive, but the storages of these tensors."""
        storages = {s._cdata: s.nbytes() for ref in self.seen if (s := ref()) is not None}
        return sum(storages.values()) - sum(storages.pop(k, 0) for k in {t.untyped_storage()._cdata for t in but})


def kept(name: str, layer: int, mode: str, batch: int, length: int, backend: str = "torch") -> float:
    """Bytes per token alive after the forward of one bf16 block, its input counted, its output and weights not.

    On the meta device, so of the form that attention and norms take where PyTorch has no kernel for them.
    """
    config = preset(name, backend=backend)
    with torch.device("meta"):
        block = Block(config, layer).to(torch.bfloat16)
        x = torch.empty(batch, length, config.d_model, dtype=torch.bfloat16, requires_grad=True)
        rotary = RotaryEmbedding(config).table(length, like=x).to("meta")
        block.checkpointing = mode
        with Alive() as alive:
            out, stats = block(x.clone(), rotary)
        return alive.bytes(out, rotary, *stats, *block.parameters()) / (batch * length)


def _row(name: str) -> str:
    figures = (kept(name, 1, mode, 1, 4096) for mode in ("none", "selective", "block"))
    return f"| `{name}` | {' | '.join(f'{round(figure):,}' for figure in figures)} |"


@pytest.mark.parametrize("name", ["small", "8b"])
def test_the_table_of_the_docs_is_measured(name):
    page = Path(__file__).resolve().parents[2] / "docs/training.md"
    assert _row(name) in page.read_text(encoding="utf-8").splitlines(), _row(name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_kept_is_what_the_page_lists(backend):
    """Block: the input. Selective: and qkv, the output projection, h, the router's logits in fp32."""
    if backend == "triton":
        pytest.importorskip("triton")
    c = preset("small")
    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    selective = 2 * (2 * c.d_model + qkv + c.top_k * 2 * c.d_ff) + 4 * c.num_experts
    for layer in (0, 1):  # sliding and full
        assert kept("small", layer, "block", 2, 512, backend) == 2 * c.d_model
        # 2 bytes, not per token, stand for the experts' output.
        assert kept("small", layer, "selective", 2, 512, backend) == selective + 2 / 1024
        assert kept("small", layer, "none", 2, 512, backend) > 1.4 * selective


@pytest.mark.parametrize("used", [False, True], ids=["no backward", "backward"])
def test_nothing_outlives_the_output(used):
    """Without the garbage collector: what is kept must not hold itself."""
    model, tokens, targets = make()
    model.set_checkpointing("selective")
    model(tokens, targets)  # PyTorch leaves a cycle at the first call of an operation, in every mode
    gc.collect()
    gc.disable()
    try:
        with Alive() as alive:
            out = model(tokens, targets)
        assert alive.bytes() > 50_000
        if used:
            torch.autograd.grad(out.loss, list(model.parameters()))
        del out
        rotary = model.rotary.table(20, like=model.embedding.weight)
        assert alive.bytes(rotary, tokens, targets, *model.parameters()) == 0
    finally:
        gc.enable()


def test_kept_results_are_those_of_operations_that_exist():
    pytest.importorskip("triton")
    import moe_engine.triton_backend  # noqa: F401 (registers its operation)

    for name in KEPT:
        namespace, operation = name.split("::")
        assert hasattr(getattr(torch.ops, namespace), operation), name
