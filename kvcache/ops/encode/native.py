"""The CPU twin of `keysift.kvcache.ops.encode`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...native.library import DTYPES, FillCall, kernels, level
from ..summarize.native import supports, threads_for
from . import Codes


def encode(cache_k: Tensor, summaries: Tensor, frames: Tensor, codes: Codes) -> None:
    """See the reference, which writes the same bits; `NotImplemented` where `summarize` is or codes lie apart."""
    _, heads, page_size, dim = cache_k.shape
    levels, bounds, scales = codes
    words, bits, filled = levels.shape[2], codes.bits, frames.shape[0]
    if not (supports(cache_k, summaries, frames) and _fit(codes) and words * 32 >= dim * bits):
        return NotImplemented  # type: ignore[no-any-return]
    call = FillCall(
        cache_k.data_ptr(),
        None,
        summaries.data_ptr(),
        levels.data_ptr(),
        bounds.data_ptr(),
        scales.data_ptr(),
        frames.data_ptr(),
        cache_k.stride()[:3],
        (0, 0, 0),
        summaries.stride()[:3],
        levels.stride()[:3],
        bounds.stride()[:3],
        scales.stride()[:2],
        filled,
        heads,
        dim,
        page_size,
        words,
        bits,
        DTYPES[cache_k.dtype],
    )
    kernels.keysift_encode(ctypes.byref(call), level(), threads_for(filled * heads * page_size * dim))
    return None


def _fit(codes: Codes) -> bool:
    levels, bounds, scales = codes
    return (
        levels.is_cpu
        and levels.dtype == torch.int32
        and bounds.dtype == torch.int8
        and scales.dtype == torch.float32
        and levels.stride(3) == bounds.stride(3) == scales.stride(2) == 1
    )
