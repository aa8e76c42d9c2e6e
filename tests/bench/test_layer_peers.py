"""Every peer of the layer computes what the layer does, gradients included; libraries that need a GPU as stand-ins."""

import sys
from dataclasses import dataclass, field, replace
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_engine import MoEConfig, MoELayer
from moe_engine.bench import layer_peers, plain_moe
from moe_engine.bench.layer_check import by_reference, make_truth, what_is_wrong
from moe_engine.bench.layer_peers import PEERS, STYLES
from moe_engine.bench.layer_steps import Inputs, Step
from moe_engine.testing import normal, parameters, relative_error

BY_NAME = {peer.name: peer for peer in PEERS}
HERE = [peer for peer in PEERS if not peer.gpu_only]
LIBRARIES = [peer for peer in PEERS if peer.gpu_only]


def made(style, dtype, experts=5, top_k=3, **changes):
    layer = MoELayer(MoEConfig(32, 24, experts, top_k, **STYLES[style] | changes)).to(dtype)
    layer.load_state_dict(parameters(layer))
    x, grad_out = (normal(1, 40, 32, seed=seed, dtype=dtype) for seed in (1, 2))
    return layer, Inputs(x, grad_out, torch.arange(40))


# An expert without rows, one expert a token (the router then has no gradient), one expert of all.
@pytest.mark.parametrize("sizes", [(5, 3), (16, 1), (1, 1)], ids=["3 of 5", "1 of 16", "1 of 1"])
@pytest.mark.parametrize("peer", HERE, ids=lambda peer: peer.name)
def test_a_peer_is_the_layer(peer, sizes):
    if peer.package:
        pytest.importorskip(peer.package, minversion="5.0")
    layer, inputs = made(peer.style, torch.float32, *sizes)
    assert peer.missing() == "" and peer.supports(layer.config, torch.float32) == ""
    step = Step(peer.make(layer), inputs, peer.ours)
    truth = make_truth(layer, inputs)
    assert what_is_wrong(step.results(), truth) == ""
    with torch.no_grad():  # the peer's weights are its own
        for value in layer.parameters():
            value.zero_()
    assert what_is_wrong(step.results(), truth) == ""


@pytest.mark.parametrize("peer", HERE, ids=lambda peer: peer.name)
def test_a_peer_has_the_dtype_of_the_layer(peer):
    if peer.package:
        pytest.importorskip(peer.package, minversion="5.0")
    layer, inputs = made(peer.style, torch.bfloat16)
    results = Step(peer.make(layer), inputs, peer.ours).results()
    assert {value.dtype for value in results.values()} == {torch.bfloat16}
    assert {name: value.shape for name, value in results.items()} == {
        name: value.shape for name, value in by_reference(layer, inputs, torch.float64).items()
    }


@pytest.mark.parametrize("style", STYLES)
def test_the_loop_in_fp64_and_a_fault(style, monkeypatch):
    layer, inputs = made(style, torch.float64)
    truth, peer = make_truth(layer, inputs), BY_NAME[f"expert loop, {style}"]
    results = Step(peer.make(layer), inputs, peer.ours).results()
    assert all(relative_error(results[name], value).typical < 1e-14 for name, value in truth.exact.items())
    monkeypatch.setattr(plain_moe, "halves", lambda w: torch.cat((w[..., 1::2], w[..., 0::2]), -1))
    assert what_is_wrong(Step(peer.make(layer), inputs, peer.ours).results(), truth).startswith("out: ")


# Stand-ins: signatures, names and layouts as in the libraries, in plain torch.


def _experts(x, gate, up, down, weights, chosen):
    """Rows `(T, D)`; gate and up `(E, F, D)`; down `(E, D, F)`; weights and chosen `(T, K)`."""
    a = F.silu(torch.einsum("td,efd->tef", x, gate)) * torch.einsum("td,efd->tef", x, up)
    y = torch.einsum("tef,edf->ted", a, down)
    share = torch.zeros(x.shape[0], gate.shape[0], dtype=x.dtype).scatter(1, chosen.long(), weights)
    return torch.einsum("te,ted->td", share, y)


def _empty(*shape):
    return nn.Parameter(torch.empty(shape))


class GLUMLP(nn.Module):  # scattermoe.mlp
    def __init__(self, input_size, hidden_size, num_experts, top_k, bias=False, activation=None):
        super().__init__()
        self.experts, self.output_experts = nn.Module(), nn.Module()
        self.experts.weight = _empty(num_experts, 2 * hidden_size, input_size)
        self.output_experts.weight = _empty(num_experts, input_size, hidden_size)

    def forward(self, x, expert_p, expert_idxs):
        assert expert_p.dtype == x.dtype
        up, gate = self.experts.weight.chunk(2, 1)
        return _experts(x, gate, up, self.output_experts.weight, expert_p, expert_idxs)


