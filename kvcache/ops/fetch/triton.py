"""The CUDA twin of `fetch`: the GPU reads pinned host memory itself, so that nobody has to know what is missing."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
BLOCK = 1024
"""Words of 4 bytes that a program copies at once: 32 of each thread's, in reads of 16 bytes."""


@triton.jit
def fetch_kernel(
    pool, bases, loads, places, first,
    Hkv: tl.constexpr, E: tl.constexpr, W: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one page, WORDS words of 4 bytes. Extents are at `bases`, the layer in each `first` words on."""
    i = tl.program_id(0)
    i_h = i // W
    frame = tl.load(loads + i).to(tl.int64)
    if frame >= 0:
        slot = tl.load(places + i).to(tl.int64)
        base = tl.load(bases + frame // E).to(tl.pointer_type(tl.int32))
        p_from = base + first + ((frame % E) * Hkv + i_h) * WORDS
        p_to = pool + (slot * Hkv + i_h) * WORDS
        for start in range(0, WORDS, BLOCK):
            o = start + tl.arange(0, BLOCK)
            tl.store(p_to + o, tl.load(p_from + o, mask=o < WORDS), mask=o < WORDS)


@functools.lru_cache(maxsize=4)
def _bases(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """[extents] int64 on the device, copied there when the home has grown, not for every layer of every token."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def fetch(pool: Tensor, extents: Sequence[Tensor], layer: int, loads: Tensor, slots: Tensor) -> None:
    """The twin of the reference of the same name, which documents it. One launch, whatever is missing."""
    kv_heads, width = loads.shape
    words, odd = divmod(pool[0, 0].numel() * pool.element_size(), 4)
    if not (pool.is_cuda or INTERPRETED) or odd or not all(t.is_contiguous() for t in (pool, loads, slots)):
        return NotImplemented  # type: ignore[no-any-return]
    if not width:
        return None
    size = extents[0].shape[1]
    with torch.cuda.device_of(pool):
        bases = _bases(tuple(extent.data_ptr() for extent in extents), pool.device)
        fetch_kernel[(kv_heads * width,)](
            *(pool.view(torch.int32), bases, loads, slots, layer * size * kv_heads * words),
            Hkv=kv_heads,
            E=size,
            W=width,
            WORDS=words,
            BLOCK=min(BLOCK, triton.next_power_of_2(words)),
        )
    return None
