"""`--deterministic`: a run in which every result is the same as in any other run of it on the same machines.

Our own code adds in a fixed order everywhere: the kernels have no atomics. What is left is the choice of algorithms in
PyTorch, cuBLAS and NCCL, and this is the switch for it. docs/training.md says what it means for the operations in use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from moe_engine.train.errors import InputError

# Read by the libraries when they start. A value that the user has set is kept.
# cuBLAS: with a workspace of its own for each stream, the split of a product does not depend on what else runs.
# NCCL: sums within NVLink's switches come in the order of their arrival; rings and trees add in a fixed one.
DEFAULTS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0"}
_WORKSPACES = (":4096:8", ":16:8")  # those that PyTorch accepts


@contextmanager
def mode(on: bool) -> Iterator[None]:
    """A context with deterministic algorithms, if `on`; everything is put back behind it.

    Enter it before CUDA and the process group start.

    Raises:
        InputError: CUBLAS_WORKSPACE_CONFIG is set to something that PyTorch would refuse later.
    """
    if not on:
        yield
        return
    environment = {name: os.environ.get(name, value) for name, value in DEFAULTS.items()}
    if (workspace := environment["CUBLAS_WORKSPACE_CONFIG"]) not in _WORKSPACES:
        raise InputError(
            f"--deterministic: expected CUBLAS_WORKSPACE_CONFIG {' or '.join(_WORKSPACES)}, or none, got {workspace}"
        )
    cudnn, fill = torch.backends.cudnn, torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before_cudnn, before_fill = cudnn.benchmark, fill.fill_uninitialized_memory
    with mock.patch.dict(os.environ, environment):
        torch.use_deterministic_algorithms(True)
        cudnn.benchmark = False
        # It writes NaN into every new tensor, so that reading one before it is written shows. Nothing here reads one,
        # as the tests with poisoned outputs hold, and writing all memory twice would cost time.
        fill.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            cudnn.benchmark, fill.fill_uninitialized_memory = before_cudnn, before_fill


def note() -> str:
    """What is in force, for the log."""
    given = ", ".join(f"{name}={os.environ[name]}" for name in DEFAULTS)
    return f"deterministic algorithms only ({given})"