@dataclass
class Arguments:  # megablocks.layers.arguments: its defaults where they differ from what we need
    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    bias: bool = True
    return_bias: bool = True
    activation_fn: Any = F.gelu
    moe_num_experts: int = 1
    moe_top_k: int = 1
    moe_normalize_expert_weights: float | None = None
    moe_loss_weight: float = 0.1
    mlp_type: str = "mlp"
    mlp_impl: str = "grouped"
    fp16: bool = True
    bf16: bool = False
    device: Any = field(default_factory=torch.cuda.current_device)


class DMoE(nn.Module):  # megablocks.layers.dmoe.dMoE
    def __init__(self, args):
        super().__init__()
        assert (args.mlp_type, args.bias, args.return_bias, args.moe_loss_weight) == ("glu", False, False, 0)
        self.args, self.router, self.experts = args, nn.Module(), nn.Module()
        self.router.layer = nn.Linear(args.hidden_size, args.moe_num_experts, bias=False, device=args.device)
        self.experts.mlp = nn.Module()
        for name in ("w1", "v1", "w2"):
            setattr(self.experts.mlp, name, _empty(args.moe_num_experts * args.ffn_hidden_size, args.hidden_size))

    def forward(self, x):
        rows, args, mlp = x.view(-1, x.shape[-1]), self.args, self.experts.mlp
        weights, chosen = self.router.layer(rows).softmax(-1).topk(args.moe_top_k)
        weights = weights / weights.norm(p=args.moe_normalize_expert_weights, dim=-1, keepdim=True)
        gate, up, down = (w.view(args.moe_num_experts, -1, args.hidden_size) for w in (mlp.w1, mlp.v1, mlp.w2))
        return _experts(rows, gate, up, down.transpose(1, 2), weights, chosen).view(x.shape)


class ActivationType(Enum):  # sonicmoe.enums
    SWIGLU = "swiglu"
    GEGLU = "geglu"


class SonicMoE(nn.Module):  # sonicmoe.MoE
    def __init__(
        self, num_experts, num_experts_per_tok, hidden_size, intermediate_size, activation_function, add_bias, std
    ):
        super().__init__()
        assert activation_function is ActivationType.SWIGLU and not add_bias
        self.top_k = num_experts_per_tok
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.c_fc, self.c_proj = nn.Module(), nn.Module()
        self.c_fc.weight = _empty(num_experts, 2 * intermediate_size, hidden_size)
        self.c_proj.weight = _empty(num_experts, hidden_size, intermediate_size)

    def forward(self, hidden_states):
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        logits, chosen = self.router(rows).topk(self.top_k)
        w = self.c_fc.weight
        out = _experts(rows, w[:, 0::2], w[:, 1::2], self.c_proj.weight, logits.softmax(-1), chosen)
        return out.view(hidden_states.shape), logits.sum()


def _liger(x, gate_up_proj, down_proj, top_k_index, top_k_weights):  # LigerFusedMoEFunction.apply
    assert top_k_index.dtype == torch.int32 and gate_up_proj.is_contiguous()
    return _experts(x, *gate_up_proj.chunk(2, 1), down_proj, top_k_weights, top_k_index)


STAND_INS = {
    "scattermoe.mlp": {"GLUMLP": GLUMLP},
    "megablocks.layers.arguments": {"Arguments": Arguments},
    "megablocks.layers.dmoe": {"dMoE": DMoE},
    "sonicmoe": {"MoE": SonicMoE},
    "sonicmoe.enums": {"ActivationType": ActivationType},
    "liger_kernel.ops": {"LigerFusedMoEFunction": SimpleNamespace(apply=_liger)},
}


@pytest.fixture
def stand_ins(monkeypatch):
    for path, contents in STAND_INS.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if not isinstance(sys.modules.get(name), ModuleType) or not hasattr(sys.modules[name], "stand_in"):
                module = ModuleType(name)
                module.stand_in, module.__path__ = True, []
                monkeypatch.setitem(sys.modules, name, module)
        vars(sys.modules[path]).update(contents)


