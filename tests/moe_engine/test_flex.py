"""Attention through FlexAttention: mask, groups, sinks and their gradients against the reference, without a GPU too.

PyTorch refuses FlexAttention's backward on a CPU, but the graph that a GPU would compile runs there, operation by
operation, through FlexAttention's own dense formulas: that is the fixture `dense`. What only a GPU can show is marked.
"""

import math
import warnings

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from moe_engine import ModelConfig, attention, checkpointing, flex, reference
from moe_engine.attention import RotaryEmbedding, attend
from moe_engine.model import Block
from moe_engine.testing import assert_budget_bites, assert_close, normal, parameters

NAMES = ("out", "grad q", "grad k", "grad v", "grad sinks")
CPU = torch.device("cpu")


class Dense:
    """A backend of torch.compile that runs graphs as they are and keeps them."""

    def __init__(self):
        self.forward, self.backward = [], []

    def __call__(self, graph, inputs):
        def keep(graphs):
            return lambda graph, _inputs, **_options: graphs.append(graph) or graph

        compile_both = aot_autograd(
            fw_compiler=keep(self.forward),
            bw_compiler=keep(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )
        return compile_both(graph, inputs)


@pytest.fixture
def dense(monkeypatch):
    torch._dynamo.reset()
    backend = Dense()
    compiled = torch.compile(flex._attend, fullgraph=True, backend=backend)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "_through_flex", lambda *_: True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*boxed arguments")
        yield backend
    torch._dynamo.reset()


def make(shape, dtype=torch.float32, sinks=True, device="cpu") -> tuple[list[Tensor], Tensor, int]:
    """q, k, v (and sinks), laid out in memory as the model has them, a gradient of the output, and the window."""
    b, heads, kv_heads, d, t, window = shape
    q, k, v = (normal(b, t, h, d, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads)))
    leaves = [x.to(device, dtype).transpose(1, 2) for x in (1.5 * q, 1.5 * k, v)]
    if sinks:
        leaves.append(normal(heads, seed=3, dtype=dtype).to(device))
    return leaves, normal(b, heads, t, d, seed=4, dtype=dtype).to(device), window


def run(function, leaves, grad_out, window) -> dict[str, Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves[:3], leaves[3] if len(leaves) > 3 else None, window)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad_out)), strict=False))


def oracle(q, k, v, sinks, window) -> Tensor:
    sequences = zip(*(x.transpose(1, 2) for x in (q, k, v)), strict=True)
    return torch.stack([reference.attention(*qkv, sinks, window) for qkv in sequences]).transpose(1, 2)


def compare(inputs, device="cpu"):
    leaves, grad_out, window = inputs  # on the CPU, where the reference computes
    exact = run(oracle, [leaf.double() for leaf in leaves], grad_out.double(), window)
    plain = run(oracle, leaves, grad_out, window)
    actual = run(attend, [leaf.to(device) for leaf in leaves], grad_out.to(device), window)
    for name, value in actual.items():
        # fp32: a probability e^(s − lse) is known to |lse| roundings, and near 1 differences cancel.
        least = 64 if value.dtype == torch.float32 else 4
        assert_close(value.cpu(), exact[name], plain[name], roundings=least, name=name)
        if value.numel() > 100:
            assert_budget_bites(exact[name], plain[name])


# B, Hq, Hkv, d, T, window, and why
SHAPES = [
    ((1, 2, 2, 16, 1, 16), "one token"),
    ((2, 4, 2, 16, 300, 0), "everything before, groups of 2, ragged"),
    ((2, 8, 1, 16, 300, 16), "window shorter than a block"),
    ((1, 4, 4, 16, 257, 128), "window of a block, one query in the last one"),
    ((1, 2, 1, 16, 640, 300), "window with blocks that need no mask"),
]


