"""The CPU twin of `keysift.attention.ops.top_pages`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from keysift.kvcache.native.cores import num_threads
from keysift.kvcache.native.library import TopCall, kernels, level

from . import TopPages


def top_pages(
    masses: Tensor,
    firsts: Tensor,
    lasts: Tensor,
    *,
    heads: int,
    sinks: int,
    window: int,
    budget: int,
    epsilon: float,
) -> TopPages:
    """See the reference; `NotImplemented` off the CPU, for other dtypes and for odd strides."""
    rows, num_heads, pages = masses.shape
    if not supports(masses, firsts, lasts):
        return NotImplemented  # type: ignore[no-any-return]
    width = min(pages, sinks + window + budget)
    out = torch.empty((rows, heads, width), dtype=torch.int32)
    kept = torch.empty((rows, num_heads))
    call = TopCall(
        masses.data_ptr(),
        firsts.data_ptr(),
        lasts.data_ptr(),
        out.data_ptr(),
        kept.data_ptr(),
        rows,
        num_heads,
        heads,
        pages,
        width,
        sinks,
        min(budget, pages),
        epsilon,
    )
    kernels.keysift_top_pages(ctypes.byref(call), level(), num_threads())
    return TopPages(out, kept)


def supports(masses: Tensor, firsts: Tensor, lasts: Tensor) -> bool:
    return (
        masses.is_cpu
        and masses.dtype == torch.float32
        and firsts.dtype == lasts.dtype == torch.int32
        and masses.is_contiguous()
        and firsts.is_contiguous()
        and lasts.is_contiguous()
    )
