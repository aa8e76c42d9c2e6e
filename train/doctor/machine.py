"""The checks of `moe-doctor` that look at the machine: versions, devices, memory, packages, disk."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import re
import shutil
from pathlib import Path

import torch

from moe_engine.config import ModelConfig
from moe_engine.presets import PRESETS, preset
from moe_engine.train.device import device_name, memory_total, pick_dtype
from moe_engine.train.doctor.check import Check, NotChecked, Outcome, Setup, fail, passed, warn
from moe_engine.train.memory import CONTEXT, Run, estimate, lasting_need, next_setting, stored_bytes
from moe_engine.train.parallel import check_replicas

# Kept equal to pyproject.toml's by a test; triton comes with torch, or not at all.
FLOORS = {"python": (3, 11), "torch": (2, 11), "triton": (3, 6)}

_NEEDED = {"tensorboard": "TensorBoard events", "matplotlib": "plots"}
_FOR_PREPARE = {"zstandard": ".zst input", "datasets": "--source fineweb-edu"}


def machine_checks() -> list[Check]:
    """All of them, in the order in which they are reported."""
    return [
        Check("python", _python),
        Check("torch", _torch),
        Check("triton", _triton, "install triton anew"),
        Check("devices", _devices, "repair the GPU's driver, or train with --device cpu"),
        Check("memory", _memory),
        Check("packages", _packages),
        Check("disk", _disk, "choose another --out_dir"),
    ]


def count_parameters(config: ModelConfig) -> int:
    """Parameters of a model, counted without storage."""
    from moe_engine.model import Transformer

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


def _reaches_floor(name: str, version: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and tuple(map(int, numbers.groups())) >= FLOORS[name]


def _floor(name: str) -> str:
    return ".".join(map(str, FLOORS[name]))


def _python(setup: Setup) -> Outcome:
    version = platform.python_version()
    if not _reaches_floor("python", version):
        return fail(f"{version}, expected {_floor('python')} or newer", "make the environment with a newer Python")
    return passed(version)


def _torch(setup: Setup) -> Outcome:
    version = torch.__version__
    if not _reaches_floor("torch", version):
        return fail(f"{version}, expected {_floor('torch')} or newer", f'pip install "torch>={_floor("torch")}"')
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return passed(f"{version}, built for {f'ROCm {torch.version.hip}' if torch.version.hip else built}")


def _triton(setup: Setup) -> Outcome:
    # Without a GPU nothing needs Triton; with one, training without it is not what anybody wants.
    problem = fail if setup.devices else warn
    remedy = f'pip install "triton>={_floor("triton")}"'
    if not setup.devices:
        remedy += "; not needed on this machine: the torch backend serves a CPU"
    try:
        import triton
    except ImportError as error:
        return problem(f"cannot be imported ({error})", remedy)
    if not _reaches_floor("triton", triton.__version__):
        return problem(f"{triton.__version__}, expected {_floor('triton')} or newer", remedy)
    return passed(triton.__version__)


def _devices(setup: Setup) -> Outcome:
    if not setup.devices:
        tool = next((name for name in ("nvidia-smi", "rocm-smi") if shutil.which(name)), None)
        if tool:
            return warn(
                f"{tool} is installed, but torch finds no GPU: a CPU would train",
                f"see whether {tool} works and whether torch was built for this GPU (CUDA or ROCm) and its driver",
            )
        return passed(f"no GPU; {device_name(setup.device)}, trains in float32")
    names = sorted({device_name(device) for device in setup.devices})
    found = f"{len(setup.devices)} × {' and '.join(names)}"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return warn(f"{found}, no bfloat16", "train with --dtype float16")
    return passed(f"{found}, bfloat16")


def _memory(setup: Setup) -> Outcome:
    """What lasts through a step against the smallest device, or with --memory the peak of one, activations and all."""
    config, name = setup.config, setup.config.preset
    on_host = config.cpu_offload or not setup.devices
    have = memory_total(torch.device("cpu")) if on_host else min(memory_total(device) for device in setup.devices)
    check_replicas(setup.ranks, config.dp_replicate)
    if setup.memory:
        return _step_memory(setup, have)
    count = count_parameters(setup.model)
    need = lasting_need(config, count, setup.ranks, sharing=setup.ranks if on_host else 1)
    where = f"on each of {setup.ranks} devices" if setup.ranks > 1 and not on_host else "on one device"
    found = (
        f"{name}: {count / 1e6:,.1f} M parameters take {need / 1e9:,.2f} GB {'on this host' if on_host else where} "
        f"before activations; {'available here:' if on_host else 'it has'} {have / 1e9:,.1f} GB"
    )
    if need <= have:
        return passed(found)
    each = need / count
    fitting = [n for n in PRESETS if each * count_parameters(preset(n)) <= have]
    advice = [f"--preset {fitting[-1]} fits"] if fitting else []
    if not on_host:
        advice.append(f"{name} needs at least {math.ceil(need * setup.ranks / have)} devices like this")
    return warn(found, "; ".join(advice) or "free memory, or take a larger machine")


def _step_memory(setup: Setup, have: float) -> Outcome:
    if setup.config.cpu_offload:
        raise NotChecked("with --cpu_offload the memory of a step is not estimated")
    dtype, _ = pick_dtype(setup.config.dtype, setup.device)
    run = Run(setup.config, setup.model, setup.ranks, dtype, on_gpu=bool(setup.devices))
    estimated = estimate(run)
    usable = have - CONTEXT if setup.devices else have
    found = (
        f"{setup.config.preset}, {setup.config.batch_size} × {setup.config.block_size} tokens: {estimated};"
        f" {'it has' if setup.devices else 'available here:'} {have / 1e9:,.1f} GB"
    )
    if estimated.reserved <= usable:
        return passed(found)
    return warn(found, f"train with {next_setting(run)}; moe-bench memory shows what fits")


def _packages(setup: Setup) -> Outcome:
    missing = [f"{name} ({use})" for name, use in _NEEDED.items() if not _installed(name)]
    if not setup.meta_error and setup.tokenizer_if_any() is None and not _installed("bpe_openai"):
        missing.append("bpe-openai (the ranks of o200k_base and cl100k_base)")
    if missing:
        names = " ".join(entry.split()[0] for entry in missing)
        return warn(f"needed and not installed: {', '.join(missing)}", f"pip install {names}")
    absent = [f"{name} ({use})" for name, use in _FOR_PREPARE.items() if not _installed(name)]
    return passed(
        "all that training needs" + (f"; not installed, for moe-prepare only: {', '.join(absent)}" if absent else "")
    )


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _disk(setup: Setup) -> Outcome:
    out_dir = Path(setup.config.out_dir)
    place = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not place.is_dir():
        return fail(f"--out_dir {out_dir}: {place} is a file", "choose another --out_dir")
    if not os.access(place, os.W_OK | os.X_OK):
        return fail(f"--out_dir {out_dir}: {place} cannot be written to", "choose another --out_dir")
    free, size = shutil.disk_usage(place).free, stored_bytes(setup.config) * count_parameters(setup.model)
    kept = setup.config.keep_last_n + 1  # and the best one
    found = (
        f"{free / 1e9:,.1f} GB free at {out_dir}; a checkpoint of preset {setup.config.preset} takes"
        f" {size / 1e9:,.2f} GB, keep_last_n {setup.config.keep_last_n} and the best one {kept * size / 1e9:,.1f} GB"
    )
    if free < size:
        return fail(found, "choose an --out_dir with more room, or a smaller --preset")
    if free < kept * size:
        fitting = int(free // size) - 1
        fewer = f", or train with --keep_last_n {fitting}" if fitting else ""
        return warn(found, f"choose an --out_dir with more room{fewer}")
    return passed(found)
