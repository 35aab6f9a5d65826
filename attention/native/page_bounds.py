"""The CPU twin of `keysift.kvcache.ops.page_masses.page_bounds`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .code_masses import supports
from .cores import num_threads
from .library import DTYPES, PagesCall, kernels, level


def page_bounds(
    q: Tensor, k: Tensor, own: Tensor, summaries: Tensor, frames: Tensor, positions: Tensor, *, scale: float
) -> Tensor:
    """See the reference; `NotImplemented` off the CPU, for odd strides and for head dims that are no multiple of 16."""
    rows, heads, dim = q.shape
    same = summaries.dtype == q.dtype and own.dtype == torch.int32
    if not (supports(q, k, frames, positions) and same and summaries.is_contiguous()):
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
