"""Memory traffic of a layer's kernels, counted in Triton's interpreter and held against the least there can be.

    moe-bench traffic --tokens 256 --d_model 128 --d_ff 128 --experts 8 --top_k 2

Every load and store of every launch is seen (`moe_engine/simulator.py`); counted are the distinct 32-byte sectors,
the unit in which GPUs move memory, that a launch reads, and those that it writes. So a launch may read a sector twice
for nothing, as from a cache, but what two launches read is counted twice. Expert weights, activations and their
gradients, partial sums of them included, are compared with the floor of `shapes.LayerShape`: every launch touches each
of its tensors once. Indices, router statistics, gate weights and biases are counted apart.

Routing is balanced and every expert has rows, since the weights of an expert without any need not be read. The results
are first held against the PyTorch backend: the traffic of a wrong kernel is worth nothing. Status 1 when forward or
backward moves over 5 % more than its floor, or the two need more than 14 launches.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k, N = T·K
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_engine import MoELayer, simulator
from moe_engine.bench.runner import append_rows, check_writable, make_row
from moe_engine.bench.shapes import DTYPES, LayerShape
from moe_engine.config import ACTIVATIONS, SAVE, MoEConfig
from moe_engine.kernels.launch import INTERPRETED
from moe_engine.simulator import Access, Launch
from moe_engine.testing import assert_close, normal
from moe_engine.train.cli import run_command
from moe_engine.train.errors import InputError
from moe_engine.train.options import option

SECTOR = 32  # bytes
MOST_OVER_FLOOR = 1.05
MOST_LAUNCHES = 14


@dataclass(frozen=True)
class TrafficConfig:
    """Options of the command."""

    tokens: int = option(256, "tokens that go through the layer")
    d_model: int = option(128, "model width")
    d_ff: int = option(128, "hidden width of an expert")
    experts: int = option(8, "number of experts")
    top_k: int = option(2, "experts per token")
    dtype: str = option("bf16", "of weights and activations", choices=tuple(DTYPES))
    save: str = option("h", "what the experts keep for backward", choices=SAVE)
    activation: str = option("swiglu_oai", "activation of the experts", choices=tuple(ACTIVATIONS))
    bias: bool = option(True, "experts with biases")
    output: str | None = option(None, "JSONL file to append the rows to")

    def shape(self) -> LayerShape:
        """The sizes."""
        itemsize = 4 if self.dtype == "fp32" else 2
        return LayerShape(self.tokens, self.d_model, self.d_ff, self.experts, self.top_k, itemsize)

    def moe(self) -> MoEConfig:
        """The layer.

        Raises:
            InputError: a size is out of range, or routing cannot be balanced.
        """
        try:
            config = MoEConfig(
                self.d_model, self.d_ff, self.experts, self.top_k, self.activation, expert_bias=self.bias
            )
        except ValueError as error:
            raise InputError(str(error)) from None
        if self.tokens <= self.experts:
            raise InputError(f"--tokens: expected more than there are experts ({self.experts}), got {self.tokens}")
        if self.experts in (self.d_model, self.d_ff, 2 * self.d_ff):
            raise InputError(f"--experts: expected a number that is no width of the layer, got {self.experts}")
        return config


class LaunchTraffic:
    """Sectors that one launch reads and writes, by tensor."""

    def __init__(self, launch: Launch, phase: str) -> None:
        self.kernel, self.phase, self.tensors = launch.kernel, phase, launch.tensors
        # The last tensor that begins at or before an address holds it, also where one is a view of another.
        begins = {name: tensor.data_ptr() for name, tensor in self.tensors.items() if tensor.numel()}
        self._names = sorted(begins, key=begins.__getitem__)
        self._starts = np.array([begins[name] for name in self._names], dtype=np.uint64)
        self._sectors: dict[tuple[str, bool], list[np.ndarray]] = {}

    def add(self, access: Access) -> None:
        """Count a load or store of one program."""
        owners = np.searchsorted(self._starts, access.addresses, side="right") - 1
        for owner in np.unique(owners):
            sectors = np.unique(access.addresses[owners == owner] // np.uint64(SECTOR))
            self._sectors.setdefault((self._names[owner], access.is_store), []).append(sectors)

    def bytes(self, shape: LayerShape) -> tuple[int, int, int]:
        """Read and written of what the floor speaks of, and the rest."""
        read = written = apart = 0
        for (name, is_store), parts in self._sectors.items():
            size = SECTOR * len(np.unique(np.concatenate(parts)))
            if not is_counted(self.tensors[name], shape):
                apart += size
            elif is_store:
                written += size
            else:
                read += size
        return read, written, apart


def is_counted(tensor: Tensor, shape: LayerShape) -> bool:
    """Whether the floor speaks of such a tensor: floating point, and D, F or 2F wide, on rows, tiles or experts.

    Not: indices, logits and statistics, gate weights, sums per row, biases and their gradients. Whatever is as large as
    an activation counts, however it is laid out.
    """
    if not tensor.is_floating_point():
        return False
    if tensor.numel() >= shape.tokens * min(shape.d_model, shape.d_ff):
        return True
    is_bias = tensor.dim() == 2 and tensor.shape[0] == shape.experts
    return tensor.dim() > 1 and tensor.shape[-1] in (shape.d_model, shape.d_ff, 2 * shape.d_ff) and not is_bias


class Counter:
    """Callback of `simulator.observe`: the traffic of every launch, in order, under the phase it was made in."""

    def __init__(self) -> None:
        self.phase = "forward"
        self.launches: list[LaunchTraffic] = []
        self._current: Launch | None = None

    def __call__(self, access: Access) -> None:
        if access.launch is not self._current:
            self._current = access.launch
            self.launches.append(LaunchTraffic(access.launch, self.phase))
        self.launches[-1].add(access)


def _inputs(config: TrafficConfig) -> dict[str, Tensor]:
    """x, logits, weights of the layer and the gradients that come in, with balanced routing."""
    t, d, f, e = config.tokens, config.d_model, config.d_ff, config.experts
    dtype = getattr(torch, DTYPES[config.dtype])
    logits = normal(t, e, seed=1).tanh() / 2
    chosen = torch.arange(t * config.top_k).view(t, -1) % e  # within ±½ of 2, the others within ±½ of 0
    values = {
        "x": normal(t, d, seed=2),
        "w_up": normal(e, d, 2 * f, seed=3) / d**0.5,
        "w_down": normal(e, f, d, seed=4) / f**0.5,
        "grad_out": normal(t, d, seed=5),
    }
    if config.bias:
        values |= {"b_up": normal(e, 2 * f, seed=6) / 4, "b_down": normal(e, d, seed=7) / 4}
    inputs = {name: value.to(dtype) for name, value in values.items()}
    return inputs | {"logits": logits.scatter_add(1, chosen, torch.full(chosen.shape, 2.0).double()).float()}


class _Logits(nn.Module):
    """In the router's place: logits that are given."""

    select_bias = None

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, _rows: Tensor, _jitter_key: None = None) -> Tensor:
        return self.logits


