"""Iterations that are not applied: the guard against spikes, and where the data of such an iteration is.

Which ones are skipped is decided in `step.Engine`, on numbers that all ranks have alike. What is here needs no rank of
its own but `losses_of_all_ranks`.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_engine.train.data import TrainLoader
from moe_engine.train.parallel import World, all_sum

HISTORY = 128  # applied iterations that a spike is held against
LEAST = 32  # of them, before anything is called a spike
_LISTED = 8  # ranks, and windows, that a line names


def not_finite(loss: float, grad_norm: float) -> str:
    """Which of the two numbers is not finite, in words; empty if both are."""
    bad = [f"{name} {value}" for name, value in _named(loss, grad_norm).items() if not math.isfinite(value)]
    return " and ".join(bad)


class SpikeGuard:
    """Tells an iteration whose loss or gradient norm is far above those of the iterations before it.

    Far is more than so many standard deviations above the mean of the last `HISTORY` applied iterations, of each of the
    two numbers by itself. Until `LEAST` are known, nothing is.

    Args:
        sigmas: how many standard deviations; 0 turns the guard off, and it then keeps no history.
    """

    def __init__(self, sigmas: float) -> None:
        self.sigmas = sigmas
        self._history: dict[str, deque[float]] = {name: deque(maxlen=HISTORY) for name in _named(0, 0)}

    def spike(self, loss: float, grad_norm: float) -> str:
        """What is a spike about these (finite) numbers, in words; empty if nothing is. Changes nothing."""
        found = []
        for name, value in _named(loss, grad_norm).items():
            known = self._history[name]
            if not self.sigmas or len(known) < LEAST:
                continue
            mean = statistics.fmean(known)
            deviation = statistics.pstdev(known, mean)
            if value > mean + self.sigmas * deviation:
                found.append(
                    f"{name} {value:.4g}, a spike: above {mean:.4g} + {self.sigmas:g} · {deviation:.2g} of the last "
                    f"{len(known)} applied iterations"
                )
        return " and ".join(found)

    def applied(self, loss: float, grad_norm: float) -> None:
        """Learn an iteration that was applied."""
        if self.sigmas:
            for name, value in _named(loss, grad_norm).items():
                self._history[name].append(value)

    def state_dict(self) -> dict[str, list[float]]:
        """The history, for a checkpoint: JSON-able, and floats come back from JSON to the last bit."""
        return {name: list(values) for name, values in self._history.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """The history of a checkpoint; an older one has none. A guard that is off forgets it."""
        for name, values in self._history.items():
            values.clear()
            values.extend(state.get(name, ()) if self.sigmas else ())


def losses_of_all_ranks(losses: Tensor, world: World) -> list[list[float]]:
    """Every rank's `(micro-steps)` losses, by rank; every rank must call it."""
    table = torch.zeros(world.size, losses.numel(), dtype=torch.float64, device=losses.device)
    table[world.rank] = losses  # the others add zeros to it, and NaN + 0 is NaN in this row only
    return all_sum(table, world).tolist()


def coordinates(loader: TrainLoader, losses: Sequence[Sequence[float]]) -> str:
    """Where the data of the loader's last iteration is, in a line of bounded length.

    It names the order positions of all ranks and, of the first micro-step of the first rank whose loss was not finite
    (else of the one with the highest loss), each window with its shard and the position of its first token there.

    Args:
        loader: just behind the iteration.
        losses: of all ranks, by rank and micro-step.
    """
    ranks, micro_steps, size = len(losses), len(losses[0]), loader.batch_size
    begin, _ = loader.read_by(0, micro_steps)
    epoch, place = divmod(begin, loader.dataset.num_windows)
    cells = {(rank, m): losses[rank][m] for rank in range(ranks) for m in range(micro_steps)}
    bad = [cell for cell, loss in cells.items() if not math.isfinite(loss)]
    if bad:
        bad_ranks = sorted({rank for rank, _ in bad})
        what = f"loss not finite on {_some('rank', bad_ranks)}"
        rank, micro_step = bad[0]
    else:
        rank, micro_step = max(cells, key=cells.__getitem__)
        what = f"highest loss, {cells[rank, micro_step]:.4g}, on rank {rank}"
    _, windows = loader.read_by(rank, micro_steps - micro_step)
    places = []
    for window in windows[:_LISTED].tolist():
        shard, token = loader.dataset.locate(window)
        places.append(f"{window} ({shard.name} at token {token})")
    more = f" and {len(windows) - _LISTED} more" if len(windows) > _LISTED else ""
    return (
        f"order positions {begin} to {begin + ranks * micro_steps * size - 1}, which begin at place {place} of epoch "
        f"{epoch} (rank r of {ranks} read {size} from {begin} + {ranks * size}·m + {size}·r in micro-step m); {what}; "
        f"windows of rank {rank} in micro-step {micro_step}: {', '.join(places)}{more}"
    )


def _named(loss: float, grad_norm: float) -> dict[str, float]:
    return {"loss": loss, "gradient norm": grad_norm}


def _some(noun: str, numbers: Sequence[Any]) -> str:
    listed = ", ".join(map(str, numbers[:_LISTED]))
    more = f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else ""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {listed}{more}"
