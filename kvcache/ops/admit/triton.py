"""The CUDA twin of `admit`."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Admitted, Residents

INTERPRETED = triton.knobs.runtime.interpret
BLOCK = 1024
"""Home frames, or listed pages, of one program."""


@triton.jit
def listed(pages, frames, first, E, LP, Hkv, L, stride_fr, stride_fh, stride_fp, BLOCK: tl.constexpr):
    """Rows, KV heads, pages and home frames of a block of the selection's E numbers, LP of them a row's; which list."""
    o = first + tl.arange(0, BLOCK)
    b_page = tl.load(pages + o, mask=o < E, other=-1)
    b_row, b_head = o // LP, o % LP // (LP // L) // (L // Hkv)
    at = b_row * stride_fr + b_head * stride_fh + b_page.to(tl.int64) * stride_fp
    return b_row, b_head, b_page, tl.load(frames + at, mask=b_page >= 0, other=0), b_page >= 0


@triton.jit(do_not_specialize=["E", "LP", "N", "stride_fr", "stride_fh"])
def name_kernel(
    pages, frames, named, E, LP, N, Hkv, L, stride_fr, stride_fh, stride_fp, BLOCK: tl.constexpr
):  # fmt: skip
    """Mark the home frames of listed pages, for each KV head."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    _, b_head, _, b_frame, m = listed(pages, frames, first, E, LP, Hkv, L, stride_fr, stride_fh, stride_fp, BLOCK)
    tl.store(named + b_head * N + b_frame, 1, mask=m)


@triton.jit(do_not_specialize=["N", "C", "B", "now"])
def find_kernel(where, used, named, counts, N, C, B, now, BLOCK: tl.constexpr):
    """Read what is there; of a block of frames only those stay marked that are missing, and are counted [.., B, 3]."""
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
    """The missing ones of a block of frames move into the slots that their turn has in `order`, and others out.

    Programs change nothing that another one reads: a slot is one frame's, and what has moved out is not missing.
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
def tell_kernel(
    pages, frames, where, table, E, LP, N, F, Hkv, L, stride_fr, stride_fh, stride_fp, BLOCK: tl.constexpr
):  # fmt: skip
    """Where the listed pages are now; those that found no slot are said to be in the first."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    b_row, b_head, b_page, b_frame, m = listed(
        pages, frames, first, E, LP, Hkv, L, stride_fr, stride_fh, stride_fp, BLOCK
    )
    b_slot = tl.load(where + b_head * N + b_frame, mask=m, other=0)
    tl.store(table + (b_row * Hkv + b_head) * F + b_page, tl.maximum(b_slot, 0), mask=m)


def admit(frames: Tensor, pages: Tensor, residents: Residents, *, now: int, before: int) -> Admitted:
    """The twin of the reference of the same name, which documents it.

    Four launches, a sort of the slots and three fills for the reference's some ninety operations.
    """
    (kv_heads, count), (rows, lists, listed) = residents.where.shape, pages.shape
    if not (pages.is_cuda or INTERPRETED) or not all(table.is_contiguous() for table in residents):
        return NotImplemented  # type: ignore[no-any-return]
    made = _empty(residents, (rows, lists, listed), frames.shape[2])
    named = torch.zeros(kv_heads, count, dtype=torch.int8, device=pages.device)
    frames = frames.expand(rows, kv_heads, -1)
    selection = (pages.contiguous(), frames)
    sizes = (pages.numel(), lists * listed, count)
    heads = (kv_heads, lists, *frames.stride())
    grid = (triton.cdiv(pages.numel(), BLOCK),)
    with torch.cuda.device_of(pages):
        if pages.numel():
            name_kernel[grid](*selection, named, *sizes, *heads, BLOCK=BLOCK)
        _replace(residents, named, made, now, before)
        if pages.numel():
            tell_kernel[grid](*selection, residents.where, made.table, *sizes, frames.shape[2], *heads, BLOCK=BLOCK)
    return made


def _replace(residents: Residents, named: Tensor, made: Admitted, now: int, before: int) -> None:
    """Give the missing ones of the named frames slots."""
    (where, owner, used), (kv_heads, count) = residents, named.shape
    capacity, blocks = owner.shape[1], triton.cdiv(count, BLOCK)
    counts = torch.empty(kv_heads, blocks, 3, dtype=torch.int32, device=where.device)
    find_kernel[(kv_heads * blocks,)](where, used, named, counts, count, capacity, blocks, now, BLOCK=BLOCK)
    ages, order = used.sort(dim=1, stable=True)
    replace_kernel[(kv_heads * blocks,)](
        *(where, owner, used, named, counts, ages, order, made.loads, made.slots, made.found),
        *(count, capacity, blocks, made.loads.shape[1], now, before),
        BLOCK=BLOCK,
        BLOCK_B=triton.next_power_of_2(blocks),
    )


def _empty(residents: Residents, listed: tuple[int, int, int], max_pages: int) -> Admitted:
    kv_heads, device = residents.where.shape[0], residents.where.device
    rows, lists, pages = listed
    width = min(residents.owner.shape[1], rows * lists // kv_heads * pages)
    loads, slots = torch.full((2, kv_heads, width), -1, dtype=torch.int32, device=device)
    return Admitted(
        loads=loads,
        slots=slots,
        found=torch.empty(kv_heads, 3, dtype=torch.int64, device=device),
        table=torch.zeros(rows, kv_heads, max_pages, dtype=torch.int32, device=device),
    )
