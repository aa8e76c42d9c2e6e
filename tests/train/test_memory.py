"""The estimate of a run's memory: against sums, the formula, real runs; and what users are told."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from moe_engine import Transformer
from moe_engine.train import __main__ as command
from moe_engine.train import loop as loop_module
from moe_engine.train import memory
from moe_engine.train.config import resolve
from moe_engine.train.errors import InputError
from moe_engine.train.loop import Trainer
from moe_engine.train.memory import Run, estimate, formula, largest_batch, next_setting
from moe_engine.train.parallel import World
from moe_engine.train.step import Engine

BF16, FP32 = torch.bfloat16, torch.float32


def run(ranks=1, dtype=FP32, on_gpu=False, layers=None, **flags):
    flags = {"data_dir": "", "grad_accum_steps": 1} | flags
    config = resolve(flags | ({"model": {"num_layers": layers}} if layers else {}))
    return Run(config, config.model_config(1), ranks, dtype, on_gpu)


def parameters(model_config):
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(model_config).parameters())


def test_weights_gradients_and_moments_are_exact():
    """AdamW in fp32: 4 bytes each of weight and gradient, 8 of moments; the last gradients come at the peak itself."""
    r = run(preset="tiny", batch_size=1, block_size=32)
    found, count = estimate(r), parameters(r.model)
    tensors = 4 * 40  # rounded up to 512 bytes each
    assert found.parts["weights"] == pytest.approx(4 * count, abs=512 * tensors)
    assert found.parts["optimizer"] == pytest.approx(8 * count, abs=3 * 512 * tensors)
    assert found.parts["gathered"] == 0
    assert found.total == sum(found.parts.values()) and found.reserved == round(1.06 * found.total)


def test_ranks_divide_what_lasts_and_gather_the_rest():
    pytest.importorskip("triton")
    one, four = (estimate(run(n, BF16, True, preset="small", batch_size=2, block_size=256)) for n in (1, 4))
    for kind in ("weights", "optimizer"):
        assert four.parts[kind] == pytest.approx(one.parts[kind] / 4, rel=0.01)
    assert four.parts["gathered"] > 0
    assert not dist.is_initialized()


def test_replicas_hold_whole_copies():
    pytest.importorskip("triton")
    small = {"preset": "small", "batch_size": 2, "block_size": 256}
    plain, replicated = (estimate(run(4, BF16, True, dp_replicate=n, **small)) for n in (1, 2))
    assert replicated.parts["weights"] == pytest.approx(2 * plain.parts["weights"], rel=0.01)


LARGE = {"preset": "8b", "layers": 4, "block_size": 4096}
TWO_COPIES = {"preset": "8b", "layers": 2, "batch_size": 1, "dp_replicate": 2}
SMALL = {"preset": "small", "batch_size": 8, "block_size": 512}
AGREE = {
    "8b block": (8, BF16, True, LARGE | {"batch_size": 4, "checkpointing": "block"}),
    "8b selective": (8, BF16, True, LARGE | {"batch_size": 2, "checkpointing": "selective"}),
    "8b none, accumulated": (8, BF16, True, LARGE | {"batch_size": 1, "grad_accum_steps": 3}),
    "6b in backward": (1, BF16, True, LARGE | {"preset": "6b", "batch_size": 1, "optimizer_in_backward": True}),
    "replicas, accumulated": (4, BF16, True, TWO_COPIES | {"grad_accum_steps": 2}),
    "replicas in backward": (4, BF16, True, TWO_COPIES | {"optimizer_in_backward": True}),
    "small": (1, BF16, True, SMALL | {"batch_size": 32}),
    "small, fp32 on a GPU": (1, FP32, True, SMALL),
    "small on a CPU": (1, FP32, False, SMALL | {"layers": 3}),
    "small on a CPU, block": (1, FP32, False, SMALL | {"layers": 3, "checkpointing": "block"}),
}


@pytest.mark.parametrize(("ranks", "dtype", "on_gpu", "flags"), AGREE.values(), ids=AGREE)
def test_the_formula_agrees_within_5_percent(ranks, dtype, on_gpu, flags):
    if on_gpu:
        pytest.importorskip("triton")
    r = run(ranks, dtype, on_gpu, **flags)
    assert formula(r) == pytest.approx(estimate(r).total, rel=0.05)


def changed(r, advice):
    """The run with the flags of an advice."""
    words = advice.partition(",")[0].split("--")[1:]
    pairs = (word.strip().partition(" ") for word in words)
    changes = {name: True if not value else int(value) if value.isdigit() else value for name, _, value in pairs}
    return dataclasses.replace(r, config=dataclasses.replace(r.config, **changes))


def test_every_advice_saves():
    """One after the other, by the estimate and not only by the formula that they were chosen by."""
    r = run(1, FP32, preset="small", batch_size=4, block_size=256, layers=2)
    peaks, seen = [estimate(r).total], []
    while not (advice := next_setting(r)).startswith("more devices"):
        seen.append(advice)
        r = changed(r, advice)
        if r.config.optimizer == "adamw8bit":
            pytest.importorskip("torchao")
        peaks.append(estimate(r).total)
        assert len(seen) < 20
    assert seen[0] == "--checkpointing selective" and "--optimizer adamw8bit, in a new run" in seen
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < 0.75 * peaks[0], (seen, peaks)


def test_advice_for_the_8b_model_ends_at_the_leanest_run():
    r, seen = run(1, BF16, True, preset="8b", batch_size=2, block_size=2048), []
    while not (advice := next_setting(r)).startswith("more devices"):
        seen.append(advice)
        r = changed(r, advice)
        assert len(seen) < 20
    c = r.config
    assert (c.checkpointing, c.optimizer, c.param_dtype, c.optimizer_in_backward) == (
        "block",
        "adamw8bit",
        "bfloat16",
        True,
    )


def test_the_largest_batch_fits_and_the_next_does_not():
    r = run(preset="tiny", batch_size=1, block_size=64, layers=1)
    capacity = 1.0001 * estimate(dataclasses.replace(r, config=dataclasses.replace(r.config, batch_size=11))).reserved
    assert largest_batch(r, capacity) == 11
    assert largest_batch(r, 1e6) == 0


REAL = """
import json, sys, torch
from moe_engine.train import memory, parallel
from moe_engine.train.config import resolve
from moe_engine.train.parallel import World
from moe_engine.train.step import Engine, build_model

