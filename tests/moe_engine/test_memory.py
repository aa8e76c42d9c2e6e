"""Counting memory under fake tensors: sums that can be done by hand, and the same code on real tensors."""

import gc

import pytest
import torch
from torch import nn

from moe_engine import Transformer, preset
from moe_engine.memory import ACTIVATIONS, GRADIENTS, GRAIN, WEIGHTS, WORKSPACE, Footprint, measuring, no_launches

MB = 1 << 20


def megabyte():
    return torch.empty(MB // 4)


def test_what_is_alive_is_counted_and_its_peak_kept():
    footprint = Footprint()
    with measuring(footprint):
        a = megabyte()
        b = a + 1
        view, same = b[10:], a.mul_(2)
        assert footprint.alive == {ACTIVATIONS: 2 * MB} and same is a
        footprint.phase = WORKSPACE
        c = a * b
        assert footprint.alive == {ACTIVATIONS: 2 * MB, WORKSPACE: MB}
        del c
        d = torch.empty(1)
        assert footprint.alive == {ACTIVATIONS: 2 * MB, WORKSPACE: GRAIN} and d.numel() == 1
        del a, same, b
        assert footprint.alive[ACTIVATIONS] == MB and view.numel()  # held by its view
        del view
        assert footprint.alive[ACTIVATIONS] == 0
    assert footprint.peak == {ACTIVATIONS: 2 * MB, WORKSPACE: MB} and footprint.at == "aten::mul.Tensor"


def test_a_mark_moves_bytes_and_a_resized_storage_counts_as_it_is():
    footprint = Footprint()
    with measuring(footprint):
        a = megabyte()
        footprint.mark({"a": [a, a[3:]]}, WEIGHTS)
        assert footprint.alive[WEIGHTS] == MB and footprint.alive[ACTIVATIONS] == 0
        a.untyped_storage().resize_(0)
        assert footprint.alive.total() == 0
        a.untyped_storage().resize_(2 * MB)
        assert footprint.alive[WEIGHTS] == 2 * MB


def test_a_linear_layer_by_hand():
    """x and the output in forward; grad of the output, of the weight, of x in backward."""
    rows, width = 1024, 256
    footprint = Footprint()
    with measuring(footprint):
        layer = nn.Linear(width, width, bias=False)
        footprint.mark(list(layer.parameters()), WEIGHTS)
        layer.weight.register_post_accumulate_grad_hook(lambda p: footprint.mark(p.grad, GRADIENTS))
        x = torch.empty(rows, width, requires_grad=True)
        out = layer(x)
        footprint.phase = WORKSPACE
        out.backward(torch.empty_like(out))
    block, square = 4 * rows * width, 4 * width * width
    # The gradient is one when backward hands it over, and was workspace at the peak, just before.
    assert footprint.peak == {WEIGHTS: square, ACTIVATIONS: 2 * block, WORKSPACE: 2 * block + square}
    assert footprint.alive[GRADIENTS] == square


def test_what_the_host_reads_is_made_up_and_constants_are_themselves():
    with measuring(Footprint()):
        x = torch.ones(3)
        assert float(x.sum()) == 0 and int(x.argmax()) == 0 and not bool(x[0] > 0)
        assert torch.tensor(2.5).item() == 2.5


def train(model, tokens, footprint):
    footprint.phase = ACTIVATIONS
    loss = model(tokens, tokens).loss
    footprint.phase = WORKSPACE
    loss.backward()


@pytest.mark.parametrize("mode", ["none", "selective", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fake_and_real_tensors_count_alike(mode, dtype):
    """The same two iterations on both: experts have rows as they are routed there, and evenly here."""
    config = preset("tiny", num_layers=2, backend="torch")
    peaks = {}
    threads = torch.get_num_threads()
    for kind in ("fake", "real"):
        with torch.device("meta"):
            model = Transformer(config).to(dtype)
        model.set_checkpointing(mode)
        footprint = Footprint()
        if kind == "fake":
            with measuring(footprint):
                model.to_empty(device="cpu")
                footprint.mark(list(model.parameters()), WEIGHTS)
                for _ in range(2):
                    train(model, torch.zeros(4, 128, dtype=torch.int64), footprint)
        else:
            model.to_empty(device="cpu")
            model.init_weights(0)
            gc.collect()
            torch.set_num_threads(1)
            try:
                with footprint:
                    footprint.mark(list(model.parameters()), WEIGHTS)
                    for _ in range(2):
                        train(model, torch.randint(0, 4096, (4, 128)), footprint)
            finally:
                torch.set_num_threads(threads)
        peaks[kind] = footprint.peak
    assert peaks["fake"].total() == pytest.approx(peaks["real"].total(), rel=0.02)
    assert peaks["fake"][WEIGHTS] == peaks["real"][WEIGHTS] > 0


def test_temporaries_of_the_kernels_are_seen():
    """By hand: backward of the experts has h, grad_h, scaled a, and the gradients of the weights at once."""
    pytest.importorskip("triton")
    config = preset("small", num_layers=1, vocab_size=64)
    tokens, footprint = 2048, Footprint()
    with no_launches("sm_80"):
        with torch.device("meta"):
            model = Transformer(preset("small", num_layers=1, vocab_size=64, backend="triton")).bfloat16()
        for block in model.blocks:
            block.moe.router.float()
        with measuring(footprint):
            model.to_empty(device="cpu")
            footprint.mark(list(model.parameters()), WEIGHTS)
            train(model, torch.zeros(1, tokens, dtype=torch.int64), footprint)
    rows = 2 * tokens * config.top_k * config.d_ff  # bytes of (N, F) in bf16
    weights = 2 * 3 * config.num_experts * config.d_model * config.d_ff
    assert footprint.peak[WORKSPACE] > 2 * rows + weights / 3  # grad_h, and at least one of the weights' gradients
    assert footprint.peak[WORKSPACE] < 4 * rows + 2 * weights


def test_kernels_are_launched_again_afterwards():
    pytest.importorskip("triton")
    from moe_engine.kernels import launch

    before = launch.target()
    with no_launches("sm_90"):
        assert launch.target() == "sm_90"
    assert launch.target() == before
