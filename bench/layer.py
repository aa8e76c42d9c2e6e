"""One MoE layer, forward and backward: time and memory against every peer and against the GEMMs of it.

    moe-bench layer --tokens 2048 --rounds 30

    moe-bench layer --shape 8b --tokens 8192 --routing skewed --picture layer.png

Everything is timed in one process, in turn in every round, with the memory setting that `moe-train` makes. "BLAS" is
`torch.mm` on rows that lie by expert, as many for each as the layers route to it, into outputs that are there already:
the up- and the down-projection, and of either the gradients of input and weight. Ratios are over it. On a CPU it is
called in two ways, experts side by side on a thread each and one after the other on all threads, and the faster counts.

A shape gives sizes; the manner is Mixtral's (no biases, plain SwiGLU) or gpt-oss's (biases, bounded activation), both
with softmax over the chosen logits, and a peer has the weights of our layer in its own manner. A peer that is missing,
or cannot do what is asked, or would need more memory than there is, has a line that says so. Before anything is timed
it is held against `moe_engine.reference` in fp64 at these very sizes: what differs has no time, and if it is ours, the
command ends with status 1.

saved: bytes per token that forward keeps for backward, the layer's input among them, weights not. peak: of all that a
step makes, gradients among it; on a CPU of a step with one thread. 10⁶ bytes a MB.

T = tokens, D = d_model, F = d_ff, E = experts, K = top_k
"""

from __future__ import annotations

import functools
import gc
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_engine import MoELayer
from moe_engine.bench import plots
from moe_engine.bench.layer_check import Truth, make_truth, what_is_wrong
from moe_engine.bench.layer_peers import PEERS, STYLES, Peer
from moe_engine.bench.layer_steps import (
    Blas,
    Inputs,
    Problem,
    Step,
    free_memory,
    make_inputs,
    make_layer,
    memory,
    with_save,
)
from moe_engine.bench.runner import append_rows, check_writable, interleave, make_row
from moe_engine.bench.shapes import DTYPES, ROUTING, SHAPES
from moe_engine.config import BACKENDS, SAVE
from moe_engine.train.cli import run_command
from moe_engine.train.device import keep_freed_memory, pick_device
from moe_engine.train.errors import InputError
from moe_engine.train.options import option

UNTIMED = "checked, not timed: Triton's interpreter"
NO_PEERS = ["none"]


@dataclass(frozen=True)
class LayerConfig:
    """Options of the benchmark."""

    shape: str | None = option(None, "sizes of the layer; cpu on a CPU, 8b on a GPU", choices=tuple(SHAPES))
    tokens: int | None = option(None, "tokens T; 2048 on a CPU, 8192 on a GPU")
    d_model: int | None = option(None, "model width D, in place of the shape's")
    d_ff: int | None = option(None, "hidden width F of one expert, likewise")
    experts: int | None = option(None, "number of experts E, likewise")
    top_k: int | None = option(None, "experts per token K, likewise")
    routing: str = option("balanced", "how tokens spread over the experts", choices=ROUTING)
    dtype: str | None = option(None, "of everything; fp32 on a CPU, bf16 on a GPU", choices=tuple(DTYPES))
    device: str = option("auto", "where to measure", choices=("auto", "cpu", "cuda"))
    backend: str = option("auto", "of our layer", choices=BACKENDS)
    style: str = option(
        "both", "our layer in Mixtral's manner beside its peers, in gpt-oss's, or both", choices=("both", *STYLES)
    )
    save: str | None = option(
        None, "what our layer keeps for backward; h on a CPU, both on a GPU", choices=("both", *SAVE)
    )
    peers: list[str] = option(default_factory=list, help="peers with one of these in their names (all), or none")
    rounds: int = option(30, "timed rounds")
    output: str | None = option(None, "JSONL file to append the rows to")
    picture: str | None = option(None, "PNG file to draw the rows into")

    def problem(self) -> Problem:
        """The options with everything filled in.

        Raises:
            InputError: a size is out of range, or a device or a peer is not there.
        """
        device = pick_device(self.device)
        on_gpu = device.type == "cuda"
        shape = SHAPES[self.shape or ("8b" if on_gpu else "cpu")]
        sizes = {"tokens": 8192 if on_gpu else 2048, "d_model": shape.d_model, "d_ff": shape.d_ff}
        sizes |= {"experts": shape.num_experts, "top_k": shape.top_k}
        sizes = {name: value if getattr(self, name) is None else getattr(self, name) for name, value in sizes.items()}
        limits = {"experts": 256, "top_k": min(sizes["experts"], 8)}
        for name, value in (sizes | {"rounds": self.rounds}).items():
            most = limits.get(name)
            if value < 1 or (most is not None and value > most):
                expected = "at least 1" if most is None else f"1 … {most}"
                raise InputError(f"--{name}: expected {expected}, got {value}")
        if sizes["d_model"] < sizes["experts"]:
            raise InputError(f"--d_model: expected at least --experts, {sizes['experts']}, got {sizes['d_model']}")
        peers = [peer for peer in PEERS if self.style in ("both", peer.style)]
        for part in self.peers if self.peers != NO_PEERS else ():
            if not any(_in(part, peer) for peer in peers):
                names = "; ".join(peer.name for peer in peers)
                raise InputError(f"--peers: expected parts of these names: {names}; got {part!r}")
        return Problem(device, self.dtype or ("bf16" if on_gpu else "fp32"), routing=self.routing, **sizes)


