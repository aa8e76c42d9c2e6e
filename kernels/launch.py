"""What every launch needs: checks of the arguments, the target, the tiles.

Tiles come from a plain table: target, kernel, rows per expert. On request they are measured instead (`choose` with a
function to time): at most eight candidates, by a bucket of rows per expert, so that a new token count does not tune
again, and the result kept in a file beside Triton's own cache.

The rule for indices: what multiplies a stride is int64 first, since N·2F passes 2³¹ (`tests/kernels/test_int64.py`).

T = tokens, E = experts, K = top_k, N = T·K routed rows
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources, PTXASError
from triton.tools.tensor_descriptor import TensorDescriptor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _probe_kernel():
    pass


INTERPRETED = not isinstance(_probe_kernel, triton.runtime.JITFunction)
"""Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 when they were imported)."""


def power_of_2(n: int) -> int:
    """The least power of two that is at least n, for n ≥ 1; plain, since it is traced where blocks are counted."""
    return 1 << (n - 1).bit_length()


def check(ok: bool, name: str, expected: str, got: Any) -> None:
    """Raise ValueError naming the argument, what was expected and what came, unless ok."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],
    dtypes: torch.dtype | Collection[torch.dtype],
    like: Tensor | None = None,
) -> None:
    """Check a tensor argument: dimensions, dtype, contiguity and, with `like`, the device.

    Args:
        name: of the argument.
        tensor: its value.
        shape: a number where the size is fixed, a letter where it is free, e.g. `(8, "D", 128)`.
        dtypes: what is allowed.
        like: a tensor whose device it has to share.
    Raises:
        ValueError: it is not as described.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        isinstance(size, str) or size == actual for size, actual in zip(shape, tensor.shape, strict=True)
    )
    # Messages are made where they are needed: torch.compile cannot write the sizes that it keeps open into a text.
    if not fits:
        wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        check(False, name, f"shape {wanted}", tuple(tensor.shape))
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    check(tensor.dtype in allowed, name, " or ".join(str(d).removeprefix("torch.") for d in allowed), tensor.dtype)
    if not tensor.is_contiguous():
        check(False, name, "a contiguous tensor", f"strides {tuple(tensor.stride())}")
    if like is not None:
        check(tensor.device == like.device, name, f"a tensor on {like.device}", tensor.device)


def target() -> str:
    """What kernels compile for: `sm_80`, `sm_90`, …, `gfx942`, …, or `interpreter`.

    Raises:
        RuntimeError: there is no GPU.
    """
    if INTERPRETED:
        return "interpreter"
    current = driver.active.get_current_target()
    return f"sm_{current.arch}" if current.backend == "cuda" else str(current.arch)


def available() -> bool:
    """Whether kernels can run at all: the interpreter, or a GPU that Triton can use."""
    try:
        return bool(target())
    except RuntimeError:  # Triton's way to say that there is no GPU, or no compiler for its launcher
        return False


def on_device_of_arguments(op: Callable) -> Callable:
    """Make the device of an op's first tensor the current one while it launches: Triton looks at no tensor for it."""

    @functools.wraps(op)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        device = next(value for value in args if isinstance(value, Tensor)).device
        if device.type != "cuda":
            return op(*args, **kwargs)
        with torch.cuda.device(device):
            return op(*args, **kwargs)

    return wrapper


def check_device(name: str, tensor: Tensor) -> None:
    """Check that kernels can be launched on this tensor. For the launching functions, not for fake tensors.

    Raises:
        ValueError: a CPU tensor without the interpreter, or a GPU tensor with it.
    """
    if INTERPRETED:
        check(tensor.device.type == "cpu", name, "a CPU tensor (TRITON_INTERPRET is set)", tensor.device)
        return
    device = driver.active.get_active_torch_device().type if available() else "cuda"
    check(
        tensor.device.type == device, name, f"a {device} tensor (or TRITON_INTERPRET=1 and a CPU tensor)", tensor.device
    )