def engine(flags):
    config = resolve({"data_dir": ""} | flags)
    world, device = World(0, 1, 0), torch.device("cpu")
    model = build_model(config, config.model_config(1), world, device, torch.float32, sharded=False)
    model.to_empty(device=device)
    model.init_weights(0)
    return config, Engine(config, model, world, device, torch.float32)

def steps(config, engine, count):
    generator = torch.Generator().manual_seed(0)
    for iteration in range(count):
        tokens = torch.randint(0, 1000, (config.batch_size, config.block_size + 1), generator=generator)
        engine.step([(tokens[:, :-1], tokens[:, 1:])] * config.grad_accum_steps, iteration)

def resident(name):
    with open("/proc/self/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith(name))

steps(*engine({"preset": "tiny", "batch_size": 2, "block_size": 64}), 2)  # libraries take their buffers
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forget the peak
steps(*engine(json.loads(sys.argv[1])), 2)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident set is read from /proc")
@pytest.mark.parametrize(
    "flags",
    [
        {"batch_size": 4, "block_size": 512, "grad_accum_steps": 1},
        {"batch_size": 16, "block_size": 512, "grad_accum_steps": 2, "checkpointing": "block"},
        {"batch_size": 8, "block_size": 512, "grad_accum_steps": 1, "checkpointing": "selective"},
    ],
    ids=["none", "block, accumulated", "selective"],
)
def test_a_real_run_takes_what_was_estimated(tmp_path, flags):
    """Growth of the resident set over two steps of the small preset, malloc giving back what is freed: within 10 %."""
    flags = flags | {"preset": "small"}
    script = tmp_path / "real.py"
    script.write_text(REAL)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(flags)],
        capture_output=True,
        text=True,
        check=True,
        env={"MALLOC_MMAP_THRESHOLD_": "65536", "PATH": "/usr/bin:/bin"},
    )
    measured, estimated = int(done.stdout), estimate(run(**flags)).total
    print(f"{flags}: measured {measured / 1e9:.3f} GB, estimated {estimated / 1e9:.3f} GB")
    assert estimated == pytest.approx(measured, rel=0.1)


