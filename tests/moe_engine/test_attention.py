"""Attention against the reference in fp64: both engines, windows, groups, sinks; rotary tables; memory; the cache."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_engine import ModelConfig, attention, reference
from moe_engine.attention import Attention, KVCache, RotaryEmbedding, apply_rotary, attend
from moe_engine.testing import FP64_SUMS, assert_budget_bites, assert_close, normal, parameters, relative_error

ENGINES = ["fused", "plain"]

# B, Hq, Hkv, d, T, window, and why
SHAPES = [
    ((1, 2, 2, 8, 1, 0), "one token"),
    ((1, 2, 1, 8, 1, 16), "one token, window larger than the text"),
    ((2, 4, 2, 8, 37, 0), "everything before, groups of 2"),
    ((2, 4, 2, 8, 37, 16), "window shorter than the text, in one block"),
    ((1, 2, 2, 8, 20, 1), "window 1: each token sees itself"),
    ((1, 4, 1, 8, 40, 100), "window larger than the text, groups of 4"),
    ((1, 4, 1, 8, 40, 40), "window as long as the text"),
    ((1, 4, 1, 8, 41, 40), "window one shorter than the text"),
    ((1, 8, 1, 16, 300, 16), "blocks of 128 with a ragged last one, groups of 8"),
    ((2, 2, 2, 8, 256, 128), "two whole blocks of a window of 128"),
    ((1, 2, 1, 8, 257, 128), "one query in the last block"),
    ((1, 2, 1, 8, 300, 150), "blocks as long as a window above 128"),
    ((1, 2, 1, 8, 530, 0), "two blocks of queries where there is no fused kernel"),
    ((1, 2, 1, 6, 33, 4), "head_dim 6: no multiple of a vector"),
]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """`fused` is what CPUs use, `plain` is for every other device; both run here."""
    if request.param == "plain":

        def plain(q, length, window):
            return attention._Plain, attention._blocks(length, window)

        monkeypatch.setattr(attention, "_engine", plain)
    return request.param


def _inputs(shape, dtype, sinks=True, seed=0) -> tuple[list[Tensor], Tensor, int]:
    """q, k, v (and sinks), laid out in memory as the model has them, a gradient of the output, and the window."""
    b, heads, kv_heads, d, t, window = shape
    q, k, v = (normal(b, t, h, d, seed=10 * seed + i) for i, h in enumerate((heads, kv_heads, kv_heads)))
    leaves = [x.to(dtype).transpose(1, 2) for x in (1.5 * q, 1.5 * k, v)]
    if sinks:
        leaves.append(normal(heads, seed=10 * seed + 3, dtype=dtype))
    return leaves, normal(b, heads, t, d, seed=10 * seed + 4, dtype=dtype), window


def _reference(q, k, v, sinks, window) -> Tensor:
    """reference.attention of every sequence, in attend's layout."""
    sequences = zip(*(x.transpose(1, 2) for x in (q, k, v)), strict=True)
    return torch.stack([reference.attention(*qkv, sinks, window) for qkv in sequences]).transpose(1, 2)


def _run(function, leaves, grad_out, window) -> dict[str, Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves[:3], leaves[3] if len(leaves) > 3 else None, window)
    grads = torch.autograd.grad(out, leaves, grad_out)
    names = ("grad q", "grad k", "grad v", "grad sinks")
    return {"out": out.detach()} | dict(zip(names, grads, strict=False))


def _widen(leaves, grad_out, window):
    return [leaf.double() for leaf in leaves], grad_out.double(), window


def _degenerate(shape, sinks) -> bool:
    """One key per query and no sink: the probability is 1, and q and k get no gradient but rounding."""
    return not sinks and (shape[4] == 1 or shape[5] == 1)