@pytest.mark.parametrize("shape", [s for s, _ in SHAPES], ids=[why for _, why in SHAPES])
def test_attend_in_fp32(dense, shape):
    compare(make(shape))
    assert len(dense.forward) == len(dense.backward) == 1


def test_attend_without_sinks_and_in_bf16(dense):
    compare(make((1, 4, 2, 16, 300, 128), sinks=False))
    compare(make((1, 4, 2, 16, 300, 128), torch.bfloat16))


def _listed(count: Tensor, numbers: Tensor) -> list[list[int]]:
    return [row[:n].tolist() for n, row in zip(count[0, 0].tolist(), numbers[0, 0], strict=True)]


@pytest.mark.parametrize("length", [1, 127, 128, 129, 640, 700])
@pytest.mark.parametrize("window", [0, 1, 2, 127, 128, 129, 130, 255, 256, 257, 384, 400])
def test_the_tables_are_those_that_looking_at_every_score_gives(length, window):
    mask = flex.block_mask(length, window, CPU)
    query, key = torch.arange(length)[:, None], torch.arange(length)
    sees = (query >= key) & (query - key < window) if window else query >= key
    n = -(-length // 128)
    blocks = [[sees[i : i + 128, j : j + 128] for j in range(0, length, 128)] for i in range(0, length, 128)]
    some, every = (torch.tensor([[bool(f(b)) for b in row] for row in blocks]) for f in (torch.any, torch.all))
    full_kv = [[]] * n if mask.full_kv_indices is None else _listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    full_q = [[]] * n if mask.full_q_indices is None else _listed(mask.full_q_num_blocks, mask.full_q_indices)
    kv, q = _listed(mask.kv_num_blocks, mask.kv_indices), _listed(mask.q_num_blocks, mask.q_indices)
    for i in range(n):
        assert sorted(kv[i] + full_kv[i]) == some[i].nonzero().flatten().tolist()
        assert sorted(q[i] + full_q[i]) == some[:, i].nonzero().flatten().tolist()
        assert all(every[i, j] for j in full_kv[i]) and all(every[j, i] for j in full_q[i])
        assert all(rows == sorted(rows) for rows in (kv[i], full_kv[i], q[i], full_q[i]))
        # What is called masked and is not costs time only: no more of it than a window's ragged ends and own block.
        assert len(kv[i]) <= 3 and len(q[i]) <= 3
    for table in (mask.kv_indices, mask.q_indices):
        assert table.dtype == torch.int32 and table.min() >= 0 and table.max() < n
    visible = mask.mask_mod(None, None, query, key)
    assert torch.equal(visible, sees)


def test_a_sliding_layer_visits_a_number_of_blocks_that_does_not_grow():
    for length in (1024, 8192):
        mask = flex.block_mask(length, 128, CPU)
        assert mask.kv_num_blocks.max() == mask.q_num_blocks.max() == 2 and mask.full_kv_num_blocks is None


def test_layers_steps_and_lengths_share_compilations_and_masks(dense):
    """Two kinds of layers: two graphs, and with other lengths two more for all of them. A mask is made once."""
    flex._cached_block_mask.cache_clear()
    graphs = []
    for length in (300, 300, 500, 200, 330):
        for window in (0, 16, 0, 16):
            leaves, grad_out, _ = make((1, 2, 1, 16, length, window))
            run(attend, leaves, grad_out, window)
        graphs.append(len(dense.backward))
    assert graphs == [2, 2, 4, 4, 4]
    assert flex._cached_block_mask.cache_info().misses == 2 * 4


@pytest.mark.slow
def test_one_process_may_need_more_graphs_than_pytorch_grants(dense):
    """Batches, gradients or none, dtypes and lengths: 8 graphs are PyTorch's limit, and beyond it is an error."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for batch, length in ((1, 140), (2, 140), (3, 200)):
            for window in (0, 16):
                leaves, grad_out, _ = make((batch, 2, 1, 16, length, window), dtype)
                with torch.no_grad():
                    without = attend(*leaves, window)
                assert torch.equal(run(attend, leaves, grad_out, window)["out"], without)
    assert len(dense.forward) > 2 * 8
    assert torch._dynamo.config.recompile_limit == 8  # as it was, for whatever else is compiled


def test_where_operations_are_counted_it_is_plain_operations(dense, monkeypatch):
    """In FlopCounterMode nothing is compiled, and FlexAttention uncompiled would hold T × T scores, or fail."""
    monkeypatch.setattr(attention, "_engine", lambda _q, *sizes: (attention._Plain, attention._blocks(*sizes)))
    leaves, grad_out, window = make((1, 2, 1, 16, 300, 16))
    expected = run(attend, leaves, grad_out, window)
    graphs = len(dense.forward)
    with FlopCounterMode(display=False) as counter:
        actual = run(attend, leaves, grad_out, window)
    assert counter.get_total_flops() > 0 and len(dense.forward) == graphs
    for name, value in actual.items():
        assert_close(value, expected[name].double(), roundings=64, name=name)


def test_a_mask_made_in_inference_serves_training(dense):
    flex._cached_block_mask.cache_clear()
    leaves, grad_out, window = make((1, 2, 1, 16, 150, 16))
    with torch.inference_mode():
        attend(*leaves, window)
    assert run(attend, leaves, grad_out, window)["grad sinks"].any()


def test_backward_keeps_inputs_output_and_log_sum_exp(dense):
    b, heads, kv_heads, d, t = 1, 4, 2, 16, 1100
    leaves, grad_out, window = make((b, heads, kv_heads, d, t, 128))
    run(attend, leaves, grad_out, window)
    (graph,) = dense.backward
    kept = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
    floats = sorted(x.numel() for x in kept if x.dtype.is_floating_point)
    kv, out, lse = b * kv_heads * t * d, b * heads * t * d, b * heads * t
    assert [n for n in floats if n > lse] == [kv, kv, out, out, out]  # k, v, q, o, and grad_out
    # lse; and the sinks, or in their place the share that they leave, as the partitioner likes it
    assert lse in floats and sum(n for n in floats if n <= lse) <= 2 * lse
    assert all(x.numel() <= 9 * 9 for x in kept if not x.dtype.is_floating_point)  # the mask's tables
    # Outside of FlexAttention's own operation nothing is as large as scores.
    for each in (*dense.forward, graph):
        values = [n.meta.get("val") for n in each.graph.nodes]
        assert all(x.numel() <= out for x in values if isinstance(x, Tensor))


CONFIG = ModelConfig(64, 2, 32, 4, 2, 16, 16, sliding_window=16)


def _block_gradients(block: Block, function, length: int) -> list[Tensor]:
    x = normal(1, length, 32, dtype=torch.float32).requires_grad_()
    out, _ = function(x, RotaryEmbedding(CONFIG).table(length, x))
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *block.parameters()], allow_unused=True)]


@pytest.mark.parametrize("layer", [0, 1], ids=["sliding", "full"])
def test_in_a_block_with_every_checkpointing_mode(dense, layer):
    block = Block(CONFIG, layer)
    block.load_state_dict(parameters(block))
    results = {}
    for mode in checkpointing.MODES:
        block.checkpointing = mode
        results[mode] = _block_gradients(block, block, 200)
    assert len(dense.backward) == 1  # and the same graph in every mode: the modes do not make it run uncompiled
    for mode in checkpointing.MODES:
        assert all(a is b or torch.equal(a, b) for a, b in zip(results[mode], results["none"], strict=True)), mode
    assert results["none"][1].any()


@pytest.mark.parametrize("mode", checkpointing.MODES)
def test_in_a_compiled_block(dense, mode):
    """In its graph, mask included, whatever the mode; a second length leaves the length open."""
    block = Block(CONFIG, 0)
    block.load_state_dict(parameters(block))
    block.checkpointing = mode
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for length in (200, 150) if mode == "none" else (200,):
        for actual, eager in zip(
            _block_gradients(block, compiled, length), _block_gradients(block, block, length), strict=True
        ):
            assert actual is eager or torch.allclose(actual, eager, rtol=1e-4, atol=1e-5 * float(eager.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 128, 300])
def test_the_mask_compiled_for_a_cpu(window):
    """PyTorch's C++ kernel goes by the blocks of the mask, which the dense formulas do not. It has no log-sum-exp."""
    torch._dynamo.reset()
    (q, k, v), _, _ = make((1, 4, 2, 64, 700, window), sinks=False)
    compiled = torch.compile(flex_attention.flex_attention, fullgraph=True)
    out = compiled(q, k, v, block_mask=flex.block_mask(700, window, CPU), enable_gqa=True)
    exact = oracle(q.double(), k.double(), v.double(), None, window)
    assert_close(out, exact, oracle(q, k, v, None, window), roundings=64)


# ---- who is served


def test_what_cannot_go_through():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert all(flex.obstacle(d, dtype, True) is None for d in (16, 32, 64, 128))
    assert "float64" in flex.obstacle(64, torch.float64, True)
    assert all(f"not {d}" in flex.obstacle(d, torch.float32, True) for d in (8, 48, 512))
    assert "Triton" in flex.obstacle(64, torch.float32, False)
    assert not attention._through_flex("cpu", 64, torch.float32)


@pytest.mark.parametrize("traced", [False, True])
def test_it_is_said_once_why(traced):
    flex._serves.cache_clear()
    function = attention._through_flex
    if traced:
        torch._dynamo.reset()
        function = torch.compile(lambda *a: attention._through_flex(*a), backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match="not 24") as caught:
        assert not function("cuda", 24, torch.float32)
        assert not function("cuda", 24, torch.float32)
    assert len([w for w in caught if "not 24" in str(w.message)]) == 1
    flex._serves.cache_clear()


# ---- on a GPU


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("window", [0, 128, 300])
def test_on_a_gpu(window, d, dtype):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=FutureWarning)
        compare(make((2, 8, 2, d, 700, window), dtype), "cuda")
    compare(make((2, 8, 2, d, 700, window), dtype, sinks=False), "cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_short_texts_on_a_gpu():
    """Where FlexAttention left alone takes another kernel, which does not take groups of 8."""
    for length in (1, 100):
        compare(make((2, 8, 1, 64, length, 16), torch.bfloat16), "cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_memory_is_linear_on_a_gpu():
    leaves, grad_out, _ = make((1, 8, 2, 64, 16384, 0), torch.bfloat16, device="cuda")
    for window in (0, 128):
        run(attend, leaves, grad_out, window)  # compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(attend, leaves, grad_out, window)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak < 8 * 8 * 16384 * 64 * 4, f"{peak / 1e6:.0f} MB"  # scores in bf16: 4.3 GB


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_two_runs_agree_bit_for_bit_on_a_gpu():
    inputs = make((2, 8, 2, 64, 700, 128), torch.bfloat16, device="cuda")
    first, second = run(attend, *inputs), run(attend, *inputs)
    assert all(torch.equal(value, second[name]) and math.isfinite(value.sum()) for name, value in first.items())


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("mode", checkpointing.MODES)
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_on_a_gpu(mode, compiled):
    block = Block(CONFIG, 0)
    block.load_state_dict(parameters(block))
    block.cuda()
    function = torch.compile(block, fullgraph=True) if compiled else block
    x = normal(1, 200, 32, dtype=torch.float32).cuda().requires_grad_()
    table = RotaryEmbedding(CONFIG).table(200, x)
    (expected,) = torch.autograd.grad(function(x, table)[0].square().sum(), x)
    block.checkpointing = mode
    (actual,) = torch.autograd.grad(function(x, table)[0].square().sum(), x)
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
