"""Attention on a GPU: PyTorch's FlexAttention, compiled, with sinks.

FlexAttention gives the output o and the log-sum-exp lse of the scores, and propagates the gradients of both. A sink s
then only scales: `o · e^lse / (e^lse + e^s) = o · sigmoid(lse − s)`, and the chain rule through o and lse is exact, the
sink's gradient included. The scaling is compiled with FlexAttention: backward keeps q, k, v, o and lse. Blocks in which
no query sees a key are neither loaded nor multiplied, forward or backward.

B = batch, T = tokens, Hq / Hkv = query / key-value heads, d = head_dim, n = T / 128 rounded up
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch._dynamo.config as dynamo_config
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128  # positions in a block of the mask; the kernels' tiles divide it
GRAPHS = 256  # that one process may compile; PyTorch's 8 are fewer than dtypes, batches and lengths come to
HEAD_DIMS = (16, 32, 64, 128)  # with 256, backward does not fit an A100's registers


def obstacle(head_dim: int, dtype: torch.dtype, triton_works: bool) -> str | None:
    """Why FlexAttention cannot serve such inputs on a GPU, or None where it can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention does not compute in {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"FlexAttention takes a head_dim of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return None if triton_works else "there is no working Triton"


def _triton_works() -> bool:
    try:
        from moe_engine.kernels import launch
    except ImportError:
        return False
    return launch.available() and not launch.INTERPRETED


@functools.cache
def _serves(head_dim: int, dtype: torch.dtype) -> bool:
    reason = obstacle(head_dim, dtype, _triton_works())
    if reason is not None:
        warnings.warn(f"attention is computed in plain operations, which is slow on a GPU: {reason}", stacklevel=4)
    return reason is None


# torch.compile looks through a cache and would trace the probe; so it is told to call this while it traces.
@torch.compiler.assume_constant_result
def serves(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether `attend` can serve such inputs on a GPU; where it cannot, a warning says why, once."""
    return _serves(head_dim, dtype)


def _visible(window: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query sees a key, as FlexAttention asks it."""

    def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def sliding(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return sliding if window else causal


def block_mask(length: int, window: int, device: torch.device) -> BlockMask:
    """The pairs of blocks that attention visits, and in which of them it masks single scores.

    Written down from block numbers, where PyTorch's `create_block_mask` looks at T × T scores. Of its tables, each row
    is a count `(1, 1, n)` and that many numbers of blocks, rising, `(1, 1, n, n)`, int32.

    Args:
        length: T.
        window: keys that a query sees, itself included; 0 for all before it.
        device: of the tables.
    """
    n = (length + BLOCK - 1) // BLOCK
    # How many blocks before its own a query may look into, and, counted from there, of how many it sees every key. Its
    # own block is always masked; for the full triangle it is the only one.
    reach, whole = ((window + BLOCK - 2) // BLOCK, max(window // BLOCK - 1, 0)) if window else (n, n)
    column = torch.arange(n, dtype=torch.int32, device=device)
    block = column[:, None]

    def row(count: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        # What stands behind the count is not read; it is kept in range all the same.
        return count.view(1, 1, -1), numbers.clamp(min=0).minimum(column[-1:])[None, None]

    def counts(room: Tensor) -> tuple[Tensor, Tensor]:
        """Unmasked blocks and masked ones beyond them, where the text has `room` more blocks in that direction."""
        return room.clamp(max=whole), (room.clamp(max=reach) - whole).clamp(min=0)

    full, edge = counts(block)  # of a block of queries, the keys before it
    kv_masked = row(edge + 1, torch.where(column < edge, block - whole - edge + column, block))
    kv_full = row(full, block - full + column) if whole else (None, None)
    full, edge = counts(n - 1 - block)  # of a block of keys, the queries after it
    q_masked = row(edge + 1, torch.where(column == 0, block, block + whole + column))
    q_full = row(full, block + 1 + column) if whole else (None, None)
    return BlockMask(
        (length, length), *kv_masked, *kv_full, *q_masked, *q_full, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=_visible(window)
    )


@functools.lru_cache(maxsize=64)
def _cached_block_mask(length: int, window: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):  # else a mask first needed in generation could not serve in training
        return block_mask(length, window, device)


def _attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: BlockMask) -> Tensor:
    out, aux = flex_attention(
        q,
        k,
        v,
        block_mask=mask,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
        # Left to choose, it takes its kernel for decoding below 128 tokens, and that fails with groups of 8.
        kernel_options={"BACKEND": "TRITON"},
    )
    if sinks is None:
        return out
    share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])
    return (out * share.unsqueeze(-1)).to(out.dtype)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """One for all layers.

    A graph for a dtype, sinks or none, sliding or full, with gradients or without, a batch of one or of more. A second
    length or batch compiles once or twice more, then for any. Beyond `GRAPHS` of them PyTorch raises: without
    `fullgraph`, what is not compiled would run in operations that hold T × T scores.
    """
    return torch.compile(_attend, fullgraph=True)


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int) -> Tensor:
    """`moe_engine.attention.attend`, for at least one token of inputs that it `serves`."""
    length = q.shape[2]
    window = 0 if window >= length else window
    if torch.compiler.is_compiling():  # which looks through the cache: the tables are a small kernel of its graph
        return _attend(q, k, v, sinks, block_mask(length, window, q.device))
    with dynamo_config.patch(recompile_limit=GRAPHS):
        return _compiled()(q, k, v, sinks, _cached_block_mask(length, window, q.device))
