"""`moe-bench traffic`: the kernels keep to the floor, and the count sees whatever moves more."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from moe_engine.bench import traffic as bench
from moe_engine.bench.__main__ import main
from moe_engine.bench.shapes import LayerShape

pytest.importorskip("triton")
from moe_engine.kernels import expert_mlp
from moe_engine.kernels.launch import INTERPRETED
from moe_engine.simulator import Access, Launch

in_this_process = pytest.mark.skipif(not INTERPRETED, reason="patches kernels in the interpreter's process")

# Without biases the floor is met exactly at any size whose rows are whole sectors, so that a little more shows.
SMALL = ["--tokens", "64", "--d_model", "32", "--d_ff", "48", "--experts", "4", "--bias", "false"]


def test_the_layer_keeps_to_the_floor(tmp_path, capfd):
    output = tmp_path / "rows.jsonl"
    assert main(["traffic", "--output", str(output)]) == 0
    text = capfd.readouterr().out
    assert "T 256, D 128, F 128, E 8, K 2, bf16, save = h" in text and "no rule is broken" in text
    assert "launches: 6 forward + 7 backward = 13: " in text and "2× _grouped_gemm_kernel" in text
    row = json.loads(output.read_text())
    t, d, f, e, k = 256, 128, 128, 8, 2
    floor = {
        "forward": 4 * t * d + 4 * t * k * d + 8 * t * k * f + 6 * e * d * f,
        "backward": 8 * t * d + 4 * t * k * d + 20 * t * k * f + 12 * e * d * f,
    }
    assert row["floor"] == floor
    for phase, least in floor.items():
        assert 1 <= row["bytes"][phase] / least <= 1.05
        counted = [n["read"] + n["written"] for n in row["launches"] if n["phase"] == phase]
        assert sum(counted) == row["bytes"][phase]
    # Indices and statistics are small beside it, and it is not for want of counting that there is little.
    assert 0 < sum(n["apart"] for n in row["launches"]) < 0.03 * sum(floor.values())
    assert row["versions"]["triton"] and "interpreter" in row["device"]


@pytest.mark.parametrize(
    "options",
    [
        ["--save", "x"],
        ["--dtype", "fp32", "--activation", "swiglu"],
        ["--dtype", "fp16", "--tokens", "65", "--d_ff", "80", "--experts", "5", "--top_k", "3"],  # ragged tiles
    ],
)
def test_so_it_does_in_other_modes_and_dtypes(options, capfd):
    assert main(["traffic", *SMALL, *options]) == 0
    assert capfd.readouterr().out.count("ratio 1.000") == 2


@pytest.mark.slow
@pytest.mark.parametrize("bias", ["true", "false"])
@pytest.mark.parametrize("save", ["h", "x"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_mode_and_dtype_keeps_to_the_floor(dtype, save, bias, capfd):
    assert main(["traffic", "--dtype", dtype, "--save", save, "--bias", bias]) == 0, capfd.readouterr().out


def test_without_the_interpreter_it_starts_a_process_that_has_it():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "moe_engine.bench", "traffic", *SMALL]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("ratio 1.000") == 2


# -- what is wasteful or wrong is caught --


@in_this_process
def test_a_second_pass_over_the_rows_is_caught(monkeypatch, capfd):
    honest = expert_mlp.combine_rows

    def twice(*arguments):
        honest(*arguments)
        return honest(*arguments)

    monkeypatch.setattr(expert_mlp, "combine_rows", twice)
    assert main(["traffic", *SMALL]) == 1
    broken = capfd.readouterr().out.split("broken rules:")[1]
    assert "forward: 1." in broken and "of the floor, at most 1.05 is allowed" in broken
    assert "wrong result" not in broken


@in_this_process
def test_a_copy_in_between_is_caught(monkeypatch, capfd):
    from moe_engine.kernels.permutation import permute

    honest = expert_mlp.up_forward

    def copying(x, w_up, b_up, permutation, *rest):
        # Rows copied into expert order first, as most implementations do.
        inverse = torch.empty_like(permutation)
        inverse[permutation.long()] = torch.arange(len(permutation), dtype=torch.int32)
        permute(x.detach(), permutation, inverse)
        return honest(x, w_up, b_up, permutation, *rest)

    monkeypatch.setattr(expert_mlp, "up_forward", copying)
    assert main(["traffic", *SMALL]) == 1
    assert "forward: 1." in capfd.readouterr().out.split("broken rules:")[1]


@in_this_process
def test_too_many_launches_are_caught(monkeypatch, capfd):
    monkeypatch.setattr(bench, "MOST_LAUNCHES", 11)
    assert main(["traffic", *SMALL]) == 1
    assert "12 launches, at most 11 are allowed" in capfd.readouterr().out.split("broken rules:")[1]


@in_this_process
def test_a_wrong_result_is_caught(monkeypatch, capfd):
    honest = expert_mlp.combine_rows

    def off_by_a_factor(*arguments):
        out, sums = honest(*arguments)
        return 1.1 * out, sums

    monkeypatch.setattr(expert_mlp, "combine_rows", off_by_a_factor)
    assert main(["traffic", *SMALL]) == 1
    broken = capfd.readouterr().out.split("broken rules:")[1]
    assert "wrong result, out: " in broken and "wrong result, grad of x: " in broken and "grad of w_up" not in broken


@in_this_process
def test_what_goes_unseen_is_caught(monkeypatch, capfd):
    honest = bench.Counter.__call__

    def blind(self, access):
        if not access.is_store:
            honest(self, access)

    monkeypatch.setattr(bench.Counter, "__call__", blind)
    assert main(["traffic", *SMALL]) == 1
    assert "so something was not seen" in capfd.readouterr().out.split("broken rules:")[1]


# -- the count itself --

SHAPE = LayerShape(tokens=16, d_model=32, d_ff=48, experts=4, top_k=2)


def traffic_of(tensors, *accesses):
    """Bytes (read, written, apart) of accesses: tensor name, is_store, element indices."""
    launch = Launch("kernel", 0, tensors)
    counted = bench.LaunchTraffic(launch, "forward")
    for name, is_store, elements in accesses:
        tensor = tensors[name]
        addresses = np.uint64(tensor.data_ptr()) + np.array(elements, dtype=np.uint64) * np.uint64(tensor.itemsize)
        counted.add(Access(launch, is_store, addresses, tensor.itemsize))
    return counted.bytes(SHAPE)


def test_sectors_count_once_per_launch_and_direction():
    tensors = {"x": torch.zeros(16, 32, dtype=torch.bfloat16), "idx": torch.zeros(32, dtype=torch.int32)}
    assert traffic_of(tensors) == (0, 0, 0)
    assert traffic_of(tensors, ("x", False, [0])) == (32, 0, 0), "one element moves a sector"
    assert traffic_of(tensors, ("x", False, range(16)), ("x", False, range(8, 24))) == (64, 0, 0)
    assert traffic_of(tensors, ("x", False, range(512)), ("x", True, range(512))) == (1024, 1024, 0)
    assert traffic_of(tensors, ("x", False, range(0, 512, 16))) == (1024, 0, 0), "a stride of a sector moves all"
    assert traffic_of(tensors, ("idx", False, range(32)), ("idx", True, range(32))) == (0, 0, 256)


def test_a_view_is_told_from_what_it_is_a_view_of():
    rows = torch.zeros(16, 32, dtype=torch.bfloat16)
    tensors = {"rows": rows, "same": rows, "half": rows[8:]}
    assert traffic_of(tensors, ("rows", False, range(512)), ("half", False, range(256))) == (1024, 0, 0)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((16, 32), torch.bfloat16, True),  # x
        ((32, 96), torch.bfloat16, True),  # h
        ((4, 32, 96), torch.bfloat16, True),  # w_up
        ((5, 96), torch.float32, True),  # partial sums of a bias's gradient, a row per tile
        ((4, 32, 96), torch.float32, True),  # partial sums of a weight's gradient
        ((12288,), torch.float32, True),  # the same, laid out flat
        ((4, 96), torch.bfloat16, False),  # b_up
        ((4, 32), torch.bfloat16, False),  # b_down
        ((16, 4), torch.float32, False),  # logits
        ((16, 2), torch.float32, False),  # gate weights
        ((2, 4), torch.float32, False),  # statistics of a block
        ((2, 64), torch.float32, False),  # sums per row and column tile
        ((), torch.float32, False),  # log-sum-exp
        ((32,), torch.int32, False),  # permutation
    ],
)
def test_what_the_floor_speaks_of(shape, dtype, expected):
    assert bench.is_counted(torch.zeros(shape, dtype=dtype), SHAPE) is expected


def test_the_floor_of_recomputing_moves_h_from_one_side_to_the_other():
    h, kept, again = 2 * 16 * 2 * 2 * 48, SHAPE.floors("h"), SHAPE.floors("x")
    assert again["forward"] == kept["forward"] - h
    assert again["backward"] == kept["backward"] + h + 2 * (16 * 32) + 2 * (4 * 32 * 96)
    assert LayerShape(16, 32, 48, 4, 2, itemsize=4).floors() == {name: 2 * value for name, value in kept.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "8"], "--tokens: expected more than there are experts (8), got 8"),
        (["--d_ff", "8"], "--experts: expected a number that is no width of the layer, got 8"),
        (["--top_k", "9"], "top_k: expected at most"),
        (["--experts", "0"], "num_experts: expected a positive integer"),
        (["--dtype", "bf17"], "--dtype: expected"),
    ],
)
def test_what_cannot_be_counted_is_one_line_and_status_2(options, message, capsys):
    assert main(["traffic", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
