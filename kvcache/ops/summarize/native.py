"""The CPU twin of `summarize`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native.calls import DTYPES, FillCall
from ...native.cores import num_threads
from ...native.library import kernels, level
from ..dispatch import UnsupportedCall

CHANNELS_OF_ONE_THREAD = 2**18
"""Channels of keys that one thread has finished before a second one would have started."""


def summarize(summaries: Tensor, cache_k: Tensor, cache_v: Tensor, frames: Tensor) -> None:
    """See the reference; `UnsupportedCall` off the CPU, for unequal dtypes and for channels that are not contiguous."""
    if not (supports(cache_k, summaries, frames) and supports(cache_v, summaries, frames)):
        raise UnsupportedCall
    filled, (_, heads, page_size, dim) = frames.shape[0], cache_k.shape
    call = FillCall.pack(
        k=cache_k,
        v=cache_v,
        summaries=summaries,
        levels=None,
        bounds=None,
        scales=None,
        frames=frames,
        filled=filled,
        kv_heads=heads,
        dim=dim,
        page_size=page_size,
        words=0,
        bits=0,
        type=DTYPES[cache_k.dtype],
    )
    kernels.keysift_summarize(call, level(), threads_for(filled * heads * page_size * dim))


def supports(cache: Tensor, summaries: Tensor, frames: Tensor) -> bool:
    """Support of the kernels for full pages: `summarize` and `encode`."""
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
    """Threads that pay for so many channels of keys."""
    return 1 if channels <= CHANNELS_OF_ONE_THREAD else num_threads()
