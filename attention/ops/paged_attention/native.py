"""The CPU twin of `paged_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.kvcache.native.calls import DTYPES, AttentionCall
from keysift.kvcache.native.cores import num_threads
from keysift.kvcache.native.library import kernels, level
from keysift.kvcache.ops.dispatch import UnsupportedCall


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
    """See the reference; `UnsupportedCall` off the CPU, for unequal dtypes and for head dims that do not fit."""
    if not _supports(q, k, v, frames, pages, starts, queries_per_row):
        raise UnsupportedCall
    (tokens, heads, dim), (_, kv_heads, page_size, _), (_, lists, listed) = q.shape, k.shape, pages.shape
    starts = starts.contiguous()
    out = torch.empty((tokens, heads, dim), dtype=q.dtype)
    lse = torch.empty((tokens, heads), dtype=torch.float32)
    call = AttentionCall.pack(
        q=q,
        k=k,
        v=v,
        frames=frames,
        pages=pages,
        starts=starts,
        out=out,
        lse=lse,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        lists=lists,
        dim=dim,
        page_size=page_size,
        rows=starts.shape[0],
        pages_per_list=listed,
        queries_per_row=queries_per_row,
        window=window,
        type=DTYPES[q.dtype],
        scale=scale,
    )
    kernels.keysift_paged_attention(call, level(), num_threads())
    return out, lse


def _supports(
    q: Tensor, k: Tensor, v: Tensor, frames: Tensor, pages: Tensor, starts: Tensor, queries_per_row: int
) -> bool:
    (tokens, _, dim), dtype, rows = q.shape, q.dtype, starts.shape[0]
    return (
        all(tensor.is_cpu for tensor in (q, k, v, frames, pages, starts))
        and all(tensor.dtype == dtype and tensor.stride(-1) == 1 for tensor in (q, k, v))
        and all(tensor.dtype == torch.int32 for tensor in (frames, pages, starts))
        and dtype in DTYPES
        and dim % 8 == 0
        and 0 < dim <= 256
        and tokens <= rows * queries_per_row < tokens + queries_per_row
    )
