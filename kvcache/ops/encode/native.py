"""The CPU twin of `encode`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native.calls import DTYPES, FillCall
from ...native.library import kernels, level
from ..dispatch import UnsupportedCall
from ..summarize.native import supports, threads_for
from . import Codes


def encode(cache_k: Tensor, summaries: Tensor, frames: Tensor, codes: Codes) -> None:
    """See the reference, which writes the same bits; `UnsupportedCall` as `summarize`, and for codes with strides."""
    filled, (_, heads, page_size, dim) = frames.shape[0], cache_k.shape
    levels, bounds, scales = codes
    if not (supports(cache_k, summaries, frames) and _supports(codes) and levels.shape[2] * 32 >= dim * codes.bits):
        raise UnsupportedCall
    call = FillCall.pack(
        k=cache_k,
        v=None,
        summaries=summaries,
        levels=levels,
        bounds=bounds,
        scales=scales,
        frames=frames,
        filled=filled,
        kv_heads=heads,
        dim=dim,
        page_size=page_size,
        words=levels.shape[2],
        bits=codes.bits,
        type=DTYPES[cache_k.dtype],
    )
    kernels.keysift_encode(call, level(), threads_for(filled * heads * page_size * dim))


def _supports(codes: Codes) -> bool:
    levels, bounds, scales = codes
    return (
        all(part.is_cpu for part in codes)
        and levels.dtype == torch.int32
        and bounds.dtype == torch.int8
        and scales.dtype == torch.float32
        and levels.stride(3) == bounds.stride(3) == scales.stride(2) == 1
    )
