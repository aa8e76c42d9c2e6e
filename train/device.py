"""What the machine is: device, dtype, peak speed, memory."""

from __future__ import annotations

import ctypes
import platform
import sys
import time

import psutil
import torch

from moe_engine.train.errors import InputError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Dense 16-bit tensor-core peaks in TFLOP/s, from the vendors' data sheets; the first name found in the device's.
_PEAKS = (
    ("A100", 312.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("B200", 2250.0),
    ("GB200", 2250.0),
    ("L40S", 362.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.0),
    ("MI250X", 383.0),
)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`: CUDA (or ROCm) where there is one, else the CPU.

    Raises:
        InputError: `cuda` was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--device: expected a CUDA or ROCm device, found none; use --device cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank}: this machine has {torch.cuda.device_count()} device(s); "
            "lower torchrun's --nproc_per_node"
        )
    return torch.device("cuda", local_rank)


def pick_dtype(name: str | None, device: torch.device) -> tuple[torch.dtype, str]:
    """The training dtype, and a remark for the log when it was chosen here.

    Raises:
        InputError: fp16 on a CPU, or bf16 on a GPU without it.
    """
    if name is None:
        if device.type == "cpu":
            return torch.float32, "dtype float32: a CPU trains in single precision unless --dtype bfloat16 is given"
        return torch.bfloat16, ""
    if name == "float16" and device.type == "cpu":
        raise InputError("--dtype float16: needs a GPU (loss scaling has no CPU path); use float32 or bfloat16")
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError("--dtype bfloat16: this GPU has no bfloat16; use float16 or float32")
    return DTYPES[name], ""


def device_name(device: torch.device) -> str:
    """The card's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def data_sheet_peak(name: str) -> float | None:
    """Dense 16-bit FLOP/s of a card by its device name; None for one that is not in the table."""
    return next((1e12 * tflops for part, tflops in _PEAKS if part in name), None)


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> tuple[float | None, str]:
    """FLOP/s that MFU is measured against, and where the number is from; None when nothing is known.

    Known cards: the data sheet's dense 16-bit peak (the dtype asked for is not looked at: TF32 is no target of ours).
    A CPU: the best of the large matrix products that fit into so many seconds (at least one), timed now.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if (peak := data_sheet_peak(name)) is None:
            return None, f"no peak known for {name}"
        return peak, f"data sheet of {name}, 16-bit dense"
    size = 1024
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end or best == float("inf"):
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best, f"measured, {size}³ matrix product"


def memory_used(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def memory_total(device: torch.device) -> int:
    """Bytes on the card, or that this machine can still give."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 1 GB for reuse in place of giving them back to the system.

    A training step frees and takes the same large blocks over and over; without this each one is mapped, faulted in
    and zeroed anew. Nothing happens where the C library has no mallopt (macOS, musl).
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
