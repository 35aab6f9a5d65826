"""The Triton twin of `summarize`."""
# mypy: allow-untyped-calls

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..dispatch import UnsupportedCall
from ..triton import Config, runs_here
from .kernels import summarize_kernel


def summarize(summaries: Tensor, cache_k: Tensor, cache_v: Tensor, frames: Tensor) -> None:
    """See the reference; `UnsupportedCall` for channels that are not contiguous."""
    if not runs_here(cache_k) or any(tensor.stride(-1) != 1 for tensor in (summaries, cache_k, cache_v)):
        raise UnsupportedCall
    _, heads, page_size, dim = cache_k.shape
    with torch.cuda.device_of(cache_k):
        summarize_kernel[(frames.shape[0], heads)](
            *(summaries, cache_k, cache_v, frames.contiguous()),
            *(*summaries.stride()[:3], *cache_k.stride()[:3], *cache_v.stride()[:3]),
            **{"S": page_size, "D": dim},
            **config(dim, page_size).all,
        )


def config(dim: int, page_size: int) -> Config:
    """One head of one page."""
    return Config({"BLOCK_S": triton.next_power_of_2(page_size), "BLOCK_D": triton.next_power_of_2(dim)}, {})