def _in(part: str, peer: Peer) -> bool:
    return part.lower() in peer.name.lower()


class Case(NamedTuple):
    """What layers of one style have in common: sizes, inputs, our layer with the weights, and the right results."""

    problem: Problem
    inputs: Inputs
    layer: MoELayer
    truth: Truth


@dataclass
class Entry:
    """A layer of the comparison: its step, if it is to be timed; else `status` says why not."""

    name: str
    is_ours: bool
    status: str
    step: Step | None = None
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether it is ours, and has no time where it should."""
        return self.is_ours and self.status not in ("ok", UNTIMED)


def why_not(peer: Peer, case: Case, reserve: int) -> str:
    """Why a layer is not tried; "" if it is.

    Args:
        peer: to be made.
        case: what of.
        reserve: bytes that a step of the layers that are there already takes.
    """
    problem, config, dtype = case.problem, case.layer.config, case.problem.torch_dtype
    lacks_gpu = peer.gpu_only and problem.device.type != "cuda"
    if reason := peer.missing():
        return reason + ("; needs a GPU" if lacks_gpu else "")
    if lacks_gpu:
        return "needs a GPU"
    if reason := peer.supports(config, dtype):
        return reason
    weights = dtype.itemsize * sum(p.numel() for p in case.layer.parameters())
    # Gradients of the weights; rows in and out, h and a, and the gradient of each; and what is the peer's own.
    step = weights + 2 * dtype.itemsize * problem.tokens * problem.top_k * (2 * problem.d_model + 3 * problem.d_ff)
    step += peer.extra_bytes(problem.tokens, config, dtype.itemsize)
    need, free = weights + max(step, reserve), free_memory(problem.device)
    return f"needs about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free" if need > free else ""


def examine(peer: Peer, case: Case, reserve: int, *, is_ours: bool, is_timed: bool) -> Entry:
    """Make a layer, check it, measure its memory; for the arguments see `why_not`."""
    try:
        if reason := why_not(peer, case, reserve):
            return Entry(peer.name, is_ours, reason)
        step = Step(peer.make(case.layer), case.inputs, peer.ours)
        if wrong := what_is_wrong(step.results(), case.truth):
            return Entry(peer.name, is_ours, f"wrong: {wrong}")
        return Entry(peer.name, is_ours, "ok", step, memory(step)) if is_timed else Entry(peer.name, is_ours, UNTIMED)
    except Exception as error:  # whatever the code of others raises is a line of the table, and we go on
        first = (str(error).strip() or "no message").splitlines()[0]
        return Entry(peer.name, is_ours, f"failed: {type(error).__name__}: {first}")


def check_memory(problem: Problem) -> None:
    """Whether there is room to begin.

    Raises:
        InputError: there is not.
    """
    p, itemsize = problem, problem.torch_dtype.itemsize
    # Weights: BLAS's, ours, and in fp64; the gradients of each, and those of the reference in the layer's own dtype.
    weights = 3 * p.experts * p.d_model * p.d_ff * (5 * itemsize + 2 * 8)
    # Rows: BLAS's in and out; x and grad_out; x, output and its gradient in fp64. Logits in fp64, their order twice.
    rows = p.tokens * p.top_k * (4 * p.d_model + 6 * p.d_ff) * itemsize + p.tokens * p.d_model * (2 * itemsize + 3 * 8)
    need, free = weights + rows + p.tokens * p.experts * 3 * 8, free_memory(p.device)
    if need > free:
        raise InputError(
            f"--shape, --tokens: expected a layer that can be checked in fp64 with {free / 1e9:.1f} GB of memory, "
            f"got one that needs {need / 1e9:.1f} GB"
        )


def examine_all(config: LayerConfig, problem: Problem) -> list[Entry]:
    """Our layer and its peers, one style after the other, checked.

    Raises:
        InputError: our layer cannot be made here.
    """
    save = config.save or ("h" if problem.device.type == "cpu" else "both")
    label = "moe_engine" + (f" {config.backend}" if config.backend != "auto" else "")
    interpreted = config.backend == "triton" and problem.device.type == "cpu"
    found: list[Entry] = []
    for style in STYLES if config.style == "both" else (config.style,):
        ours = [
            Peer(f"{label}, {style}{note}", style, "", "", False, functools.partial(with_save, save=kept), dict)
            for kept, note in (("h", ""), ("x", ", save x"))
            if save in ("both", kept)
        ]
        wanted = [p for p in PEERS if p.style == style and (not config.peers or any(_in(n, p) for n in config.peers))]
        inputs, routed = make_inputs(problem, STYLES[style]["router_bias"])
        layer = make_layer(problem, routed, style, config.backend)
        case = Case(problem, inputs, layer, make_truth(layer, inputs))
        for peer in (*ours, *wanted):
            reserve = max((entry.memory["peak_bytes"] for entry in found if entry.memory), default=0)
            is_ours = peer in ours
            found.append(examine(peer, case, reserve, is_ours=is_ours, is_timed=not (is_ours and interpreted)))
            if found[-1].status.startswith("failed"):
                gc.collect()  # the traceback had its tensors
        del case  # fp64 results of one style are enough at a time
    return found


def layer(config: LayerConfig) -> int:
    """Check, measure, print a table; returns the exit status."""
    problem = config.problem()
    check_writable(output=config.output, picture=config.picture)
    keep_freed_memory()
    if config.backend == "triton" and problem.device.type == "cpu":
        from moe_engine import simulator

        simulator.repair()
    check_memory(problem)
    _, (_, _, counts) = make_inputs(problem, router_bias=False)
    blas = {"BLAS, one after the other": Blas(problem, counts, side_by_side=False)}
    if problem.device.type == "cpu" and torch.get_num_threads() > 1:
        blas["BLAS, experts side by side"] = Blas(problem, counts, side_by_side=True)
    found = examine_all(config, problem)
    steps = {entry.name: entry.step for entry in found if entry.step}
    seconds = interleave({**blas, **steps}, config.rounds, device=problem.device)
    fastest = min(blas, key=lambda name: float(np.median(seconds[name])))

    rows = []
    for entry in (*(Entry(name, False, "ok") for name in blas), *found):
        values: dict[str, Any] = {"status": entry.status, "ours": entry.is_ours, **entry.memory}
        if (s := seconds.get(entry.name)) is not None:
            # The median of ratios of calls made side by side, not a ratio of medians.
            ratio = float(np.median(s / seconds[fastest]))
            values |= {"flops": problem.flops(), "ratio": ratio, "baseline": fastest}
        rows.append(make_row("layer", entry.name, problem.settings(), problem.device, s, **values))
    print_table(rows)
    if config.output:
        append_rows(Path(config.output), rows)
    if config.picture:
        draw(Path(config.picture), rows)
    failed = [entry.name for entry in found if entry.failed]
    if failed:
        print(f"error: no time for {'; '.join(failed)}: see the table", file=sys.stderr)
    return 1 if failed else 0


def title(row: Mapping[str, Any]) -> str:
    """What the rows of a run have in common, in words."""
    s = row["settings"]
    sizes = f"T {s['tokens']}, D {s['d_model']}, F {s['d_ff']}, E {s['experts']}, K {s['top_k']}"
    return f"{sizes}, {s['dtype']}, {s['routing']} routing, {row['device']}"


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows of a run: those with a time, then those without."""
    timed = [row for row in rows if "p50" in row]
    rate, unit = ("TFLOP/s", 1e12) if rows[0]["threads"] is None else ("GFLOP/s", 1e9)
    print(f"{title(rows[0])}, forward and backward, {timed[0]['rounds']} rounds")
    width = max(len(row["name"]) for row in rows) + 1
    heads = (("p20", 9), ("p50", 9), ("p80", 9), ("band", 7), (rate, 9), ("× BLAS", 8), ("peak MB", 9))
    print(f"{'ms':{width}}" + "".join(f"{head:>{columns}}" for head, columns in heads) + "  saved/token")
    for row in timed:
        times = "".join(f"{1e3 * row[p]:9.2f}" for p in ("p20", "p50", "p80"))
        speed = row["flops"] / row["p50"] / unit
        line = f"{row['name']:{width}}{times}{row['band']:7.0%}{speed:9.1f}{row['ratio']:8.3f}"
        if "peak_bytes" in row:
            line += f"{row['peak_bytes'] / 1e6:9.1f}{row['saved_bytes'] / row['settings']['tokens']:13,.0f}"
        print(line)
    for row in rows:
        if "p50" not in row:
            print(f"{row['name']:{width}}{row['status']}")


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows of a run as a picture: time, and beside it what is kept for backward.

    Args:
        path: PNG file.
        rows: of one run, as `runner.read_rows` gives them; those without a time are left out.
    """
    timed = [row for row in rows if "p50" in row]
    names = [row["name"] for row in timed]
    p20, p50, p80 = ([1e3 * row[p] for row in timed] for p in ("p20", "p50", "p80"))
    kept = [row.get("saved_bytes", math.nan) / row["settings"]["tokens"] / 1e3 for row in timed]
    options = {"columns": 2, "size": (11.0, 1.8 + 0.34 * len(timed)), "sharey": True, "width_ratios": (3, 2)}
    figure, (time, saved) = plots.figure("One MoE layer, forward and backward", title(timed[0]), **options)
    label = "ms, median and 20th to 80th percentile"
    plots.bars(time, names, p50, p20, p80, xlabel=label, limit=1.05 * plots.limit_of(p80))
    plots.bars(saved, names, kept, xlabel="KB a token, kept for backward", limit=plots.limit_of(kept))
    plots.save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command("moe-bench layer", LayerConfig, layer, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
