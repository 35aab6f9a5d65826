"""Page lists that change little from token to token: candidates come in one after the other, and victims leave."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from keysift.kvcache.ops.heaviest.kernels import (
    fixed,
    rank_of,
    share_of,
    shares_in,
    shares_of,
    store_list,
    take,
    total,
)

LAST = tl.constexpr(2**31 - 1)
"""Above every rank and every level of a page."""


@triton.jit
def next_candidate(b_come, o_f, come, come_page):
    """Rank and page of the candidate after the last one that came in: the highest rank first, then the lower page."""
    b_left = tl.where((b_come < come) | ((b_come == come) & (o_f > come_page)), b_come, 0)
    rank = tl.max(b_left, 0)
    return rank, tl.min(tl.where(b_left == rank, o_f, LAST), 0)


@triton.jit
def next_victim(b_leave, o_f, gone, gone_page):
    """Level and page of the victim after the last one that has left: the lowest average first, then the lower page."""
    b_left = tl.where((b_leave > gone) | ((b_leave == gone) & (o_f > gone_page)), b_leave, LAST)
    level = tl.min(b_left, 0)
    return level, tl.min(tl.where(b_left == level, o_f, LAST), 0)


@triton.jit
def pages_of(found, i_l, F, C, BLOCK_F: tl.constexpr):
    """A list's C pages that its pieces have found, F where there is none; None: all pages."""
    o_f = tl.arange(0, BLOCK_F)
    if found is not None:
        o_f = tl.load(found + i_l * C + o_f, mask=o_f < C, other=-1, volatile=True)
        o_f = tl.where(o_f < 0, F, o_f)
    return o_f


@triton.jit
def zones_of(p_last, p_first, o_f, F, sinks):
    """Pages that the row sees, and those of them that it reads anyhow."""
    m_seen = (o_f < F) & (o_f <= tl.load(p_last, volatile=True))
    return m_seen, ((o_f < sinks) | (o_f >= tl.load(p_first, volatile=True))) & m_seen


@triton.jit
def averaged(p_average, o_f, m_known, b_share, past, keep, rest):
    """The moving averages, with this token's shares."""
    b_before = tl.load(p_average + o_f, mask=m_known, other=0.0, volatile=True)
    return tl.where(past, b_before * keep + b_share * rest, b_share)


@triton.jit
def mean_share(masses, tops, sums, i_l, o_f, m_seen, F, N, G: tl.constexpr):
    """Mean share of each page over the G heads of a list; in N pieces unless tops is None."""
    b_group = tl.zeros(o_f.shape, tl.float32)
    for i_g in range(G):
        b_mass = tl.load(masses + (i_l * G + i_g) * F + o_f, mask=m_seen, other=float("-inf"))
        b_group += shares_of(b_mass) if tops is None else shares_in(b_mass, tops, sums, i_l * G + i_g, N)
    return b_group / G