@pytest.mark.parametrize("peer", LIBRARIES, ids=lambda peer: peer.name)
def test_weights_and_gradients_of_a_library_are_ours(peer, stand_ins):
    layer, inputs = made(peer.style, torch.float64)
    assert peer.missing() == ""
    truth = make_truth(layer, inputs)
    results = Step(peer.make(layer), inputs, peer.ours).results()
    assert what_is_wrong(results, truth) == ""
    assert all(relative_error(results[name], value).typical < 1e-13 for name, value in truth.exact.items())


@pytest.mark.parametrize("peer", LIBRARIES, ids=lambda peer: peer.name)
def test_a_library_that_is_not_there(peer, monkeypatch):
    monkeypatch.setitem(sys.modules, peer.package, None)  # import fails
    assert "not installed" in peer.missing() and peer.install in peer.missing()
    with pytest.raises(ImportError):
        peer.make(made(peer.style, torch.float32)[0])


def test_the_table():
    assert len(BY_NAME) == len(PEERS) == 14
    for peer in PEERS:
        assert peer.style in STYLES and bool(peer.package) == bool(peer.install)
    assert {peer.name for peer in PEERS if peer.extra_bytes(1, MoEConfig(8, 8), 2)} == {
        "transformers Mixtral, batched_mm",
        "transformers gpt-oss, batched_mm",
    }
    # Measured: 4.1 N·D·F values, by the resident memory of a process at T 256, D 256, F 256, E 8, K 2 in fp32.
    batched = BY_NAME["transformers Mixtral, batched_mm"]
    assert batched.extra_bytes(2048, MoEConfig(512, 1024, 8, 2), 4) == 4 * 2048 * 2 * 512 * 1024 * 4


CONFIG = MoEConfig(32, 24, 5, 3, **STYLES["mixtral"])


@pytest.mark.parametrize(
    ("name", "changes", "dtype", "reason"),
    [
        ("expert loop, mixtral", {}, torch.float64, ""),
        ("expert loop, mixtral", {"gate": "softmax_then_topk"}, torch.float32, "expected gate softmax_over_topk, got"),
        ("expert loop, mixtral", {"router_balance": "bias"}, torch.float32, "expected router_balance loss, got bias"),
        ("expert loop, mixtral", {"expert_bias": True}, torch.float32, "expected expert_bias False, got True"),
        ("expert loop, gpt-oss", {}, torch.float32, "expected activation swiglu_oai, got swiglu"),
        ("torch grouped_mm, mixtral", {}, torch.float16, ""),
        ("torch grouped_mm, mixtral", {}, torch.float64, "expected float32 or bfloat16 or float16, got torch.float64"),
        ("torch grouped_mm, mixtral", {"d_ff": 26}, torch.float32, "expected d_ff a multiple of 4, got 26"),
        ("transformers Mixtral, grouped_mm", {"d_model": 36}, torch.bfloat16, "expected d_model a multiple of 8"),
        ("transformers Mixtral, eager", {"d_model": 36, "d_ff": 26}, torch.bfloat16, ""),
        ("ScatterMoE", {"d_ff": 26}, torch.float16, ""),
        ("ScatterMoE", {}, torch.float32, "expected bfloat16 or float16, got torch.float32: its kernels round"),
        ("MegaBlocks", {"d_ff": 32}, torch.bfloat16, ""),
        ("MegaBlocks", {}, torch.bfloat16, "expected num_experts·d_ff of at least 128, got 120"),
        ("MegaBlocks", {"d_ff": 32}, torch.float16, "expected bfloat16, got torch.float16"),
        ("SonicMoE", {"d_ff": 28}, torch.float16, "expected d_ff a multiple of 8, got 28"),
        ("Liger fused MoE", {}, torch.float32, "expected bfloat16 or float16"),
    ],
)
def test_what_a_peer_cannot_do_has_a_reason(name, changes, dtype, reason):
    if name.startswith("transformers"):
        pytest.importorskip("transformers", minversion="5.0")
    found = BY_NAME[name].supports(replace(CONFIG, **changes), dtype)
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_releases_without_the_feature(monkeypatch):
    monkeypatch.setattr(plain_moe, "grouped_mm", None)
    assert "has no grouped_mm" in BY_NAME["torch grouped_mm, mixtral"].supports(CONFIG, torch.float32)
    pytest.importorskip("transformers", minversion="5.0")
    peers = [peer for peer in PEERS if peer.package == "transformers" and peer.style == "mixtral"]
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", ModuleType("moe"))  # 4.57 has none
    for peer in peers:
        assert "expected transformers with experts_implementation" in peer.supports(CONFIG, torch.float32)
    monkeypatch.setattr(layer_peers.importlib.util, "find_spec", lambda name: None)
    assert peers[0].supports(CONFIG, torch.float32) == ""
