"""The Triton twin of `fetch`: the GPU reads pinned host memory itself, so the host need not know what is missing."""
# mypy: allow-untyped-calls

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..dispatch import UnsupportedCall
from ..triton import Config, runs_here
from .kernels import fetch_kernel


def fetch(pool: Tensor, extents: Sequence[Tensor], layer: int, loads: Tensor, slots: Tensor) -> None:
    """See the reference; `UnsupportedCall` for pages that are no multiple of 4 bytes, and odd strides. One launch."""
    kv_heads, width = loads.shape
    words, odd = divmod(pool[0, 0].numel() * pool.element_size(), 4)
    if not runs_here(pool) or odd or not all(tensor.is_contiguous() for tensor in (pool, loads, slots)):
        raise UnsupportedCall
    if not width:
        return
    size = extents[0].shape[1]
    with torch.cuda.device_of(pool):
        bases = _bases(tuple(extent.data_ptr() for extent in extents), pool.device)
        fetch_kernel[(kv_heads * width,)](
            *(pool.view(torch.int32), bases, loads, slots, layer * size * kv_heads * words),
            **{"Hkv": kv_heads, "E": size, "W": width, "WORDS": words},
            **config(words).all,
        )


def config(words: int) -> Config:
    """One head of one page of so many 4-byte words; at most 32 words of each thread, in reads of 16 bytes."""
    return Config({"BLOCK": min(1024, triton.next_power_of_2(words))}, {})


@functools.lru_cache(maxsize=4)
def _bases(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """[extents] int64 on the device, copied there when the store has grown, not for every layer of every token."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)