def test_a_run_that_is_out_of_memory_says_what_to_try(small_run, monkeypatch):
    def step(self, batches, iteration):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(
        InputError, match=r"^out of memory \(CUDA out of memory. Tried to allocate 2.00 GiB.\)"
    ) as error:
        command.train(small_run())
    assert "next to try: --checkpointing selective; the last whole checkpoint stays" in str(error.value)


def test_other_errors_of_a_step_are_not_hidden(small_run, monkeypatch):
    def step(self, batches, iteration):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        command.train(small_run())


def test_a_gpu_is_told_the_estimate_before_the_first_step(small_run, monkeypatch):
    """The note of a run on a GPU, made on a CPU: the device of this trainer is another after it was built."""
    pytest.importorskip("triton")
    config = small_run()
    trainer = Trainer(config, World(0, 1, 0), torch.device("cpu"))
    trainer.loader.close()
    assert trainer._memory_note() == []
    trainer.device, trainer.dtype = torch.device("cuda"), BF16
    monkeypatch.setattr(loop_module, "memory_total", lambda device: 80e9)
    (note,) = trainer._memory_note()
    assert note.startswith("memory: estimated ") and "it has 80 GB, 1 GB for driver and libraries" in note
    monkeypatch.setattr(loop_module, "memory_total", lambda device: 1.0005e9)
    (note,) = trainer._memory_note()
    assert "too little; next to try: --" in note
    trainer.world = World(1, 2, 1)
    assert trainer._memory_note() == []


def test_what_is_not_estimated_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^--cpu_offload: its memory is not estimated, got true$"):
        estimate(run(2, BF16, True, preset="tiny", cpu_offload=True))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="expected no process group"):
            estimate(run(preset="tiny"))
    finally:
        dist.destroy_process_group()


def test_replicas_must_divide_the_ranks():
    with pytest.raises(InputError, match=r"^--dp_replicate: expected a divisor of the number of processes, 3, got 2$"):
        estimate(run(3, BF16, True, preset="tiny", dp_replicate=2))


@pytest.mark.parametrize("flags", [{"dtype": "float16"}, {"cpu_offload": True}, {"dp_replicate": 2}])
def test_advice_is_a_run_that_is_allowed(flags):
    """Where steps in backward are refused, or save nothing, they are not advised, and no advice raises."""
    dtype = torch.float16 if "dtype" in flags else BF16
    lean = {"checkpointing": "block", "optimizer": "adamw8bit", "batch_size": 1, "block_size": 4096}
    config = resolve({"data_dir": "", "preset": "8b", "grad_accum_steps": 1} | lean | flags)
    r, seen = Run(config, config.model_config(1), 4, dtype, True), []
    while not (advice := next_setting(r)).startswith("more devices"):
        seen.append(advice)
        r = changed(r, advice)
        assert len(seen) < 20
    if "dp_replicate" in flags:
        assert seen[0] == "--dp_replicate 1, in a new run"  # 8-bit moments stay with the number of parts
    else:
        assert "--optimizer_in_backward" not in seen


def test_a_note_that_cannot_be_made_stops_no_run(small_run, monkeypatch):
    trainer = Trainer(small_run(), World(0, 1, 0), torch.device("cpu"))
    trainer.loader.close()
    trainer.device = torch.device("cuda")
    monkeypatch.setattr(loop_module, "memory_total", lambda device: 80e9)
    monkeypatch.setattr(memory, "estimate", lambda run: (_ for _ in ()).throw(AttributeError("gone\nmore")))
    assert trainer._memory_note() == ["memory: not estimated (AttributeError: gone)"]


def test_the_memory_of_a_host_is_that_of_all_its_ranks():
    config = resolve({"data_dir": "", "preset": "tiny", "dp_replicate": 2})
    assert memory.lasting_need(config, 1000, ranks=8, sharing=1) == 16 * 1000 / 4
    assert memory.lasting_need(config, 1000, ranks=8, sharing=8) == 16 * 1000 * 2


def test_bytes_that_last():
    config = resolve({"data_dir": "", "preset": "tiny"})
    assert (memory.stored_bytes(config), memory.lasting_bytes(config)) == (12, 16)
    lean = dataclasses.replace(
        config, optimizer="adamw8bit", dtype="bfloat16", param_dtype="bfloat16", optimizer_in_backward=True
    )
    assert (memory.stored_bytes(lean), memory.lasting_bytes(lean)) == (4, 4)
