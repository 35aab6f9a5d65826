"""The Triton twin of `store`."""
# mypy: allow-untyped-calls

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..dispatch import UnsupportedCall
from ..triton import Config, runs_here
from .kernels import store_kernel


def store(cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """See the reference; `UnsupportedCall` for channels that are not contiguous."""
    if not runs_here(k) or any(tensor.stride(-1) != 1 for tensor in (cache_k, cache_v, k, v)):
        raise UnsupportedCall
    tokens, heads, dim = k.shape
    with torch.cuda.device_of(k):
        store_kernel[(tokens,)](
            *(cache_k, cache_v, k, v, slots.contiguous()),
            *(*cache_k.stride()[:3], *cache_v.stride()[:3], *k.stride()[:2], *v.stride()[:2]),
            **{"H": heads, "S": cache_k.shape[2], "D": dim},
            **config(heads, dim).all,
        )


def config(heads: int, dim: int) -> Config:
    """One token's key and value of all heads."""
    return Config({"BLOCK_H": triton.next_power_of_2(heads), "BLOCK_D": triton.next_power_of_2(dim)}, {})