def _compare(actual, exact, plain=None, roundings=0.0, degenerate=False):
    for name, value in actual.items():
        wanted, reference_value, least = exact[name], None if plain is None else plain[name], roundings
        if value.dtype == torch.float32:
            least = 64  # a probability e^(s − lse) is known to |lse| roundings, about 10, and near 1 differences cancel
        elif value.numel() < 100:
            least = max(roundings, 4)
        if degenerate and name in ("grad q", "grad k"):
            assert not wanted.any()
            scale = exact["grad v"].abs().amax().expand_as(wanted)  # what cancels is as large as this
            value, wanted = (torch.cat((t, scale), -1) for t in (value, wanted))
            assert_close(value.to(actual[name].dtype), wanted, roundings=max(least, 4), name=name)
        else:
            assert_close(value, wanted, reference_value, roundings=least, name=name)


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no sinks"])
@pytest.mark.parametrize("shape", [s for s, _ in SHAPES], ids=[why for _, why in SHAPES])
def test_attend_in_fp64(engine, shape, sinks):
    inputs = _inputs(shape, torch.float64, sinks)
    degenerate = _degenerate(shape, sinks)
    _compare(_run(attend, *inputs), _run(_reference, *inputs), roundings=FP64_SUMS, degenerate=degenerate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no sinks"])
@pytest.mark.parametrize(
    "shape",
    [(2, 8, 4, 16, 37, 0), (1, 8, 2, 16, 300, 128), (1, 8, 1, 16, 300, 16), (2, 8, 8, 16, 20, 1)],
    ids=["everything before", "window 128", "window 16, one key head", "window 1"],
)
def test_attend_in_lower_precision(engine, shape, sinks, dtype):
    inputs = _inputs(shape, dtype, sinks, seed=1)
    plain, exact = _run(_reference, *inputs), _run(_reference, *_widen(*inputs))
    _compare(_run(attend, *inputs), exact, plain, degenerate=_degenerate(shape, sinks))


def test_gradients_of_many_blocks_add_up_in_fp32(monkeypatch):
    """As exact in bf16 as those of a single block, where 64 additions in bf16 would show."""
    monkeypatch.setattr(attention, "_engine", lambda q, length, _: (attention._Plain, attention._blocks(length, 0)))
    inputs, errors = _inputs((1, 4, 4, 16, 512, 0), torch.bfloat16), []
    exact = _run(_reference, *_widen(*inputs))
    for block in (512, 8):
        monkeypatch.setattr(attention, "_QUERY_BLOCK", block)
        actual = _run(attend, *inputs)
        errors.append({name: relative_error(value, exact[name]).typical for name, value in actual.items()})
    assert all(errors[1][name] < 1.1 * one for name, one in errors[0].items()), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_budget_of_these_tests_rejects_faults(dtype):
    inputs = _inputs((1, 8, 2, 16, 300, 128), dtype)
    plain, exact = _run(_reference, *inputs), _run(_reference, *_widen(*inputs))
    for name in ("out", "grad q", "grad k", "grad v"):
        assert_budget_bites(exact[name], plain[name])


def test_engines_are_what_their_names_say(monkeypatch):
    used = []
    for each in (attention._FusedCPU, attention._Plain):
        forward = each.forward
        monkeypatch.setattr(each, "forward", lambda *a, each=each, f=forward: used.append(each.__name__) or f(*a))
    leaves, _, _ = _inputs((1, 2, 1, 8, 40, 0), torch.float32)
    attend(*leaves, 0)
    assert set(used) == {"_FusedCPU"}
    meta = [leaf.to("meta") for leaf in leaves]
    used.clear()
    assert attend(*meta, 16).shape == (1, 2, 40, 8)
    assert set(used) == {"_Plain"}


def test_gradients_that_are_expanded_or_strided(engine):
    """`out.sum()` hands back one number in every place; a transposed consumer hands back strides."""
    leaves, _, window = _inputs((2, 4, 2, 8, 40, 16), torch.float64)
    one = torch.ones((), dtype=torch.float64)
    strided = normal(2, 40, 8, 4).permute(0, 3, 1, 2)
    for grad_out in (one.expand(2, 4, 40, 8), strided):
        _compare(
            _run(attend, leaves, grad_out, window), _run(_reference, leaves, grad_out, window), roundings=FP64_SUMS
        )


def test_large_scores_and_sinks_far_away(engine):
    """Scores of ±100 and sinks that take everything or nothing: no overflow, and the right limits."""
    (q, k, v), grad_out, window = _inputs((1, 3, 3, 8, 30, 16), torch.float32, sinks=False)
    sinks = torch.tensor([-1e4, 0.0, 1e4])
    actual = _run(attend, [8 * q, 8 * k, v, sinks], grad_out, window)
    assert all(value.isfinite().all() for value in actual.values())
    without = _run(attend, [8 * q, 8 * k, v], grad_out, window)
    assert_close(actual["out"][:, 0], without["out"][:, 0].double())
    assert not actual["out"][:, 2].any() and not actual["grad v"][:, 2].any()
    assert actual["grad sinks"][0] == 0


def test_future_and_forgotten_tokens_have_no_influence(engine):
    leaves, _, _ = _inputs((1, 2, 1, 8, 200, 0), torch.float32)
    for window, reach in ((0, range(0, 151)), (16, range(135, 151))):
        out = attend(*leaves, window)[:, :, 150]
        changed = [leaf.clone() for leaf in leaves]
        outside = torch.tensor([i not in reach for i in range(200)])
        for leaf in changed[1:3]:
            leaf[:, :, outside] = 1e3
        assert torch.equal(attend(*changed, window)[:, :, 150], out)
        changed[2][:, :, reach.start] += 1
        assert not torch.equal(attend(*changed, window)[:, :, 150], out)


@pytest.mark.parametrize("window", [0, 16])
def test_no_token_and_no_sequence(engine, window):
    for b, t in ((2, 0), (0, 5)):
        q, k, v = (torch.zeros(b, h, t, 8, requires_grad=True) for h in (4, 2, 2))
        out = attend(q, k, v, torch.zeros(4), window)
        assert out.shape == (b, 4, t, 8)
        out.sum().backward()


def test_two_runs_agree_bit_for_bit(engine):
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = _inputs((2, 8, 2, 16, 300, 128), dtype)
        first, second = _run(attend, *inputs), _run(attend, *inputs)
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_gradient_of_the_gradient_is_refused(engine):
    """It would be that of constants: what backward saves of the output and log-sum-exp has no history."""
    leaves, _, window = _inputs((1, 2, 1, 8, 40, 16), torch.float64)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with pytest.raises(RuntimeError, match="attention is differentiable once: create_graph=True"):
        torch.autograd.grad(attend(*leaves, window).sum(), leaves, create_graph=True)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"create_graph|double backward"):
        (grad,) = torch.autograd.grad(compiled(*leaves, window).square().sum(), leaves[0], create_graph=True)
        torch.autograd.grad(grad.sum(), leaves[0])


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no sinks"])
def test_compiled_attention_has_the_same_gradients(sinks):
    inputs = _inputs((1, 4, 2, 8, 300, 16), torch.float32, sinks)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    eager, traced = _run(attend, *inputs), _run(compiled, *inputs)
    assert all(torch.equal(value, traced[name]) for name, value in eager.items())


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation put out, and how many operations there were."""

    def __init__(self):
        super().__init__()
        self.elements, self.shape, self.operations = 0, (), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            # What a view or an expanded tensor occupies is its storage.
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() // tensor.itemsize > self.elements:
                self.elements, self.shape = tensor.untyped_storage().nbytes() // tensor.itemsize, tuple(tensor.shape)
        return result


@pytest.mark.parametrize("window", [128, 0])
def test_memory_is_linear_in_the_length(engine, window):
    length = 4096
    leaves, grad_out, _ = _inputs((1, 1, 1, 8, length, window), torch.float32)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with LargestTensor() as largest:
        out = attend(*leaves, window)
        forward = largest.operations
        out.backward(grad_out)
    assert largest.operations > forward > 0
    # Sliding: a block of queries and the keys that its window reaches. Full, in plain operations: 512 queries.
    most = 128 * 255 if window else 512 * length
    assert largest.elements <= max(most, length * 8 * 2), largest.shape
    assert most < length * length / 4


def test_only_inputs_and_output_are_kept_for_backward(engine):
    (q, k, v, sinks), _, _ = _inputs((1, 4, 2, 8, 300, 16), torch.bfloat16)
    leaves = [leaf.requires_grad_() for leaf in (q, k, v, sinks)]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        attend(*leaves, 16)
    assert sorted(sizes) == sorted([q.numel(), k.numel(), v.numel(), 4, q.numel(), 4 * 300])  # … output, log-sum-exp


# ---- rotary embedding

CONFIG = ModelConfig(64, 2, 32, 4, 2, 64, 16, rope_theta=150_000.0)


def _table(config, length, like):
    return RotaryEmbedding(config).table(length, like)


@pytest.mark.parametrize("factor", [32.0, 1.0], ids=["YaRN", "plain"])
def test_table_in_fp64_and_fp32(factor):
    config = ModelConfig(64, 2, 32, 4, 2, 64, 16, rope_factor=factor)
    frequencies, scale = reference.rope_frequencies(config)
    angle = torch.arange(5000, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    exact = scale * torch.stack((angle.cos(), angle.sin()))
    # An angle of 5000 is known to 5000 roundings of 1.
    assert_close(_table(config, 5000, torch.zeros((), dtype=torch.float64)), exact, roundings=5000)
    # In fp32 only the last step rounds: the angles themselves are made in fp64.
    assert_close(_table(config, 5000, torch.zeros(())), exact)
    assert_close(_table(config, 5000, torch.zeros((), dtype=torch.bfloat16)), exact)
    assert _table(config, 5, torch.zeros((), dtype=torch.bfloat16)).dtype == torch.float32


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_scales():
    frequencies, scale = reference.rope_frequencies(CONFIG)
    plain = [150_000.0 ** (-i / 32) for i in range(32)]
    ratio = [a / b for a, b in zip(plain, frequencies, strict=True)]
    turns = [4096 * f / (2 * math.pi) for f in plain]
    assert all(r == 1 for r, turn in zip(ratio, turns, strict=True) if turn > 32)
    assert all(r == pytest.approx(32) for r, turn in zip(ratio, turns, strict=True) if turn < 1)
    assert all(1 < r < 32 for r, turn in zip(ratio, turns, strict=True) if 1 < turn < 32)
    assert sorted(ratio) == ratio and 1 < ratio[12] < 32
    assert scale == pytest.approx(0.1 * math.log(32) + 1)


def test_yarn_of_a_short_context_against_transformers():
    """No pair turns 32 times within 64 positions: the ramp begins at the first pair."""
    pytest.importorskip("transformers", minversion="5.0")
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    config = GptOssConfig(head_dim=64, num_attention_heads=64)
    config.rope_parameters |= {"original_max_position_embeddings": 64}
    theirs = GptOssRotaryEmbedding(config)
    short = replace(CONFIG, rope_original_context=64)
    frequencies, _ = reference.rope_frequencies(short)
    assert_close(theirs.inv_freq, torch.tensor(frequencies, dtype=torch.float64), roundings=8)
    angle = torch.arange(300, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    table = _table(short, 300, torch.zeros((), dtype=torch.float64))
    assert_close(torch.atan2(table[1, 1], table[0, 1]), angle[1], roundings=8)


def test_table_against_transformers():
    pytest.importorskip("transformers", minversion="5.0")
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    theirs = GptOssRotaryEmbedding(GptOssConfig(head_dim=64, num_attention_heads=64))
    frequencies, scale = reference.rope_frequencies(CONFIG)
    assert_close(theirs.inv_freq, torch.tensor(frequencies, dtype=torch.float64), roundings=8)
    assert theirs.attention_scaling == pytest.approx(scale, rel=1e-12)
    # Their angles are products in fp32, known to 300 roundings of 1 at position 300.
    exact = _table(CONFIG, 300, torch.zeros((), dtype=torch.float64))
    cos, sin = theirs(torch.zeros(1), torch.arange(300)[None])
    assert_close(torch.stack((cos[0], sin[0])), exact, roundings=600)
    assert_close(_table(CONFIG, 300, torch.zeros(())), exact)


def test_table_is_cached_and_grows_and_follows_device_and_dtype():
    rotary, like = RotaryEmbedding(CONFIG), torch.zeros(())
    long = rotary.table(10, like)
    assert rotary.table(4, like).data_ptr() == long.data_ptr()
    assert torch.equal(rotary.table(4, like), long[:, :4])
    assert torch.equal(rotary.table(12, like)[:, :10], long)
    assert rotary.table(4, like.double()).dtype == torch.float64
    assert rotary.table(4, like.to("meta")).is_meta and not rotary.table(4, like).is_meta


def test_rotation_of_16_bit_values_happens_in_fp32():
    x = normal(1, 9, 2, 64, dtype=torch.bfloat16)
    frequencies, scale = reference.rope_frequencies(CONFIG)
    exact = reference.rotate(x[0].double(), frequencies, scale)[None]
    assert_close(apply_rotary(x, _table(CONFIG, 9, x)), exact)
    assert apply_rotary(x, _table(CONFIG, 9, x)).dtype == torch.bfloat16


# ---- the module and its cache


@pytest.mark.parametrize("layer", [0, 1], ids=["sliding layer", "full layer"])
@pytest.mark.parametrize("plain", [False, True], ids=["gpt-oss", "no bias, no sinks"])
@pytest.mark.parametrize("steps", [(30,), (1,) * 30, (13, 1, 1, 15)], ids=["whole", "token by token", "in pieces"])
def test_cached_attention_in_fp64(layer, plain, steps):
    """A prompt whole, token by token, and in pieces, through a window of 8: the same as without a cache."""
    switches = {"attention_bias": not plain, "attention_sinks": not plain}
    config = ModelConfig(64, 2, 24, 4, 2, 8, 16, sliding_window=8, **switches)
    module = Attention(config, layer).double()
    module.load_state_dict(parameters(module))
    x = normal(2, 30, 24)
    table = _table(config, 30, x)
    whole = module(x, table)
    cache, pieces, begin = KVCache(config, 2, 30, torch.float64, "cpu"), [], 0
    for step in steps:
        pieces.append(module(x[:, begin : begin + step], table[:, begin : begin + step], cache))
        begin = cache.length = begin + step
    assert_close(torch.cat(pieces, 1).detach(), whole.detach(), roundings=FP64_SUMS)


def test_parameters_follow_the_configuration():
    config = ModelConfig(64, 2, 24, 4, 2, 8, 16)
    shapes = {name: tuple(p.shape) for name, p in Attention(config, 0).named_parameters()}
    assert shapes == {
        "qkv.weight": (64, 24),
        "qkv.bias": (64,),
        "out.weight": (24, 32),
        "out.bias": (24,),
        "sinks": (4,),
    }
    config = ModelConfig(64, 2, 24, 4, 2, 8, 16, attention_bias=False, attention_sinks=False)
    assert {name for name, _ in Attention(config, 0).named_parameters()} == {"qkv.weight", "out.weight"}


@pytest.mark.parametrize("window", [0, 16, 200])
@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no sinks"])
def test_many_new_tokens_after_old_ones(window, sinks):
    """In several blocks of queries, the first of which begins anywhere: the last rows of attention over all."""
    (q, k, v, *rest), _, _ = _inputs((1, 4, 2, 8, 1300, window), torch.float64, sinks)
    sink = rest[0] if sinks else None
    exact = _reference(q, k, v, sink, window)
    for new in (1, 700, 1299, 1300):
        out = attention._attend_cached(q[:, :, -new:], k, v, sink, window)
        assert_close(out, exact[:, :, -new:], roundings=FP64_SUMS, name=f"{new} new tokens")
    assert attention._attend_cached(q[:, :, :0], k, v, sink, window).shape == (1, 4, 0, 8)


@pytest.mark.parametrize("new", [1, 2000, 4096])
@pytest.mark.parametrize("window", [128, 0])
def test_memory_of_cached_attention_is_linear(window, new):
    """A prompt's end, and a whole prompt: never as many scores as tokens by tokens."""
    (q, k, v, sinks), _, _ = _inputs((1, 1, 1, 8, 4096, window), torch.float32)
    with LargestTensor() as largest:
        attention._attend_cached(q[:, :, -new:], k, v, sinks, window)
    assert 0 < largest.elements <= max(128 * 255 if window else 512 * 4096, 4096 * 8)