class Tile(NamedTuple):
    """How a GEMM kernel is cut: rows × columns of the output by a step along the sum, warps, pipeline stages.

    Attributes:
        GROUP_M: row tiles that go together through the column tiles, for L2.
        SUBTILES: parts of the tile that a fused epilogue works on in turn (1, 2, 4 or 8), to hold fewer registers; 0:
            the kernel has no such epilogue.
        descriptor: load the weights through a tensor descriptor (TMA).
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    SUBTILES: int = 0
    GROUP_M: int = 16
    descriptor: bool = False

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        options = self._asdict()
        del options["descriptor"]
        if not self.SUBTILES:
            del options["SUBTILES"]
        return options


KERNELS = ("up_forward", "gemm", "gemm_transposed", "down_backward", "weight_grad")
PARTIAL_M, SUM_N = 128, 128  # rows and columns of a program of the column sums, see row_sums.py

_INTERPRETER = {
    "up_forward": Tile(32, 64, 32, 4, 1, SUBTILES=2, GROUP_M=2),
    "gemm": Tile(32, 64, 32, 4, 1, GROUP_M=2),
    "gemm_transposed": Tile(32, 64, 32, 4, 1, GROUP_M=2),
    "down_backward": Tile(32, 64, 32, 4, 1, SUBTILES=4, GROUP_M=2),
    "weight_grad": Tile(64, 64, 32, 4, 1, GROUP_M=2),
}
_FP32 = {  # tensor cores would round to tf32: these products run on the ordinary units
    "up_forward": Tile(64, 64, 32, 8, 2, SUBTILES=1),
    "gemm": Tile(64, 64, 32, 8, 2),
    "gemm_transposed": Tile(64, 64, 32, 8, 2),
    "down_backward": Tile(64, 64, 32, 8, 2, SUBTILES=1),
    "weight_grad": Tile(64, 64, 32, 8, 2),
}
_A100 = {
    "up_forward": Tile(128, 256, 64, 8, 3, SUBTILES=2),
    "gemm": Tile(128, 128, 64, 8, 4),
    "gemm_transposed": Tile(128, 128, 64, 8, 4),
    "down_backward": Tile(128, 128, 64, 8, 3, SUBTILES=4),
    "weight_grad": Tile(128, 256, 32, 8, 7, GROUP_M=8),
}
_H100 = {
    "up_forward": Tile(128, 256, 64, 8, 3, SUBTILES=1, descriptor=True),
    "gemm": Tile(128, 256, 64, 8, 4, descriptor=True),
    "gemm_transposed": Tile(128, 256, 64, 8, 4, descriptor=True),
    "down_backward": Tile(128, 128, 64, 8, 4, SUBTILES=4, descriptor=True),
    "weight_grad": Tile(128, 256, 64, 8, 5, GROUP_M=8),
}
_B200 = _H100 | {
    "up_forward": Tile(128, 256, 64, 8, 3, SUBTILES=2, descriptor=True),
    "down_backward": Tile(128, 128, 64, 8, 4, SUBTILES=8, descriptor=True),
}
_SMALL_SHARED_MEMORY = {  # 100 KB a block: sm_86, sm_89, sm_120
    "up_forward": Tile(128, 128, 32, 8, 3, SUBTILES=2),
    "gemm": Tile(128, 128, 32, 8, 3),
    "gemm_transposed": Tile(128, 128, 32, 8, 3),
    "down_backward": Tile(128, 128, 32, 8, 3, SUBTILES=4),
    "weight_grad": Tile(128, 128, 32, 8, 3, GROUP_M=8),
}
_MI300X = {  # 64 KB of LDS
    "up_forward": Tile(128, 128, 64, 8, 2, SUBTILES=2),
    "gemm": Tile(128, 128, 64, 8, 2),
    "gemm_transposed": Tile(128, 128, 64, 8, 2),
    "down_backward": Tile(128, 128, 64, 8, 2, SUBTILES=4),
    "weight_grad": Tile(128, 128, 64, 8, 2, GROUP_M=8),
}
_TABLE = {
    "sm_80": _A100,
    "sm_90": _H100,
    "sm_100": _B200,
    "sm_103": _B200,
    "gfx942": _MI300X,
    "interpreter": _INTERPRETER,
}


def bucket(rows_per_expert: int) -> int:
    """The power of two that stands for a number of rows per expert, 32 to 8192."""
    return min(max(triton.next_power_of_2(max(rows_per_expert, 1)), 32), 8192)


def default_tile(kernel: str, dtype: torch.dtype, rows_per_expert: int) -> Tile:
    """The table's tile for a kernel on the present target."""
    name = target()
    if name != "interpreter" and dtype == torch.float32:
        return _FP32[kernel]
    tile = _TABLE.get(name, _SMALL_SHARED_MEMORY if name.startswith("sm_") else _MI300X)[kernel]
    if kernel != "weight_grad" and bucket(rows_per_expert) <= 64 < tile.BLOCK_M:
        tile = tile._replace(BLOCK_M=64)  # few rows: half of a full tile's would be empty
    return tile