def _layer(inputs: dict[str, Tensor], config: MoEConfig, dtype: torch.dtype) -> tuple[MoELayer, Tensor, Tensor]:
    """A layer with the inputs' weights and logits, x, and the gradient of the output, in a dtype."""
    with torch.device("meta"):
        layer = MoELayer(config)
    for name, value in inputs.items():
        if hasattr(layer, name):
            setattr(layer, name, nn.Parameter(value.to(dtype)))
    layer.router = _Logits(inputs["logits"].to(torch.promote_types(dtype, torch.float32)))
    return layer, inputs["x"].to(dtype).requires_grad_(), inputs["grad_out"].to(dtype)


def _forward(layer: MoELayer, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What is differentiated, and with respect to what."""
    out, stats = layer(x)
    return [out, stats.prob_sum, stats.lse_sq], [x, *layer.parameters()]


def _backward(outputs: list[Tensor], leaves: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the leaves for that of the output and fixed ones of the statistics."""
    _, prob_sum, lse_sq = outputs
    fixed = [torch.linspace(-1, 1, prob_sum.numel()).to(prob_sum.dtype), torch.full_like(lse_sq, 0.1)]
    return torch.autograd.grad(outputs, leaves, [grad_out, *fixed])


def _named(layer: MoELayer, out: Tensor, grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names = ["out", "grad of x", *(f"grad of {name}" for name, _ in layer.named_parameters())]
    return dict(zip(names, (out.detach(), *grads), strict=True))


def by_torch(inputs: dict[str, Tensor], config: MoEConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients by the PyTorch backend, computed in a dtype."""
    layer, x, grad_out = _layer(inputs, replace(config, backend="torch"), dtype)
    outputs, leaves = _forward(layer, x)
    return _named(layer, outputs[0], _backward(outputs, leaves, grad_out))


def by_kernels(
    inputs: dict[str, Tensor], config: MoEConfig, save: str, counter: Counter
) -> tuple[dict[str, Tensor], list[Launch]]:
    """Output and gradients by the kernels, with their launches."""
    layer, x, grad_out = _layer(inputs, replace(config, backend="triton", save=save), inputs["x"].dtype)
    with simulator.observe(counter) as launches:
        counter.phase = "forward"
        outputs, leaves = _forward(layer, x)
        counter.phase = "backward"
        grads = _backward(outputs, leaves, grad_out)
    return _named(layer, outputs[0], grads), launches


def wrong_results(actual: dict[str, Tensor], inputs: dict[str, Tensor], config: MoEConfig) -> list[str]:
    """Which results of the kernels are over the error budget of `testing.assert_close`, a line each."""
    exact = by_torch(inputs, config, torch.float64)
    reference = by_torch(inputs, config, inputs["x"].dtype)
    lines = []
    for name, value in actual.items():
        try:
            assert_close(value, exact[name], reference[name], roundings=1, name=name)
        except AssertionError as error:
            lines.append(f"wrong result, {error}")
    return lines


def traffic(config: TrafficConfig) -> int:
    """Run, compare, count, print; returns the exit status."""
    moe, shape = config.moe(), config.shape()
    check_writable(output=config.output)
    if not INTERPRETED:
        return _in_the_interpreter(config)
    simulator.repair()
    counter, inputs = Counter(), _inputs(config)
    actual, launches = by_kernels(inputs, moe, config.save, counter)
    broken = wrong_results(actual, inputs, moe)

    sizes = f"T {config.tokens}, D {config.d_model}, F {config.d_ff}, E {config.experts}, K {config.top_k}"
    print(f"{sizes}, {config.dtype}, save = {config.save}, Triton's interpreter; bytes in sectors of {SECTOR}")
    print(f"{'launch':36}{'read':>12}{'written':>12}{'apart':>12}")
    totals = dict.fromkeys(("forward", "backward"), 0)
    rows = []
    for number, launch in enumerate(counter.launches, 1):
        read, written, apart = launch.bytes(shape)
        totals[launch.phase] += read + written
        print(f"{number:2} {launch.phase:9}{launch.kernel:24}{read:12,}{written:12,}{apart:12,}")
        rows.append({"kernel": launch.kernel, "phase": launch.phase, "read": read, "written": written, "apart": apart})
    for phase, floor in shape.floors(config.save).items():
        ratio = totals[phase] / floor
        print(f"{phase:12}{totals[phase]:12,} bytes, floor {floor:12,}, ratio {ratio:.3f}")
        if ratio > MOST_OVER_FLOOR:
            broken.append(f"{phase}: {ratio:.3f} of the floor, at most {MOST_OVER_FLOOR} is allowed")
        if ratio < 1:
            broken.append(f"{phase}: {ratio:.3f} of the floor, so something was not seen")
    broken += _count_launches(launches, counter)
    if config.output:
        _append(config, rows, totals)
    print("no rule is broken" if not broken else "broken rules:\n  " + "\n  ".join(broken))
    return 1 if broken else 0


def _count_launches(launches: list[Launch], counter: Counter) -> list[str]:
    """Print how many launches there were; returns what is wrong with that."""
    names: dict[str, int] = {}
    for launch in launches:
        names[launch.kernel] = names.get(launch.kernel, 0) + 1
    forward = sum(launch.phase == "forward" for launch in counter.launches)
    kernels = ", ".join(f"{number}× {name}" if number > 1 else name for name, number in names.items())
    print(f"launches: {forward} forward + {len(launches) - forward} backward = {len(launches)}: {kernels}")
    if len(launches) > MOST_LAUNCHES:
        return [f"{len(launches)} launches, at most {MOST_LAUNCHES} are allowed"]
    return []


def _append(config: TrafficConfig, rows: list[dict[str, Any]], totals: dict[str, int]) -> None:
    settings = asdict(config)
    output = settings.pop("output")
    floor = config.shape().floors(config.save)
    result = make_row(
        "traffic", "layer", settings, "none, Triton's interpreter", launches=rows, bytes=totals, floor=floor
    )
    append_rows(Path(output), [result])


def _in_the_interpreter(config: TrafficConfig) -> int:
    """The same command in a process that has Triton's interpreter on; it looks at the variable when it is imported."""
    flags = [f"--{name}={value}" for name, value in asdict(config).items() if value is not None]
    command = [sys.executable, "-m", "moe_engine.bench.traffic", *flags]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("moe-bench traffic", TrafficConfig, traffic, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
