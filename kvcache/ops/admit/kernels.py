"""The Triton kernels of `admit`."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def listed(pages, frames, first, E, LP, Hkv, L, stride_fr, stride_fh, stride_fp, BLOCK: tl.constexpr):
    """Rows, KV heads, pages, store frames and mask of a block of the selection's E entries, LP of them of one row."""
    o = first + tl.arange(0, BLOCK)
    b_page = tl.load(pages + o, mask=o < E, other=-1)
    b_row, b_head = o // LP, o % LP // (LP // L) // (L // Hkv)
    at = b_row * stride_fr + b_head * stride_fh + b_page.to(tl.int64) * stride_fp
    return b_row, b_head, b_page, tl.load(frames + at, mask=b_page >= 0, other=0), b_page >= 0


@triton.jit(do_not_specialize=["E", "LP", "N", "stride_fr", "stride_fh"])
def mark_kernel(
    pages, frames, named, E, LP, N, Hkv, L, stride_fr, stride_fh, stride_fp, BLOCK: tl.constexpr
):  # fmt: skip
    """Mark the store frames of listed pages, for each KV head."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    _, b_head, _, b_frame, m = listed(pages, frames, first, E, LP, Hkv, L, stride_fr, stride_fh, stride_fp, BLOCK)
    tl.store(named + b_head * N + b_frame, 1, mask=m)


@triton.jit(do_not_specialize=["N", "C", "B", "now"])
def find_kernel(where, used, named, counts, N, C, B, now, BLOCK: tl.constexpr):
    """Count the marked frames of a block [.., B, 3]: resident, prefetched, missing; only missing ones stay marked."""
    i = tl.program_id(0).to(tl.int64)
    i_h, o_n = i // B, i % B * BLOCK + tl.arange(0, BLOCK)
    m_named = tl.load(named + i_h * N + o_n, mask=o_n < N, other=0) != 0
    b_slot = tl.load(where + i_h * N + o_n, mask=m_named, other=C)
    m_there = (b_slot >= 0) & (b_slot < C)
    b_last = tl.load(used + i_h * C + b_slot, mask=m_there, other=0)
    tl.store(used + i_h * C + b_slot, now, mask=m_there & (now % 2 == 0))
    m_missing = b_slot < 0
    tl.store(named + i_h * N + o_n, m_missing.to(tl.int8), mask=o_n < N)
    tl.store(counts + i * 3, tl.sum(m_there.to(tl.int32), 0))
    tl.store(counts + i * 3 + 1, tl.sum((m_there & (b_last % 2 == 1)).to(tl.int32), 0))
    tl.store(counts + i * 3 + 2, tl.sum(m_missing.to(tl.int32), 0))


@triton.jit(do_not_specialize=["N", "C", "B", "W", "now", "before"])
def replace_kernel(
    where, owner, used, missing, counts, ages, order, loads, places, tally, N, C, B, W, now, before,
    BLOCK: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Give the missing frames of a block the slots at their turns in `order`, and evict those that held them.

    Programs change nothing that another one reads: a slot is one frame's, and an evicted frame is not missing.
    """
    i = tl.program_id(0).to(tl.int64)
    i_h, i_b = i // B, i % B
    o_b = tl.arange(0, BLOCK_B)
    turn = 0
    for i_c in tl.static_range(3):
        b_count = tl.load(counts + (i_h * B + o_b) * 3 + i_c, mask=o_b < B, other=0)
        tl.store(tally + i_h * 3 + i_c, tl.sum(b_count, 0).to(tl.int64), mask=i_b == 0)
        turn = tl.sum(tl.where(o_b < i_b, b_count, 0), 0)  # of the first one that is missing here, after the last count

    o_n = i_b * BLOCK + tl.arange(0, BLOCK)
    m_missing = tl.load(missing + i_h * N + o_n, mask=o_n < N, other=0) != 0
    b_turn = turn + tl.cumsum(m_missing.to(tl.int32), 0) - 1
    m_in = m_missing & (b_turn < W)
    m_in = m_in & (tl.load(ages + i_h * C + b_turn, mask=m_in, other=before) < before)
    b_slot = tl.load(order + i_h * C + b_turn, mask=m_in, other=0)
    b_out = tl.load(owner + i_h * C + b_slot, mask=m_in, other=-1)
    tl.store(where + i_h * N + b_out, -1, mask=b_out >= 0)
    tl.store(where + i_h * N + o_n, b_slot.to(tl.int32), mask=m_in)
    tl.store(owner + i_h * C + b_slot, o_n.to(tl.int32), mask=m_in)
    tl.store(used + i_h * C + b_slot, now, mask=m_in)
    tl.store(loads + i_h * W + b_turn, o_n.to(tl.int32), mask=m_in)
    tl.store(places + i_h * W + b_turn, b_slot.to(tl.int32), mask=m_in)


@triton.jit(do_not_specialize=["E", "LP", "N", "F", "stride_fr", "stride_fh"])
def locate_kernel(
    pages, frames, where, table, E, LP, N, F, Hkv, L, stride_fr, stride_fh, stride_fp, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the slots of the listed pages; 0 for those that found none."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    b_row, b_head, b_page, b_frame, m = listed(
        pages, frames, first, E, LP, Hkv, L, stride_fr, stride_fh, stride_fp, BLOCK
    )
    b_slot = tl.load(where + b_head * N + b_frame, mask=m, other=0)
    tl.store(table + (b_row * Hkv + b_head) * F + b_page, tl.maximum(b_slot, 0), mask=m)