def candidates(kernel: str, dtype: torch.dtype, rows_per_expert: int) -> list[Tile]:
    """At most eight tiles worth measuring, the table's own first: other depths of the pipeline, widths, orders."""
    tile = default_tile(kernel, dtype, rows_per_expert)
    narrow = tile._replace(BLOCK_N=tile.BLOCK_N // 2, SUBTILES=min(tile.SUBTILES, 2))
    found = [tile, tile._replace(GROUP_M=4), narrow, narrow._replace(GROUP_M=4)]
    if tile.num_stages > 2:
        found += [tile._replace(num_stages=tile.num_stages - 1), narrow._replace(num_stages=tile.num_stages + 1)]
    if tile.BLOCK_M == 128:
        found.append(tile._replace(BLOCK_M=64))
    if tile.descriptor:
        found.append(tile._replace(descriptor=False))
    return found


def weight_descriptor(w: Tensor, tile: Tile, transposed: bool) -> TensorDescriptor | None:
    """A descriptor of `w (E, A, B)` for a tile's loads; None where the tile wants none or alignment forbids it."""
    if not tile.descriptor or w.shape[2] * w.element_size() % 16 or w.data_ptr() % 16:
        return None
    block = [1, tile.BLOCK_N, tile.BLOCK_K] if transposed else [1, tile.BLOCK_K, tile.BLOCK_N]
    experts, rows, columns = w.shape
    # The strides are spelled out: those of a dimension of size 1 may be anything in a contiguous tensor.
    return TensorDescriptor(w, [experts, rows, columns], [rows * columns, columns, 1], block)


def choose(
    kernel: str,
    dtype: torch.dtype,
    rows_per_expert: int,
    columns: int,
    depth: int,
    run: Callable[[Tile], None] | None = None,
) -> Tile:
    """The tile for a launch.

    Args:
        kernel: one of `KERNELS`.
        dtype: of the operands.
        rows_per_expert: N / E.
        columns, depth: of the product.
        run: launches the kernel with a tile: then the candidates are timed, once for a bucket, unless a CUDA graph is
            being captured. None: the table's tile.
    """
    if run is None or INTERPRETED or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return default_tile(kernel, dtype, rows_per_expert)
    return _tuned(kernel, dtype, rows_per_expert, columns, depth, run)


_TUNED: dict[str, Tile] = {}


def _cache_file() -> Path:
    return Path(triton.knobs.cache.dir) / "moe_engine_tiles.json"


def _read_cache(path: Path) -> dict[str, list]:
    """What the file holds; nothing where it is missing, closed to us, or not ours: then tiles are measured."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # ValueError: not JSON, or not text
        return {}
    return content if isinstance(content, dict) else {}


def _tuned(
    kernel: str, dtype: torch.dtype, rows_per_expert: int, columns: int, depth: int, run: Callable[[Tile], None]
) -> Tile:
    """The fastest candidate: remembered, read from the file, or measured and written there."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else target()
    name = str(dtype).removeprefix("torch.")
    key = f"{device}, triton {triton.__version__}, {kernel}, {name}, {bucket(rows_per_expert)}, {columns} x {depth}"
    if key not in _TUNED:
        path = _cache_file()
        stored = _read_cache(path)
        found = [tile for tile in candidates(kernel, dtype, rows_per_expert) if list(tile) == stored.get(key)]
        if not found:
            found = [_measure(candidates(kernel, dtype, rows_per_expert), run)]
            try:
                _write_cache(path, _read_cache(path) | {key: list(found[0])})
            except OSError as error:
                warnings.warn(f"tiles are measured again next time: {path}: {error.strerror}", stacklevel=2)
        _TUNED[key] = found[0]
    return _TUNED[key]


def _measure(tiles: list[Tile], run: Callable[[Tile], None]) -> Tile:
    """The fastest tile, the earlier of equals. Tiles that the device or its assembler has no room for are left out.

    Raises:
        RuntimeError: no tile fits.
    """
    times: dict[Tile, float] = {}
    for tile in tiles:
        try:
            times[tile] = triton.testing.do_bench(lambda tile=tile: run(tile), return_mode="median")
        except (OutOfResources, PTXASError) as error:
            refusal = error
    if not times:
        raise RuntimeError(f"autotune: none of {len(tiles)} tiles fits on this device; the last: {refusal}")
    return min(times, key=times.__getitem__)


def _write_cache(path: Path, content: dict[str, list]) -> None:
    """Replace the file at once, so that other processes read the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1)
    os.chmod(temporary, 0o644)  # for whoever shares the folder
    os.replace(temporary, path)
