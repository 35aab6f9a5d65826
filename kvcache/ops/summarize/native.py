"""The CPU twin of `keysift.kvcache.ops.summarize`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...native.cores import num_threads
from ...native.library import DTYPES, FillCall, kernels, level

ALONE = 2**18
"""Channels of keys that one thread is through with before a second one would have begun."""


def summarize(summaries: Tensor, cache_k: Tensor, cache_v: Tensor, frames: Tensor) -> None:
    """See the reference; `NotImplemented` off the CPU, for unequal dtypes and for channels that lie apart."""
    if not (supports(cache_k, summaries, frames) and supports(cache_v, summaries, frames)):
        return NotImplemented  # type: ignore[no-any-return]
    _, heads, page_size, dim = cache_k.shape
    filled = frames.shape[0]
    call = FillCall(
        cache_k.data_ptr(),
        cache_v.data_ptr(),
        summaries.data_ptr(),
        None,
        None,
        None,
        frames.data_ptr(),
        cache_k.stride()[:3],
        cache_v.stride()[:3],
        summaries.stride()[:3],
        (0, 0, 0),
        (0, 0, 0),
        (0, 0),
        filled,
        heads,
        dim,
        page_size,
        0,
        0,
        DTYPES[cache_k.dtype],
    )
    kernels.keysift_summarize(ctypes.byref(call), level(), threads_for(filled * heads * page_size * dim))
    return None


def supports(cache: Tensor, summaries: Tensor, frames: Tensor) -> bool:
    """Whether the kernels that see to full pages know how to read these."""
    return (
        cache.is_cpu
        and summaries.is_cpu
        and frames.is_cpu
        and cache.dtype in DTYPES
        and summaries.dtype == cache.dtype
        and frames.dtype == torch.int64
        and cache.stride(3) == summaries.stride(3) == 1
        and frames.is_contiguous()
    )


def threads_for(channels: int) -> int:
    """How many threads are worth waking for so many channels of keys."""
    return 1 if channels <= ALONE else num_threads()
