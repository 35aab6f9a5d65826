"""The Triton twin of `encode`."""
# mypy: allow-untyped-calls

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..dispatch import UnsupportedCall
from ..triton import Config, channels, runs_here
from . import Codes
from .kernels import encode_kernel


def encode(cache_k: Tensor, summaries: Tensor, frames: Tensor, codes: Codes) -> None:
    """See the reference, which writes the same bits; `UnsupportedCall` for channels that are not contiguous."""
    if not runs_here(cache_k) or any(tensor.stride(-1) != 1 for tensor in (cache_k, summaries, *codes)):
        raise UnsupportedCall
    _, heads, page_size, dim = cache_k.shape
    if not frames.numel():
        return
    with torch.cuda.device_of(cache_k):
        encode_kernel[(frames.shape[0], heads)](
            *(cache_k, summaries, frames.contiguous(), *codes),
            *(*cache_k.stride()[:3], *summaries.stride()[:3]),
            *(*codes.levels.stride()[:3], *codes.bounds.stride()[:3], *codes.scales.stride()[:2]),
            **{"S": page_size, "D": dim, "W": codes.levels.shape[2], "BITS": codes.bits},
            **config(dim, page_size).all,
        )


def config(dim: int, page_size: int) -> Config:
    """One head of one page, at most 16 slots at a time."""
    slots, width = min(16, triton.next_power_of_2(page_size)), channels(dim)
    # Without fusion a key on the border of two cells falls on the reference's side.
    options = {"num_warps": max(1, slots * width // 512), "enable_fp_fusion": False}
    return Config({"BLOCK_S": slots, "BLOCK_D": width}, options)
