"""The decoder against the reference in fp64, the reference against transformers, and initialisation."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_engine import ModelConfig, Transformer, preset, reference
from moe_engine.attention import KVCache
from moe_engine.model import RMSNorm
from moe_engine.router import balance_loss, z_loss
from moe_engine.testing import FP64_SUMS, assert_budget_bites, assert_close, normal, parameters

GPT_OSS = ModelConfig(
    vocab_size=61,
    num_layers=3,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_ff=24,
    num_experts=5,
    sliding_window=8,
)
MIXTRAL = dataclasses.replace(
    GPT_OSS,
    attention_bias=False,
    attention_sinks=False,
    sliding_window=0,
    rope_factor=1.0,
    activation="swiglu",
    expert_bias=False,
    router_bias=False,
)
CONFIGS = [
    pytest.param(GPT_OSS, id="gpt-oss"),
    pytest.param(dataclasses.replace(GPT_OSS, tie_embeddings=True), id="gpt-oss, tied: one weight, two gradients"),
    pytest.param(MIXTRAL, id="Mixtral"),
    pytest.param(
        dataclasses.replace(MIXTRAL, gate="softmax_then_topk", top_k=4, num_layers=1), id="OLMoE gate, top-4, one layer"
    ),
]
BALANCE, Z = 0.7, 0.01
SUMS = 16 * FP64_SUMS  # three layers deep


def _values(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = Transformer(config)
    return parameters(model, seed=1)


def _model(config: ModelConfig, values: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device="cpu").to(dtype)
    model.load_state_dict(values)
    return model


def _text(batch: int, length: int, vocab: int = 61, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens, and targets some of which do not count."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(vocab, (batch, length + 1), generator=generator)
    targets = text[:, 1:].clone()
    targets[:, 3::7] = -1
    return text[:, :-1], targets


def _reference_loss(tokens, targets, values, config) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss with auxiliary losses from their definitions, logits, and the hidden states after each block."""
    results = [reference.model(row, values, config) for row in tokens]
    logits = torch.stack([result.logits for result in results])
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    for layer in range(config.num_layers):
        routing = [result.moe[layer] for result in results]
        rows, experts = tokens.numel(), config.num_experts
        prob_sum = sum(r.prob_sum for r in routing)
        share = sum(r.expert_counts for r in routing).to(prob_sum.dtype) / (rows * config.top_k)
        loss = loss + BALANCE * experts * (share * prob_sum / rows).sum()
        loss = loss + Z * sum(r.lse_sq for r in routing) / rows
    return loss, logits, [torch.stack(hidden) for hidden in zip(*(r.hidden for r in results), strict=True)]


def _model_loss(model, tokens, targets) -> Tensor:
    out = model(tokens, targets)
    auxiliary = BALANCE * balance_loss(out.stats, model.config.top_k) + Z * z_loss(out.stats, model.config.top_k)
    return out.loss / (targets >= 0).sum() + auxiliary.sum()


@pytest.mark.parametrize("config", CONFIGS)
def test_parity_with_the_reference_in_fp64(config):
    """Hidden activations after every block, logits, loss with auxiliary losses, and every gradient."""
    values = _values(config)
    model = _model(config, values)
    tokens, targets = _text(2, 21)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    loss_expected, logits_expected, hidden_expected = _reference_loss(tokens, targets, leaves, config)
    grads_expected = torch.autograd.grad(loss_expected, list(leaves.values()))

    hidden = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: hidden.append(out[0])) for block in model.blocks]
    logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    assert len(hidden) == config.num_layers
    for layer, (actual, expected) in enumerate(zip(hidden, hidden_expected, strict=True)):
        assert_close(actual.detach(), expected.detach(), roundings=SUMS, name=f"hidden {layer}")
    assert_close(logits.detach(), logits_expected.detach(), roundings=SUMS, name="logits")

    loss = _model_loss(model, tokens, targets)
    loss.backward()
    assert_close(loss.detach(), loss_expected.detach(), roundings=SUMS, name="loss")
    named = dict(model.named_parameters())
    assert named.keys() == leaves.keys()
    for name, expected in zip(leaves, grads_expected, strict=True):
        assert expected.any(), f"{name} has no part in the loss"
        assert_close(named[name].grad, expected, roundings=SUMS, name=f"grad {name}")


