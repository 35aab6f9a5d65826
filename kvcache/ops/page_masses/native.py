"""The CPU twins of `page_masses`, `code_masses` and `page_bounds`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...native.cores import num_threads
from ...native.library import DTYPES, PagesCall, ScoresCall, kernels, level
from ..encode import Codes


def page_masses(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor, *, scale: float) -> Tensor:
    """See the reference; the masses of a head add up to 1. `NotImplemented` where `column_scores` does not fit."""
    rows, heads, dim = q.shape
    if not _fits_scores(q, k, frames, positions):
        return NotImplemented  # type: ignore[no-any-return]
    pages = frames.shape[2]
    mass, peak = torch.zeros((2, rows, heads, pages))  # a probe of one query has its mass as its peak
    call = ScoresCall(
        q.data_ptr(),
        k.data_ptr(),
        frames.data_ptr(),
        positions.data_ptr(),
        mass.data_ptr(),
        peak.data_ptr(),
        None,
        q.stride()[:2],
        k.stride()[:3],
        frames.stride(),
        rows,
        1,
        heads,
        k.shape[1],
        dim,
        k.shape[2],
        pages,
        DTYPES[q.dtype],
        scale,
    )
    kernels.keysift_column_scores(ctypes.byref(call), level(), num_threads())
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
    """See the reference; `NotImplemented` off the CPU, for odd strides and for head dims that are no multiple of 16.

    Queries are multiplied in 16 bits.
    """
    rows, heads, dim = q.shape
    levels, bounds, scales = codes
    words = levels.shape[2]
    if not (_fits_scan(q, k, frames, positions) and own.dtype == torch.int32 and _fit(levels, bounds, scales, dim)):
        return NotImplemented  # type: ignore[no-any-return]
    masses = torch.empty((rows, heads, frames.shape[2]))
    call = PagesCall(
        q.data_ptr(),
        k.data_ptr(),
        own.data_ptr(),
        None,
        levels.data_ptr(),
        bounds.data_ptr(),
        scales.data_ptr(),
        frames.data_ptr(),
        positions.data_ptr(),
        masses.data_ptr(),
        q.stride()[:2],
        k.stride()[:3],
        frames.stride(),
        own.stride(),
        rows,
        heads,
        k.shape[1],
        dim,
        k.shape[2],
        frames.shape[2],
        words,
        candidates,
        DTYPES[q.dtype],
        scale,
        slack,
    )
    kernels.keysift_code_masses(ctypes.byref(call), level(), num_threads())
    return masses


def page_bounds(
    q: Tensor, k: Tensor, own: Tensor, summaries: Tensor, frames: Tensor, positions: Tensor, *, scale: float
) -> Tensor:
    """See the reference; `NotImplemented` off the CPU, for odd strides and for head dims that are no multiple of 16."""
    rows, heads, dim = q.shape
    same = summaries.dtype == q.dtype and own.dtype == torch.int32
    if not (_fits_scan(q, k, frames, positions) and same and summaries.is_contiguous()):
        return NotImplemented  # type: ignore[no-any-return]
    masses = torch.empty((rows, heads, frames.shape[2]))
    call = PagesCall(
        q.data_ptr(),
        k.data_ptr(),
        own.data_ptr(),
        summaries.data_ptr(),
        None,
        None,
        None,
        frames.data_ptr(),
        positions.data_ptr(),
        masses.data_ptr(),
        q.stride()[:2],
        k.stride()[:3],
        frames.stride(),
        own.stride(),
        rows,
        heads,
        k.shape[1],
        dim,
        k.shape[2],
        frames.shape[2],
        0,
        0,
        DTYPES[q.dtype],
        scale,
        0.0,
    )
    kernels.keysift_page_bounds(ctypes.byref(call), level(), num_threads())
    return masses


def _fits_scores(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor) -> bool:
    dtype, dim = q.dtype, q.shape[2]
    return (
        dtype in DTYPES
        and k.dtype == dtype
        and frames.dtype == positions.dtype == torch.int32
        and q.is_cpu
        and k.is_cpu
        and q.stride(2) == k.stride(3) == 1
        and positions.is_contiguous()
        and dim % 8 == 0
        and 0 < dim <= 256
    )


def _fits_scan(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor) -> bool:
    """Whether the kernels that scan pages know how to read these."""
    dtype, dim = q.dtype, q.shape[2]
    return (
        dtype in DTYPES
        and k.dtype == dtype
        and frames.dtype == positions.dtype == torch.int32
        and q.is_cpu
        and k.is_cpu
        and q.stride(2) == k.stride(3) == 1
        and positions.is_contiguous()
        and dim % 16 == 0
        and 0 < dim <= 256
    )


def _fit(levels: Tensor, bounds: Tensor, scales: Tensor, dim: int) -> bool:
    return (
        levels.shape[2] * 16 in (dim, 2 * dim)  # 2 and 4 bits
        and levels.is_cpu
        and levels.is_contiguous()
        and bounds.is_contiguous()
        and scales.is_contiguous()
    )
