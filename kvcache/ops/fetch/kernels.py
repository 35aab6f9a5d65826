"""The Triton kernel of `fetch`."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


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
