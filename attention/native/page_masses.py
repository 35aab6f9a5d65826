"""The CPU twin of `keysift.kvcache.ops.page_masses.page_masses`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cores import num_threads
from .library import DTYPES, ScoresCall, kernels, level


def page_masses(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor, *, scale: float) -> Tensor:
    """See the reference; the masses of a head add up to 1. `NotImplemented` where `column_scores` does not fit."""
    rows, heads, dim = q.shape
    if not _supports(q, k, frames, positions):
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


def _supports(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor) -> bool:
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
