"""The CPU twin of `keysift.attention.ops.paged_attention`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from keysift.kvcache.native.cores import num_threads
from keysift.kvcache.native.library import DTYPES, AttentionCall, kernels, level


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
    """See the reference; `NotImplemented` off the CPU, for unequal dtypes and for head dims that do not fit."""
    if not _supports(q, k, v, frames, pages, starts, queries_per_row):
        return NotImplemented  # type: ignore[no-any-return]
    starts = starts.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    call = AttentionCall(
        *(tensor.data_ptr() for tensor in (q, k, v, frames, pages, starts, out, lse)),
        *(tensor.stride()[:axes] for tensor, axes in ((q, 2), (k, 3), (v, 3), (frames, 3), (pages, 3))),
        q.shape[0],
        q.shape[1],
        k.shape[1],
        pages.shape[1],
        q.shape[2],
        k.shape[2],
        starts.shape[0],
        pages.shape[2],
        queries_per_row,
        window,
        DTYPES[q.dtype],
        scale,
    )
    kernels.keysift_paged_attention(ctypes.byref(call), level(), num_threads())
    return out, lse


def _supports(
    q: Tensor, k: Tensor, v: Tensor, frames: Tensor, pages: Tensor, starts: Tensor, queries_per_row: int
) -> bool:
    return (
        all(tensor.device.type == "cpu" for tensor in (q, k, v, frames, pages, starts))
        and all(tensor.dtype == q.dtype and tensor.stride(-1) == 1 for tensor in (q, k, v))
        and all(tensor.dtype == torch.int32 for tensor in (frames, pages, starts))
        and q.dtype in DTYPES
        and q.shape[2] % 8 == 0
        and 0 < q.shape[2] <= 256
        and q.shape[0] <= starts.shape[0] * queries_per_row < q.shape[0] + queries_per_row
    )
