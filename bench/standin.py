"""A stand-in for Triton's driver: kernels compile for a GPU that this machine does not have, and are not launched.

Under it `kernel[grid](…)` on CPU tensors compiles for the named target exactly what it would compile on that GPU, and
is recorded where it would be launched: results hold whatever `torch.empty` held. So the code around the kernels may
not look at values, which is no more than a GPU asks of it; under `no_host_reads` doing so is an error.

One target per process: a kernel keeps what it compiled by device number, and the device here is always 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from moe_engine.bench.machine_code import CARDS, Card


@dataclass
class Specialisation:
    """A compiled kernel as the driver got to see it, and the phases in which it was launched."""

    source: Any
    metadata: Any
    files: dict[str, str] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)


class Recorder:
    """Kernels that were compiled, and `phase`, the name under which the present launches are counted."""

    def __init__(self) -> None:
        self.specialisations: list[Specialisation] = []
        self.phase = ""

    def launcher(self, source: Any, metadata: Any) -> Any:
        """What Triton calls in place of the launcher it would build: counts."""
        specialisation = Specialisation(source, metadata)
        self.specialisations.append(specialisation)

        def launch(*_arguments: Any) -> None:
            launches = specialisation.launches
            launches[self.phase] = launches.get(self.phase, 0) + 1

        return launch

    def loading(self, _module: Any, _function: Any, _name: str, files: dict[str, str], _hash: str) -> None:
        """Hook of Triton, right after `launcher`: where the compiler's output lies."""
        self.specialisations[-1].files = files


class _Utilities:
    def __init__(self, properties: dict[str, int]) -> None:
        self._properties = properties

    def load_binary(self, _name: str, _binary: bytes, _shared: int, _device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads at most

    def unload_module(self, _module: int) -> None:
        pass

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return self._properties


def _target(arch: str, card: Card) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if card.is_amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


class StandIn(DriverBase):
    """Answers what Triton asks of a driver between a call of a kernel and its launch."""

    def __init__(self, arch: str, recorder: Recorder) -> None:
        card = CARDS[arch]
        self.target = _target(arch, card)
        self.launcher_cls = recorder.launcher
        self.utils = _Utilities(
            {
                # Not the card's: Triton would stop at the first kernel that needs more. The rules see it, and the rest.
                "max_shared_mem": 1 << 30,
                "multiprocessor_count": card.multiprocessors,
                "max_num_regs": 65_536,
                "warpSize": self.target.warp_size,
            }
        )

    @classmethod
    def is_active(cls) -> bool:
        """Only by `install`."""
        return False

    def get_current_target(self) -> GPUTarget:
        """The GPU that is not there."""
        return self.target

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")

    def get_current_device(self) -> int:
        """Always the same."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """The default one."""
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Would be needed by a real launcher."""
        raise NotImplementedError("nothing is launched here")

    def get_benchmarker(self) -> Any:
        """Would be needed by triton.autotune."""
        raise NotImplementedError("nothing is timed here")


def install(arch: str) -> Recorder:
    """Make a target, a key of `machine_code.CARDS`, the active one of this process, for good."""
    recorder = Recorder()
    driver.set_active(StandIn(arch, recorder))
    knobs.runtime.kernel_load_start_hook.add(recorder.loading)
    return recorder


def _refuse(*_arguments: Any, **_options: Any) -> Any:
    raise RuntimeError("a value was read on the host: on a GPU this waits for everything before it")


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Make every way to a value on the host an error: `.item()`, `int(t)`, `if t:`, `.tolist()`, `.nonzero()`, …"""
    methods = ("item", "tolist", "numpy", "nonzero", "cpu", "__bool__", "__int__", "__float__", "__index__")
    before = {name: getattr(torch.Tensor, name) for name in methods}
    for name in methods:
        setattr(torch.Tensor, name, _refuse)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(torch.Tensor, name, method)
