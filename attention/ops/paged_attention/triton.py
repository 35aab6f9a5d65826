"""The Triton twin of `paged_attention`: one kernel attends over gathered pages, one merges the pieces of a list."""
# mypy: allow-untyped-calls

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from keysift.kvcache.ops.dispatch import UnsupportedCall
from keysift.kvcache.ops.triton import FLOATS, Config, Tile, channels, runs_here, shared_memory_of, stages_of

from .kernels import attend_kernel, merge_kernel

PIECE_TOKENS = 512


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frames: Tensor,
    pages: Tensor,
    starts: Tensor,
    *,
    queries_per_row: int,
    scale: float,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """See the reference; `UnsupportedCall` for unequal dtypes and for head dims that do not fit.

    A list that single tokens read is cut into pieces of a fixed number of pages: their count follows from P alone, so
    neither the other rows of a batch nor the padding of the list changes a bit of a row's result.
    """
    if not _supports(q, k, v):
        raise UnsupportedCall
    with torch.cuda.device_of(q):
        out, lse = _attend(q, k, v, frames, pages, starts.contiguous(), queries_per_row, scale, window or 2**31 - 1)
        return (out[0], lse[0]) if len(out) == 1 else _merge(out, lse, q.dtype)


def config(shared_memory: int, head_dim: int, dtype: torch.dtype, queries: int) -> Config:
    """For `queries` packed queries a row, on a device that grants a block `shared_memory` bytes."""
    tile = _tile(shared_memory, head_dim, dtype, queries)
    blocks = {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys, "BLOCK_P": 512, "BLOCK_D": channels(head_dim)}
    return Config(blocks, tile.options)


def _tile(shared_memory: int, head_dim: int, dtype: torch.dtype, queries: int) -> Tile:
    """A table and not a search at run time: the same call takes the same path on every machine of a kind.

    `tests/compile_kernels.py` holds each entry to its registers.
    """
    wide, stages = head_dim > 128, stages_of(shared_memory)
    if dtype == torch.float32:  # exact products miss NVIDIA's tensor cores and live in registers
        if head_dim > 64:
            return Tile(16, 16, 4, 1)
        return Tile(16, 32, 4, 1) if queries <= 16 else Tile(32, 32, 4, 1 if head_dim <= 16 else min(stages, 2))
    if queries <= 16:
        return Tile(16, 32 if wide else 64, 4, stages if head_dim <= 16 else min(stages + 1, 3))
    if wide:
        return Tile(64, 32, 8, stages)
    return Tile(128, 32, 8, 3) if head_dim > 64 and stages == 2 else Tile(128, 64, 8, stages)


def _supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        runs_here(q)
        and q.dtype in FLOATS
        and q.dtype == k.dtype == v.dtype
        and q.shape[2] % 8 == 0
        and q.shape[2] <= 256
        and q.stride(2) == k.stride(3) == v.stride(3) == 1
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frames: Tensor,
    pages: Tensor,
    starts: Tensor,
    queries_per_row: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Outputs [pieces, T, Hq, D], fp32 if there are several, and their lse [pieces, T, Hq]."""
    tokens, heads, dim = q.shape
    page_size, max_pages = k.shape[2], pages.shape[2]
    pack = heads // pages.shape[1]
    chosen = config(shared_memory_of(q.device), dim, q.dtype, queries_per_row * pack)
    size = max(1, PIECE_TOKENS // page_size) if queries_per_row * pack <= 16 else max(1, max_pages)
    pieces = max(1, triton.cdiv(max_pages, size))
    out = q.new_empty(pieces, tokens, heads, dim, dtype=q.dtype if pieces == 1 else torch.float32)
    lse = q.new_empty(pieces, tokens, heads, dtype=torch.float32)
    blocks = triton.cdiv(queries_per_row * pack, chosen.constants["BLOCK_M"])
    attend_kernel[(starts.shape[0] * pages.shape[1] * blocks, pieces)](
        *(q, k, v, frames, pages, starts, out, lse, scale / math.log(2), window, tokens, max_pages, size),
        *(*q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *frames.stride(), *pages.stride()),
        **{"M": queries_per_row, "Hq": heads, "G": heads // k.shape[1], "PACK": pack, "S": page_size, "D": dim},
        **chosen.all,
    )
    return out, lse


def _merge(pieces: Tensor, pieces_lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs [pieces, T, Hq, D] and lse [pieces, T, Hq] of disjoint page lists -> those of their union."""
    count, tokens, heads, dim = pieces.shape
    out = pieces.new_empty(tokens, heads, dim, dtype=dtype)
    lse = pieces_lse.new_empty(tokens, heads)
    merge_kernel[(tokens * heads,)](
        *(pieces, pieces_lse, out, lse, count, tokens * heads),
        D=dim,
        BLOCK_P=16,
        BLOCK_D=triton.next_power_of_2(dim),
        num_warps=4,
    )
    return out, lse