def test_parity_in_fp32():
    values = {name: value.float() for name, value in _values(GPT_OSS).items()}
    tokens, targets = _text(2, 21)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
        loss, logits, _ = _reference_loss(tokens, targets, leaves, GPT_OSS)
        results.append((logits.detach(), *torch.autograd.grad(loss, list(leaves.values()))))
    model = _model(GPT_OSS, values, torch.float32)
    logits = model(tokens).logits.detach()
    grads = torch.autograd.grad(_model_loss(model, tokens, targets), list(model.parameters()))
    for name, actual, plain, exact in zip(["logits", *values], (logits, *grads), *results, strict=True):
        assert_close(actual, exact, plain, roundings=16, name=name)
    assert_budget_bites(results[1][0], results[0][0])


def test_bf16_runs_and_is_as_far_from_fp64_as_16_bits_are():
    # Routing may differ where two experts are nearly equal, so tokens are not held one by one: the loss is.
    values = {name: value.bfloat16() for name, value in _values(GPT_OSS).items()}
    tokens, targets = _text(4, 64)
    model = _model(GPT_OSS, values, torch.bfloat16)
    out = model(tokens, targets)
    assert out.loss.dtype == out.stats.prob_sum.dtype == torch.float32
    assert model(tokens).logits.dtype == torch.bfloat16
    wide = _model(GPT_OSS, {name: value.double() for name, value in values.items()})
    assert_close(out.loss.bfloat16().detach(), wide(tokens, targets).loss.detach(), roundings=4)
    out.loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


# ---- against transformers: would catch a misunderstanding that model and reference share