@triton.jit(do_not_specialize=["F", "N", "B"])
def average_kernel(
    masses, lasts, known, averages, tops, sums, now_read, now_averages, F, N, B, keep, rest,
    H: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Averages of a block of the pages of a list in pieces, and none of them marked as read."""
    i = tl.program_id(0).to(tl.int64)
    i_l, o_f = i // B, (i % B).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    past = tl.load(known + i_l // H) != 0
    m_seen = (o_f < F) & (o_f <= tl.load(lasts + i_l // H))
    b_group = mean_share(masses, tops, sums, i_l, o_f, m_seen, F, N, G)
    b_now = averaged(averages + i_l * F, o_f, m_seen & past, b_group, past, keep, rest)
    tl.store(now_averages + i_l * F + o_f, tl.where(m_seen, b_now, 0.0), mask=o_f < F)
    tl.store(now_read + i_l * F + o_f, 0, mask=o_f < F)


@triton.jit(do_not_specialize=["F", "N", "C", "P", "Q", "sinks", "budget", "queried", "most", "refusable"])
def steady_kernel(
    masses, firsts, lasts, known, read, averages, tops, sums, found,
    pages, refused, kept, now_read, now_averages, overlap, bound_exceeded,
    F, N, C, P, Q, sinks, budget, queried, most, factor, keep, rest, refusable,
    H: tl.constexpr, G: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One list of a row, for G heads: see `steady_pages`. Of a list in N pieces the C pages that those have found.

    Candidates come in one after the other, as few do. Averages, which are never negative, order like their bits do as
    whole numbers, and so do shares; the last one's rank or level, and its page, determine all that went before it.
    """
    i_l = tl.program_id(0).to(tl.int64)
    o_f = pages_of(found, i_l, F, C, BLOCK_F)
    past = tl.load(known + i_l // H) != 0
    m_seen, m_zone = zones_of(lasts + i_l // H, firsts + i_l // H, o_f, F, sinks)

    b_group = mean_share(masses, tops, sums, i_l, o_f, m_seen, F, N, G)
    if found is None:
        b_now = averaged(averages + i_l * F, o_f, m_seen & past, b_group, past, keep, rest)
        tl.store(now_averages + i_l * F + o_f, tl.where(m_seen, b_now, 0.0), mask=o_f < F)
    b_rank = rank_of(b_group, (b_group > 0.0) & m_seen & ~m_zone)
    m_queried = take(b_rank, b_rank, tl.where(past, tl.minimum(queried, budget), budget), 0, WEIGHED=False)

    # From memory once more, here and below: registers are few.
    m_seen, m_zone = zones_of(lasts + i_l // H, firsts + i_l // H, o_f, F, sinks)
    m_resident = (tl.load(read + i_l * F + o_f, mask=m_seen & past, other=0, volatile=True) != 0) & ~m_zone
    b_now = averaged(averages + i_l * F, o_f, m_resident, share_of(b_rank), past, keep, rest)
    b_come = tl.where(m_queried & ~m_resident, b_rank, -b_rank)  # candidates, and what others weigh
    b_leave = tl.where(m_resident & ~m_queried, b_now.to(tl.int32, bitcast=True), LAST)  # victims
    held = tl.sum(fixed(share_of(b_come)), 0)  # by candidates that have not come in

    residents = tl.sum(m_resident.to(tl.int32), 0)
    gone, gone_page = tl.full((), -1, tl.int32), tl.full((), -1, tl.int32)
    while residents > budget:
        gone, gone_page = next_victim(b_leave, o_f, gone, gone_page)
        residents -= 1

    come, come_page = tl.where(past, LAST, 0), tl.full((), -1, tl.int32)  # all of an unknown row come in
    opened = tl.full((), 0, tl.int32)
    place = 0
    within = past
    more = past & (tl.max(b_come, 0) > 0)
    while more:
        rank, page = next_candidate(b_come, o_f, come, come_page)
        level, victim = next_victim(b_leave, o_f, gone, gone_page)
        share = share_of(rank)
        bar = tl.maximum(level.to(tl.float32, bitcast=True), share_of(-tl.sum(tl.where(o_f == victim, b_come, 0), 0)))
        full = residents >= budget
        within = within & ((most < 0) | (place < most)) & (~full | (factor == 0.0) | (share > bar * factor))
        more = (rank > 0) & (within | (held > refusable))
        opened = tl.where(more & ~within, 1, opened)
        come, come_page = tl.where(more, rank, come), tl.where(more, page, come_page)
        gone, gone_page = tl.where(more & full, level, gone), tl.where(more & full, victim, gone_page)
        residents += tl.where(more & ~full, 1, 0)
        held -= tl.where(more, fixed(share), 0)
        place += 1

    m_seen, m_zone = zones_of(lasts + i_l // H, firsts + i_l // H, o_f, F, sinks)
    m_read = tl.load(read + i_l * F + o_f, mask=m_seen & past, other=0, volatile=True) != 0
    m_resident = m_read & ~m_zone
    m_candidate = b_come > 0
    m_in = (b_come > come) | ((b_come == come) & (o_f <= come_page))
    m_out = (b_leave < gone) | ((b_leave == gone) & (o_f <= gone_page))
    m_chosen = m_zone | (m_resident & ~m_out) | (m_candidate & m_in)
    store_list(pages + i_l * P, m_chosen, o_f, P)
    store_list(refused + i_l * Q, m_candidate & ~m_chosen, o_f, Q)
    tl.store(now_read + i_l * F + o_f, m_chosen.to(tl.int8), mask=o_f < F)
    tl.store(bound_exceeded + i_l, opened.to(tl.int8))
    both = tl.sum((m_chosen & m_read).to(tl.int32), 0).to(tl.float32)
    tl.store(overlap + i_l, tl.where(past, both / tl.sum(m_chosen.to(tl.int32), 0), float("nan")))
    for i_g in range(G):
        b_mass = tl.load(masses + (i_l * G + i_g) * F + o_f, mask=m_seen, other=float("-inf"))
        b_share = shares_of(b_mass) if found is None else shares_in(b_mass, tops, sums, i_l * G + i_g, N)
        tl.store(kept + i_l * G + i_g, total(tl.where(m_chosen, b_share, 0.0)))
