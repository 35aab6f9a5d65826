"""The CPU twins of `page_masses`, `code_masses` and `page_bounds`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native.calls import DTYPES, PagesCall, ScoresCall
from ...native.cores import num_threads
from ...native.library import kernels, level
from ..dispatch import UnsupportedCall
from ..encode import Codes


def page_masses(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor, *, scale: float) -> Tensor:
    """See the reference; the masses of a head add up to 1. `UnsupportedCall` as `column_scores`."""
    if not _supports(q, k, frames, positions, channels=8):
        raise UnsupportedCall
    (rows, heads, dim), (_, kv_heads, page_size, _), pages = q.shape, k.shape, frames.shape[2]
    mass, peak = torch.zeros((2, rows, heads, pages))  # a probe of one query has its mass as its peak
    call = ScoresCall.pack(
        q=q,
        k=k,
        frames=frames,
        positions=positions,
        mass=mass,
        peak=peak,
        bands=None,
        probes=rows,
        queries_per_probe=1,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_size=page_size,
        pages=pages,
        type=DTYPES[q.dtype],
        scale=scale,
    )
    kernels.keysift_column_scores(call, level(), num_threads())
    masses: Tensor = mass.log_()
    return masses


def code_masses(
    q: Tensor,
    k: Tensor,
    own: Tensor,
    codes: Codes,
    frames: Tensor,
    positions: Tensor,
    *,
    scale: float,
    candidates: int,
    slack: float = 0.35,
) -> Tensor:
    """See the reference; `UnsupportedCall` off the CPU, for odd strides and for head dims that are no multiple of 16.

    Queries are multiplied in 16 bits.
    """
    (rows, heads, dim), (_, kv_heads, page_size, _), pages = q.shape, k.shape, frames.shape[2]
    if not (_supports(q, k, frames, positions) and _supports_own(own) and _supports_codes(codes, dim)):
        raise UnsupportedCall
    masses = torch.empty((rows, heads, pages))
    call = PagesCall.pack(
        q=q,
        k=k,
        own=own,
        summaries=None,
        levels=codes.levels,
        bounds=codes.bounds,
        scales=codes.scales,
        frames=frames,
        positions=positions,
        masses=masses,
        rows=rows,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_size=page_size,
        pages=pages,
        words=codes.levels.shape[2],
        candidates=candidates,
        type=DTYPES[q.dtype],
        scale=scale,
        slack=slack,
    )
    kernels.keysift_code_masses(call, level(), num_threads())
    return masses


def page_bounds(
    q: Tensor, k: Tensor, own: Tensor, summaries: Tensor, frames: Tensor, positions: Tensor, *, scale: float
) -> Tensor:
    """See the reference; `UnsupportedCall` as `code_masses`."""
    (rows, heads, dim), (_, kv_heads, page_size, _), pages = q.shape, k.shape, frames.shape[2]
    plain = summaries.dtype == q.dtype and summaries.is_cpu and summaries.is_contiguous()
    if not (_supports(q, k, frames, positions) and _supports_own(own) and plain):
        raise UnsupportedCall
    masses = torch.empty((rows, heads, pages))
    call = PagesCall.pack(
        q=q,
        k=k,
        own=own,
        summaries=summaries,
        levels=None,
        bounds=None,
        scales=None,
        frames=frames,
        positions=positions,
        masses=masses,
        rows=rows,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_size=page_size,
        pages=pages,
        words=0,
        candidates=0,
        type=DTYPES[q.dtype],
        scale=scale,
        slack=0.0,
    )
    kernels.keysift_page_bounds(call, level(), num_threads())
    return masses


def _supports(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor, channels: int = 16) -> bool:
    """Support of the kernels that read pages for single queries, of head dims that are a multiple of `channels`."""
    dtype, dim = q.dtype, q.shape[2]
    return (
        dtype in DTYPES
        and k.dtype == dtype
        and frames.dtype == positions.dtype == torch.int32
        and all(tensor.is_cpu for tensor in (q, k, frames, positions))
        and q.stride(2) == k.stride(3) == 1
        and positions.is_contiguous()
        and dim % channels == 0
        and 0 < dim <= 256
    )


def _supports_own(own: Tensor) -> bool:
    return own.is_cpu and own.dtype == torch.int32


def _supports_codes(codes: Codes, dim: int) -> bool:
    levels, bounds, scales = codes
    return (
        levels.shape[2] * 16 in (dim, 2 * dim)  # 2 and 4 bits
        and all(part.is_cpu and part.is_contiguous() for part in codes)
        and (levels.dtype, bounds.dtype, scales.dtype) == (torch.int32, torch.int8, torch.float32)
    )
