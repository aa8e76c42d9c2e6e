"""Options of the router: a bias for choosing experts, noise on its input. Tuning of tiles, z-loss of the logits."""

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moe_engine import MoEConfig, MoELayer, Transformer, reference, torch_backend, triton_backend
from moe_engine.checkpointing import MODES
from moe_engine.config import ACTIVATIONS, GATES, ModelConfig
from moe_engine.router import JitterKey, Router, _jitter
from moe_engine.testing import FP64_SUMS, LOGITS, assert_budget_bites, assert_close, normal, parameters, routing_logits

BIASED = MoEConfig(d_model=24, d_ff=20, router_balance="bias")
MODEL = ModelConfig(
    vocab_size=61, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=24, num_experts=5
)
BIASED_MODEL = dataclasses.replace(MODEL, router_balance="bias", router_jitter=0.2)
KEY = JitterKey(seed=3, layer=1, sequence=70)


def jitter(x, epsilon, key):
    """x with the router's noise on it."""
    return x * _jitter(x.detach(), epsilon, *key)


def _device(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


# ---- the bias for choosing


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", [kind for kind in LOGITS if kind != "nan"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(41, 8, 2), (41, 5, 4), (7, 256, 8), (3, 1, 1), (0, 8, 2)])
def test_biased_gate_in_fp64(gate, kind, tokens, experts, top_k):
    z = routing_logits(kind, tokens, experts, dtype=torch.float64).requires_grad_()
    bias = torch.round(2 * normal(experts, seed=9, dtype=torch.float32) * 4) / 4  # coarse, so that there are ties
    idx, weights, stats = torch_backend.gate(z, top_k, gate, bias)
    # In the plainest words there are: by falling sum, ties to the lower expert; weights and statistics of z alone.
    order = [
        sorted(range(experts), key=lambda e, row=row: (-(row[e] + bias[e].item()), e))[:top_k] for row in z.tolist()
    ]
    assert idx.tolist() == order
    assert stats.expert_counts.tolist() == [sum(row.count(e) for row in order) for e in range(experts)]
    chosen = z.gather(1, idx.long())
    expected = chosen.softmax(1) if gate == GATES[0] else z.softmax(1).gather(1, idx.long())
    assert_close(weights, expected.detach(), roundings=FP64_SUMS)
    assert_close(stats.prob_sum, z.softmax(1).sum(0).detach(), roundings=FP64_SUMS)
    assert_close(stats.lse_sq, z.logsumexp(1).square().sum().detach(), roundings=FP64_SUMS)
    grads = [torch.autograd.grad(w, z, normal(tokens, top_k, seed=4))[0] for w in (weights, expected)]
    one = torch.ones_like(z)  # beside ones, since a difference of large terms may be nearly 0
    assert_close(torch.cat((grads[0], one)), torch.cat((grads[1], one)), roundings=FP64_SUMS)


def _layer_results(forward, x: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
    x, values = x.clone().requires_grad_(), {name: v.clone().requires_grad_() for name, v in values.items()}
    out, prob_sum, counts = forward(x, values)
    loss = (out * normal(*out.shape, seed=2, dtype=out.dtype)).sum() + prob_sum.square().sum()
    grads = torch.autograd.grad(loss, [x, *values.values()])
    named = {f"grad {name}": grad for name, grad in zip(["x", *values], grads, strict=True)}
    return {"out": out, "prob_sum": prob_sum, **named}, counts


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_layer_with_a_bias_matches_fp64(backend, gate):
    config, device = dataclasses.replace(BIASED, backend=backend, gate=gate), _device(backend)
    layer = MoELayer(config).to(device)
    bias = 2 * normal(8, seed=5, dtype=torch.float32)
    layer.router.select_bias.copy_(bias)
    x, values = normal(37, 24, seed=1, dtype=torch.float32), {n: v.float() for n, v in parameters(layer).items()}

    def on_layer(x, values):
        moved = {name: value.to(device) for name, value in values.items()}
        out, stats = torch.func.functional_call(layer, moved, (x.to(device),))
        return out.cpu(), stats.prob_sum.cpu(), stats.expert_counts.cpu()

    def on_reference(x, values):
        result = reference.moe(x, values | {"router.select_bias": bias}, config)
        return result.out, result.prob_sum, result.expert_counts

    actual, counts = _layer_results(on_layer, x, values)
    plain, _ = _layer_results(on_reference, x, values)
    exact, expected_counts = _layer_results(on_reference, x.double(), {n: v.double() for n, v in values.items()})
    assert counts.tolist() == expected_counts.tolist()
    for name, value in actual.items():
        assert_close(value, exact[name], plain[name], roundings=4, name=name)
    assert_budget_bites(exact["grad router.weight"], plain["grad router.weight"])
    # The bias matters: without it other experts are chosen.
    unbiased = reference.moe(x, values, config)
    assert (unbiased.expert_counts - counts).abs().sum() > 10


def test_the_bias_is_a_buffer_in_fp32_whatever_is_done_to_the_model():
    layer = MoELayer(BIASED)
    assert "router.select_bias" not in dict(layer.named_parameters())
    layer.router.select_bias += 1 / 3  # no number of bf16
    for convert in (
        lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.bfloat16(),
        lambda m: m.to("cpu", torch.float16), lambda m: m.type(torch.float16), lambda m: m.type(torch.float64),
        lambda m: m.share_memory(), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)),
    ):  # fmt: skip
        other = convert(copy.deepcopy(layer))
        bias = other.router.select_bias
        assert bias.dtype == torch.float32 and (bias == torch.tensor(1 / 3)).all()
        assert other.state_dict()["router.select_bias"].data_ptr() == bias.data_ptr()
    assert layer.double().w_up.dtype == torch.float64  # the others follow
    assert Transformer(BIASED_MODEL).blocks[1].moe.router.select_bias.dtype == torch.float32
    saved = Transformer(BIASED_MODEL).state_dict()
    assert [n for n in saved if n.endswith("select_bias")] == [f"blocks.{i}.moe.router.select_bias" for i in (0, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_state_that_is_assigned_leaves_the_bias_in_fp32(dtype):
    state = {name: value.to(dtype) for name, value in MoELayer(BIASED).state_dict().items()}
    state["router.select_bias"] += 0.5
    with torch.device("meta"):
        layer = MoELayer(BIASED)
    layer.load_state_dict(state, assign=True)
    assert layer.w_up.dtype == dtype and layer.router.select_bias.dtype == torch.float32
    assert (layer.router.select_bias == 0.5).all()
    layer.router.update_select_bias(torch.tensor([1] + [0] * 7), 1e-3)
    assert (layer.router.select_bias[1:] == torch.tensor(0.5) + 1e-3).all()


def test_the_bias_goes_to_the_device_of_the_rest():
    layer = MoELayer(BIASED).to("meta", torch.bfloat16)
    bias = layer.router.select_bias
    assert bias.is_meta and bias.dtype == torch.float32 and layer.w_up.dtype == torch.bfloat16
    assert not layer.to_empty(device="cpu").router.select_bias.is_meta


def test_an_error_while_converting_leaves_the_bias_whole():
    def fail(_tensor):
        raise RuntimeError("no memory")

    layer = MoELayer(BIASED)
    with pytest.raises(RuntimeError, match="no memory"):
        layer._apply(fail)
    assert layer.router.select_bias.dtype == torch.float32


def test_without_it_there_is_no_buffer():
    assert not [name for name in Transformer(MODEL).state_dict() if "select_bias" in name]
    assert Router(dataclasses.replace(BIASED, router_balance="loss")).select_bias is None


def test_it_starts_at_zero_also_from_meta():
    with torch.device("meta"):
        model = Transformer(BIASED_MODEL)
    model.to_empty(device="cpu")
    for block in model.blocks:
        assert block.moe.router.select_bias.dtype == torch.float32
        block.moe.router.select_bias.fill_(torch.nan)
    model.init_weights()
    assert all((block.moe.router.select_bias == 0).all() for block in model.blocks)
    layer = MoELayer(BIASED)
    layer.router.select_bias.fill_(torch.nan)
    layer.reset_parameters()
    assert (layer.router.select_bias == 0).all()


def test_the_update_moves_each_expert_by_the_rate_towards_the_mean():
    router = Router(dataclasses.replace(BIASED, num_experts=5))
    router.update_select_bias(torch.tensor([10, 10, 9, 11, 10], dtype=torch.int32), 0.25)
    assert router.select_bias.tolist() == [0, 0, 0.25, -0.25, 0]  # a load at the mean stays
    router.update_select_bias(torch.tensor([1, 0, 0, 0, 0], dtype=torch.int32), 0.5)
    assert router.select_bias.tolist() == [-0.5, 0.5, 0.75, 0.25, 0.5]
    router.select_bias.zero_()
    router.update_select_bias(torch.tensor([2**31 - 1, 0, 0, 0, 2**31 - 2], dtype=torch.int32), 1.0)  # sums in int64
    assert router.select_bias.tolist() == [-1, 1, 1, 1, -1]
    model = Transformer(BIASED_MODEL)
    model.update_select_bias(torch.tensor([[4, 0, 0, 0, 0], [1, 1, 1, 1, 1]]), 0.5)
    assert [b.moe.router.select_bias.tolist() for b in model.blocks] == [[-0.5, 0.5, 0.5, 0.5, 0.5], [0.0] * 5]


def test_updates_alone_balance_a_collapsed_layer():
    """Weights stay as they are; every token starts on experts 0 and 1."""
    layer = MoELayer(BIASED)
    with torch.no_grad():
        layer.router.weight.copy_(0.3 * normal(8, 24, dtype=torch.float32))
        layer.router.bias[:2] += 10
    x = normal(400, 24, seed=1, dtype=torch.float32)
    loads = []
    for _ in range(300):
        _, stats = layer(x)
        loads.append(stats.expert_counts)
        layer.router.update_select_bias(stats.expert_counts, 0.05)
    assert loads[0].tolist() == [400, 400] + [0] * 6
    assert loads[-1].min() > 80 and loads[-1].max() < 120  # 100 each is balanced


# ---- jitter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jitter_is_uniform_noise_around_one(dtype):
    x = torch.ones(4, 50, 60, dtype=dtype)
    noise = jitter(x, 0.1, KEY)
    assert noise.dtype == torch.float32 and 0.9 <= noise.min() < 0.901 and 1.099 < noise.max() <= 1.1
    # 12,000 draws of variance ε²/3, of their square ε⁴·4/45: five standard deviations.
    assert abs(noise.mean().item() - 1) < 5 * 0.1 / (3 * 12_000) ** 0.5
    assert abs(noise.var().item() - 0.01 / 3) < 5 * 0.01 * (4 / 45 / 12_000) ** 0.5
    assert noise.unique().numel() > 11_000  # of every element its own, in 16 bits too
    assert jitter(x.double(), 0.1, KEY).dtype == torch.float64


def test_jitter_is_a_function_of_its_key_and_of_nothing_else():
    x = normal(4, 5, 6, dtype=torch.float32)
    noise = jitter(x, 0.1, KEY)
    state = torch.get_rng_state()
    assert torch.equal(jitter(x, 0.1, KEY), noise) and torch.equal(torch.get_rng_state(), state)
    parts = [jitter(x[i : i + 2], 0.1, KEY._replace(sequence=70 + i)) for i in (0, 2)]  # another batch, another rank
    assert torch.equal(torch.cat(parts), noise)
    assert torch.equal(jitter(x[1], 0.1, KEY._replace(sequence=71)), noise[1])  # (T, D) is one sequence
    others = [noise[0] / x[0], noise[1] / x[1]]
    others += [jitter(x[:1], 0.1, KEY._replace(**{f: 4})).squeeze(0) / x[0] for f in ("seed", "layer", "sequence")]
    assert all((a - b).abs().max() > 0.02 for a, b in itertools.combinations(others, 2))
    for shape in ((0, 5, 6), (2, 0, 6), (6,)):
        assert jitter(torch.zeros(shape), 0.1, KEY).shape == shape


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_router_alone_sees_the_noise(backend):
    """Logits and gradients of the layer are those of a router with noise in front, experts with none."""
    device = _device(backend)
    layer = MoELayer(MoEConfig(24, 20, router_jitter=0.3, backend=backend)).to(device)
    values = {name: value.float() for name, value in parameters(layer).items()}
    layer.load_state_dict(values)
    x = normal(2, 9, 24, dtype=torch.float32).to(device).requires_grad_()
    factors = jitter(torch.ones(2, 9, 24, device=device), 0.3, KEY).reshape(18, 24).cpu()
    out, stats = layer(x, KEY)
    grad_out = normal(2, 9, 24, seed=2, dtype=torch.float32)
    loss = (out * grad_out.to(device)).sum() + stats.lse_sq
    results = [out.reshape(18, 24), *torch.autograd.grad(loss, [x, layer.router.weight])]
    results[1] = results[1].reshape(18, 24)
    expected = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.detach().cpu().reshape(18, 24).to(dtype).requires_grad_()
        wide = {n: v.to(dtype) for n, v in values.items()}
        weight = wide["router.weight"].requires_grad_()
        logits = (leaf * factors) @ weight.T + wide["router.bias"]
        idx, weights, gated = torch_backend.gate(logits, 2, GATES[0])
        rows = []
        for t, chosen in enumerate(idx.tolist()):
            hidden = [leaf[t] @ wide["w_up"][e] + wide["b_up"][e] for e in chosen]
            made = [reference.gated_activation(h, ACTIVATIONS["swiglu_oai"]) for h in hidden]
            ys = [a @ wide["w_down"][e] + wide["b_down"][e] for a, e in zip(made, chosen, strict=True)]
            rows.append(sum(w * y for w, y in zip(weights[t], ys, strict=True)))
        wanted = torch.stack(rows)
        loss = (wanted * grad_out.reshape(18, 24).to(dtype)).sum() + gated.lse_sq
        expected.append([wanted.detach(), *torch.autograd.grad(loss, [leaf, weight])])
    for actual, plain, exact in zip(results, *expected, strict=True):
        assert_close(actual.cpu(), exact, plain, roundings=8)
    assert torch.equal(layer(x)[1].lse_sq, layer(x)[1].lse_sq)
    assert not torch.equal(layer(x)[1].lse_sq, stats.lse_sq)  # without a key, as in evaluation, there is no noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7, 24), (7, 24), (0, 7, 24)])
def test_the_router_draws_its_noise_again_to_the_bit(shape, dtype):
    """Logits and gradients are those of the product with the noise, written out for autograd."""
    router = Router(dataclasses.replace(BIASED, router_jitter=0.3)).to(dtype)
    router.load_state_dict({n: v.to(dtype) for n, v in parameters(router).items()}, strict=False)
    x = normal(*shape, dtype=dtype).requires_grad_()
    results = []
    for logits in (router(x, KEY), router(jitter(x, 0.3, KEY).reshape(-1, 24))):
        grad = normal(*logits.shape, seed=3, dtype=logits.dtype)
        results.append([logits, *torch.autograd.grad(logits, [x, router.weight, router.bias], grad)])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


def test_noise_keeps_no_copy_of_the_input():
    """A layer saves the same bytes with noise as without."""
    kept = []
    for epsilon in (0.0, 0.3):
        layer = MoELayer(dataclasses.replace(BIASED, router_jitter=epsilon)).to(torch.bfloat16)
        x, storages = normal(2, 50, 24, dtype=torch.bfloat16).requires_grad_(), {}

        def save(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            out, _ = layer(x, KEY)
        assert len(storages) > 3 and out.requires_grad
        kept.append(sum(storages.values()))
    assert kept[0] == kept[1] > 0


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_sees_the_same_noise_and_bias(mode):
    tokens = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for chosen in ("none", mode):
        model = Transformer(BIASED_MODEL)
        model.update_select_bias(torch.tensor([[9, 0, 4, 1, 2]] * 2), 0.01)
        model.set_checkpointing(chosen)
        out = model(tokens, tokens, jitter=(7, 40))
        (out.loss + out.stats.lse_sq.sum()).backward()
        results.append([out.loss, *out.stats, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    model.zero_grad()
    model(tokens, tokens, jitter=(7, 42)).loss.backward()
    assert not torch.equal(model.blocks[0].moe.router.weight.grad, results[0][-1])


def test_a_compiled_layer_is_not_compiled_again_for_every_batch():
    torch._dynamo.reset()  # or what other tests compiled of the same code would count
    counter = CompileCounterWithBackend("aot_eager")
    layer = MoELayer(dataclasses.replace(BIASED, router_jitter=0.1))
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = normal(2, 9, 24, dtype=torch.float32)
    for sequence in (5, 90, 300, 1234):
        layer.router.update_select_bias(torch.arange(8), 0.01)
        key = KEY._replace(sequence=sequence)
        assert torch.equal(compiled(x, key)[0], layer(x, key)[0])
    assert counter.frame_count <= 2  # a number first, then any number


# ---- tiles, z-loss


@pytest.mark.parametrize("autotune", [False, True])
def test_autotune_reaches_the_kernels(autotune, monkeypatch):
    seen = []
    original = triton_backend.fused.expert_mlp

    def recorded(*arguments, **options):
        seen.append(options["autotune"])
        return original(*arguments, **options)

    monkeypatch.setattr(triton_backend.fused, "expert_mlp", recorded)
    x = normal(9, 24, dtype=torch.float32)
    for backend in ("triton", "torch"):
        device = _device(backend)
        layer = MoELayer(dataclasses.replace(BIASED, backend=backend, autotune=autotune)).to(device)
        assert layer(x.to(device))[0].isfinite().all()
    assert seen == [autotune]


@pytest.mark.parametrize("tied", [False, True])
def test_z_loss_of_the_output_logits(tied):
    config = dataclasses.replace(MODEL, tie_embeddings=tied)
    model = Transformer(config).double()
    tokens = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1).clone()
    targets[:, -1] = -1
    logits = model(tokens).logits.flatten(0, 1)
    cross_entropy = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
    z = (logits.logsumexp(-1).square() * (targets.flatten() >= 0)).sum()
    assert_close(model(tokens, targets).loss, cross_entropy.detach(), roundings=FP64_SUMS)
    loss = model(tokens, targets, z_coef=0.3).loss
    assert_close(loss, (cross_entropy + 0.3 * z).detach(), roundings=FP64_SUMS)
    names = ["embedding.weight", "blocks.0.moe.w_up"]
    weights = [model.get_parameter(name) for name in names]
    expected = torch.autograd.grad(cross_entropy + 0.3 * z, weights)
    for name, actual, wanted in zip(names, torch.autograd.grad(loss, weights), expected, strict=True):
        assert_close(actual, wanted, roundings=64 * FP64_SUMS, name=name)
