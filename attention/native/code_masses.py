"""The CPU twin of `keysift.kvcache.ops.page_masses.code_masses`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from keysift.kvcache.ops.encode import Codes

from .cores import num_threads
from .library import DTYPES, PagesCall, kernels, level


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
    if not (supports(q, k, frames, positions) and own.dtype == torch.int32 and _fit(levels, bounds, scales, dim)):
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


def supports(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor) -> bool:
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