def _attention_to_transformers(values: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """What gpt-oss and Mixtral have in common, under transformers' names."""
    theirs = {
        "model.embed_tokens.weight": values["embedding.weight"],
        "model.norm.weight": values["head.norm.weight"],
        "lm_head.weight": values["head.weight"],
    }
    sizes = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    for i in range(config.num_layers):
        ours, prefix = f"blocks.{i}.", f"model.layers.{i}."
        theirs[f"{prefix}input_layernorm.weight"] = values[f"{ours}attention_norm.weight"]
        theirs[f"{prefix}post_attention_layernorm.weight"] = values[f"{ours}moe_norm.weight"]
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            parts = values[f"{ours}attention.qkv.{kind}"].split(sizes)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                theirs[f"{prefix}self_attn.{name}.{kind}"] = part
            theirs[f"{prefix}self_attn.o_proj.{kind}"] = values[f"{ours}attention.out.{kind}"]
    return theirs


def _to_gpt_oss(values: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    theirs = _attention_to_transformers(values, config)
    names = {
        "attention.sinks": "self_attn.sinks",
        "moe.router.weight": "mlp.router.weight",
        "moe.router.bias": "mlp.router.bias",
        "moe.w_up": "mlp.experts.gate_up_proj",  # the very layout: gate and up columns interleaved
        "moe.b_up": "mlp.experts.gate_up_proj_bias",
        "moe.w_down": "mlp.experts.down_proj",
        "moe.b_down": "mlp.experts.down_proj_bias",
    }
    for i in range(config.num_layers):
        theirs |= {f"model.layers.{i}.{their}": values[f"blocks.{i}.{our}"] for our, their in names.items()}
    return theirs


def _to_mixtral(values: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    theirs = _attention_to_transformers(values, config)
    for i in range(config.num_layers):
        ours, prefix = f"blocks.{i}.moe.", f"model.layers.{i}.mlp."
        up = values[f"{ours}w_up"]
        theirs[f"{prefix}gate.weight"] = values[f"{ours}router.weight"]
        # (E, D, 2F) with gate and up interleaved → (E, 2F, D), all gates and then all ups
        theirs[f"{prefix}experts.gate_up_proj"] = torch.cat((up[..., 0::2], up[..., 1::2]), -1).mT.contiguous()
        theirs[f"{prefix}experts.down_proj"] = values[f"{ours}w_down"].mT.contiguous()
    return theirs


def _transformers_config(config: ModelConfig) -> dict:
    return {
        "num_hidden_layers": config.num_layers,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "sliding_window": config.sliding_window or None,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }


def _hold_against(theirs, our_config: ModelConfig, values: dict[str, Tensor], rename) -> None:
    """transformers, our model and our reference, logits of a text longer than the window and the loss's gradients."""
    theirs = theirs.float()
    missing = theirs.load_state_dict(rename(values, our_config), strict=True)
    assert not missing.missing_keys and not missing.unexpected_keys
    tokens, targets = _text(2, 50)
    ours = _model(our_config, values, torch.float32)
    wide = {name: value.double().requires_grad_() for name, value in values.items()}
    exact = torch.stack([reference.model(row, wide, our_config).logits for row in tokens])

    def loss(logits):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    their_logits = theirs(tokens).logits
    # In fp32 their rotary angles and norms round too: a hundred roundings, where a misunderstanding would cost 1e5.
    assert_close(their_logits.detach(), exact.detach(), roundings=100, name="transformers' logits")
    logits = ours(tokens).logits.detach()
    assert_close(logits, exact.detach(), their_logits.detach(), roundings=16, name="logits")
    assert_budget_bites(exact.detach(), their_logits.detach())

    loss(their_logits).backward()
    (ours(tokens, targets).loss / (targets >= 0).sum()).backward()
    exact_grads = dict(zip(wide, torch.autograd.grad(loss(exact), list(wide.values())), strict=True))
    our_grads = {name: p.grad for name, p in ours.named_parameters()}
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, exact_grad in rename(exact_grads, our_config).items():
        assert_close(their_grads[name], exact_grad, roundings=200, name=f"transformers' grad {name}")
        ours_renamed = rename(our_grads, our_config)[name]
        assert_close(ours_renamed, exact_grad, their_grads[name], roundings=32, name=f"grad {name}")


def test_gpt_oss_of_transformers():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = dataclasses.replace(GPT_OSS, sliding_window=16)
    values = {name: value.float() for name, value in _values(config).items()}
    for name in values:
        if name.endswith("w_up"):
            values[name] *= 4  # 4 % of the gates and 7 % of the ups lie beyond the limit of 7
    # The rotary embedding's numbers are their defaults: YaRN 32, beta 32 and 1, context 4096, theta 150,000.
    theirs = transformers.GptOssForCausalLM(transformers.GptOssConfig(**_transformers_config(config)))
    _hold_against(theirs, config, values, _to_gpt_oss)


def test_mixtral_of_transformers():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = dataclasses.replace(MIXTRAL, rope_theta=1e6)  # theta is their default
    values = {name: value.float() for name, value in _values(config).items()}
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(**_transformers_config(config)))
    _hold_against(theirs, config, values, _to_mixtral)


# ---- the norm


def _norm(dtype: torch.dtype, width: int = 96) -> tuple[RMSNorm, Tensor, Tensor]:
    """A norm, its input and a gradient of its output."""
    norm = RMSNorm(width, 1e-5).to(dtype)
    norm.load_state_dict({"weight": (1 + 0.3 * normal(width)).to(dtype)})
    return norm, normal(50, width, seed=1, dtype=dtype).requires_grad_(), normal(50, width, seed=2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_norm_is_rounded_once(dtype):
    """To the bit what fp64 rounds to, but for the few values that lie nearly between two of the dtype's."""
    norm, x, _ = _norm(dtype)
    exact = F.rms_norm(x.double(), (96,), norm.weight.double(), 1e-5)
    out = norm(x)
    assert out.dtype == dtype
    assert (out != exact.to(dtype)).float().mean() < 0.01  # rounded twice: 0.3
    assert_close(out, exact, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_the_norm_has_the_same_gradients_compiled(dtype):
    norm, x, grad_out = _norm(dtype)
    eager = torch.autograd.grad(norm(x), [x, norm.weight], grad_out)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    traced = torch.autograd.grad(compiled(x), [x, norm.weight], grad_out)
    leaves = [t.detach().double().requires_grad_() for t in (x, norm.weight)]
    exact = torch.autograd.grad(F.rms_norm(leaves[0], (96,), leaves[1], 1e-5), leaves, grad_out.double())
    for grads in (eager, traced):
        for actual, wanted in zip(grads, exact, strict=True):
            assert_close(actual, wanted, roundings=FP64_SUMS if dtype == torch.float64 else 8)


def test_a_gradient_of_the_norms_gradient_is_refused():
    norm, x, _ = _norm(torch.float64)
    with pytest.raises(RuntimeError, match="RMSNorm is differentiable once: create_graph=True"):
        torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"create_graph|double backward"):
        (grad,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
        torch.autograd.grad(grad.sum(), x)


# ---- the model as a module


def test_loss_and_logits_are_of_the_same_model():
    model, (tokens, targets) = Transformer(GPT_OSS).double(), _text(2, 30)
    out, with_targets = model(tokens), model(tokens, targets)
    assert out.loss is None and with_targets.logits is None
    expected = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    assert_close(with_targets.loss.detach(), expected.detach(), roundings=FP64_SUMS)
    assert out.stats.expert_counts.shape == (3, 5) and out.stats.entropy.shape == (3,)
    assert (out.stats.expert_counts.sum(1) == 2 * 60).all()
    assert all(torch.equal(a, b) for a, b in zip(out.stats, with_targets.stats, strict=True))


def test_masked_targets_have_no_influence():
    model, (tokens, targets) = Transformer(GPT_OSS).double(), _text(2, 30)
    counted = F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.clamp(min=0).flatten(), reduction="none")
    assert_close(
        model(tokens, targets).loss.detach(), (counted * (targets.flatten() >= 0)).sum().detach(), roundings=99
    )
    nothing = model(tokens, torch.full_like(targets, -1))
    nothing.loss.backward()
    assert nothing.loss == 0 and not any(p.grad.any() for p in model.parameters())


def test_loss_at_initialisation_is_that_of_a_uniform_guess():
    tokens, targets = _text(4, 100)
    loss = Transformer(GPT_OSS)(tokens, targets).loss / (targets >= 0).sum()
    assert loss.item() == pytest.approx(math.log(61), rel=0.02)


def test_shapes_without_data():
    with torch.device("meta"):
        model = Transformer(preset("8b", num_layers=2)).to(torch.bfloat16)
        tokens = torch.zeros(2, 300, dtype=torch.int64)
        assert model(tokens).logits.shape == (2, 300, 201_088)
        out = model(tokens, tokens)
        (out.loss + balance_loss(out.stats, 2).sum()).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("steps", [(40,), (1,) * 40, (17, 1, 22)], ids=["whole", "token by token", "in pieces"])
def test_cached_logits_in_fp64(steps):
    """Through a window of 8 and past it, whole, token by token and in pieces."""
    model, (tokens, _) = _model(GPT_OSS, _values(GPT_OSS)), _text(2, 40)
    cache, pieces = KVCache(GPT_OSS, 2, 40, torch.float64, "cpu"), []
    with torch.no_grad():
        for piece in tokens.split(steps, dim=1):
            pieces.append(model(piece, cache=cache).logits)
        assert cache.length == 40
        assert_close(torch.cat(pieces, 1), model(tokens).logits, roundings=SUMS)


def test_model_compiles_to_one_graph():
    model, (tokens, targets) = Transformer(GPT_OSS), _text(2, 30)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        loss = run(tokens, targets).loss
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
