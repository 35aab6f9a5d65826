"""The heaviest pages of each list by their log masses: a search for the threshold instead of a sort."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

MOST_PIECES = tl.constexpr(64)
"""Of a list too long for one program."""
SHARE = tl.constexpr(2**30)
"""A group's total mass, in the units of the search."""


@triton.jit
def fixed(x):
    """Shares as integers: their sums are the same in any order, so that no bit depends on the length of a list."""
    return (x * 1099511627776.0).to(tl.int64)


@triton.jit
def as_share(x):
    """The share of a number by `fixed`."""
    return x.to(tl.float32) * (1.0 / 1099511627776.0)


@triton.jit
def total(x):
    """The sum of shares, as a share again."""
    return as_share(tl.sum(fixed(x), 0))


@triton.jit
def top_of(b_mass):
    """The highest log mass; infinite if any is NaN."""
    return tl.max(tl.where(b_mass < float("inf"), b_mass, float("inf")), 0)


@triton.jit
def parts_of(b_mass, top):
    """Masses as parts of the highest one."""
    return tl.exp(b_mass - tl.where(top == float("-inf"), 0.0, top))


@triton.jit
def shares_of(b_mass):
    """Softmax of a head's log masses; zeros if all are -inf, or any is infinite or NaN."""
    m_bad = ~(b_mass < float("inf"))
    b_mass = tl.where(m_bad, float("-inf"), b_mass)
    b_part = parts_of(b_mass, tl.max(b_mass, 0))
    return tl.where(tl.sum(m_bad.to(tl.int32), 0) > 0, 0.0, b_part / tl.maximum(total(b_part), 1e-30))


@triton.jit
def parts_in(b_mass, tops, i_h, N):
    """Masses as parts of the highest one in all N pieces of a list; zeros where that is infinite."""
    o_p = tl.arange(0, MOST_PIECES)
    top = tl.max(tl.load(tops + i_h * N + o_p, mask=o_p < N, other=float("-inf")), 0)
    return parts_of(tl.where(top < float("inf"), b_mass, float("-inf")), top)


@triton.jit
def shares_in(b_mass, tops, sums, i_h, N):
    """As `shares_of`, for some pages of a list in pieces with results `tops` and `sums` [.., N]."""
    o_p = tl.arange(0, MOST_PIECES)
    whole = tl.sum(tl.load(sums + i_h * N + o_p, mask=o_p < N, other=0), 0)
    return parts_in(b_mass, tops, i_h, N) / tl.maximum(as_share(whole), 1e-30)


@triton.jit
def group_shares(masses, tops, sums, i_l, b_page, m_seen, F, N, G: tl.constexpr):
    """Mean share of each page over the G heads of a list; below 0 if absent. In pieces unless tops is None.

    A share may be 0 by rounding.
    """
    b_group = tl.full(b_page.shape, -1.0, tl.float32)
    for i_g in range(G):
        i_h = i_l * G + i_g
        b_mass = tl.load(masses + i_h * F + b_page, mask=m_seen, other=float("-inf"))
        b_share = shares_of(b_mass) if tops is None else shares_in(b_mass, tops, sums, i_h, N)
        b_group = tl.where(b_mass > float("-inf"), tl.maximum(b_group, 0.0) + b_share, b_group)
    return b_group / G


@triton.jit
def seen_and_zone(firsts, lasts, i_r, b_page, F, sinks, ZONES: tl.constexpr):
    """Pages up to the row's last one, and those of them that every list of the row has. Without ZONES all and none."""
    m_seen, m_zone = b_page < F, tl.zeros(b_page.shape, tl.int1)
    if ZONES:
        m_seen = m_seen & (b_page <= tl.load(lasts + i_r))
        m_zone = ((b_page < sinks) | (b_page >= tl.load(firsts + i_r))) & m_seen
    return m_seen, m_zone


@triton.jit
def rank_of(b_share, m_free):
    """Whole numbers from 1 on that order shares, floats that are never negative, as their bits do; 0: not free."""
    return tl.where(m_free, b_share.to(tl.int32, bitcast=True) + 1, 0)


@triton.jit
def share_of(rank):
    """The share of this rank; 0 where there is none."""
    return (tl.maximum(rank, 1) - 1).to(tl.float32, bitcast=True)


@triton.jit
def take(b_rank, b_weight, budget, limit, WEIGHED: tl.constexpr):
    """The highest ranks until there are `budget`, or their weights reach `limit`; of equal pages the lower one first.

    The lowest rank to take is found in 30 halvings of the range of ranks, each with one sum over all pages. Without
    WEIGHED nothing but the budget counts.
    """
    b_each = tl.full(b_rank.shape, 1, tl.int32)
    if WEIGHED:  # sums to how many in the high bits, and their weights in the low ones
        b_each = b_weight.to(tl.int64) | (1 << 40)
    below = 0  # pages of this rank and less would be too many
    rank = 1 << 30  # those above are not enough, or just enough
    for _ in range(30):
        middle = (below + rank) // 2
        enough = reached(tl.sum(tl.where(b_rank > middle, b_each, 0), 0), budget, limit, WEIGHED)
        below = tl.where(enough, middle, below)
        rank = tl.where(enough, rank, middle)
    above = tl.sum(tl.where(b_rank > rank, b_each, 0), 0)
    m_equal = b_rank == rank
    b_before = tl.cumsum(m_equal.to(tl.int32), 0) - 1
    m_some = b_before < budget - count_of(above, WEIGHED)
    if WEIGHED:
        m_some = m_some & (b_before * b_weight.to(tl.int32) < limit - weight_of(above))
    return (b_rank > rank) | (m_equal & m_some)


@triton.jit
def count_of(above, WEIGHED: tl.constexpr):
    return (above >> 40).to(tl.int32) if WEIGHED else above


@triton.jit
def weight_of(above):
    return (above & ((1 << 40) - 1)).to(tl.int32)


@triton.jit
def reached(above, budget, limit, WEIGHED: tl.constexpr):
    """True if so many pages, or their weights, suffice."""
    enough = count_of(above, WEIGHED) >= budget
    return enough | (weight_of(above) >= limit) if WEIGHED else enough


@triton.jit
def store_list(p_list, m_listed, b_page, width):
    """Store the listed ones of ascending pages, padded with -1 to `width` numbers."""
    o = tl.arange(0, b_page.shape[0])
    b_place = tl.cumsum(m_listed.to(tl.int32), 0) - 1
    tl.store(p_list + b_place, b_page, mask=m_listed & (b_place < width))
    tl.store(p_list + o, -1, mask=(o >= tl.sum(m_listed.to(tl.int32), 0)) & (o < width))


@triton.jit
def found_pages(found, i_l, F, C, BLOCK_F: tl.constexpr):
    """A list's C pages that its pieces have found, F where there is none; None: they are all pages."""
    b_page = tl.arange(0, BLOCK_F)
    if found is not None:
        b_page = tl.load(found + i_l * C + b_page, mask=b_page < C, other=-1)
        b_page = tl.where(b_page < 0, F, b_page)
    return b_page


@triton.jit(do_not_specialize=["F", "N", "C", "P", "sinks", "budget", "spare"])
def heaviest_kernel(
    masses, firsts, lasts, tops, sums, found, pages, kept, F, N, C, P, sinks, budget, spare,
    H: tl.constexpr, G: tl.constexpr, ZONES: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One list of a row, for G heads: see `top_pages`. Without ZONES it has neither zones nor a last page.

    `spare` is what may be left out, of SHARE; -1: the budget is spent anyhow. Of a list in N pieces the C pages that
    those have found.
    """
    i_l = tl.program_id(0).to(tl.int64)
    b_page = found_pages(found, i_l, F, C, BLOCK_F)
    m_seen, m_zone = seen_and_zone(firsts, lasts, i_l // H, b_page, F, sinks, ZONES)
    b_group = group_shares(masses, tops, sums, i_l, b_page, m_seen, F, N, G)
    m_free = (b_group >= 0.0) & ~m_zone

    b_weight = (tl.maximum(b_group, 0.0) * SHARE + 0.5).to(tl.uint32)
    left = SHARE - tl.sum(tl.where(m_zone, b_weight, 0).to(tl.int32), 0)  # the part of a head without a share is in it
    limit = tl.where(spare < 0, 2**31 - 1, left - spare)
    m_taken = m_zone | take(rank_of(b_group, m_free), b_weight, budget, limit, WEIGHED=True)
    store_list(pages + i_l * P, m_taken, b_page, P)

    if ZONES and found is None:
        for i_g in range(G):
            b_mass = tl.load(masses + (i_l * G + i_g) * F + b_page, mask=m_seen, other=float("-inf"))
            tl.store(kept + i_l * G + i_g, total(tl.where(m_taken, shares_of(b_mass), 0.0)))


@triton.jit
def piece_of(masses, lasts, i_h, i_p, F, HEADS: tl.constexpr, ZONES: tl.constexpr, BLOCK_F: tl.constexpr):
    """One head's log masses in one piece of the pages."""
    o_f = i_p * BLOCK_F + tl.arange(0, BLOCK_F)
    m_seen = o_f < F
    if ZONES:
        m_seen = m_seen & (o_f <= tl.load(lasts + i_h // HEADS))
    return tl.load(masses + i_h * F + o_f, mask=m_seen, other=float("-inf"))


@triton.jit(do_not_specialize=["F", "N"])
def tops_kernel(
    masses, lasts, tops, F, N, HEADS: tl.constexpr, ZONES: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """The highest log mass of one piece, for one head."""
    i = tl.program_id(0).to(tl.int64)
    tl.store(tops + i, top_of(piece_of(masses, lasts, i // N, i % N, F, HEADS, ZONES, BLOCK_F)))


@triton.jit(do_not_specialize=["F", "N"])
def sums_kernel(
    masses, lasts, tops, sums, F, N, HEADS: tl.constexpr, ZONES: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """The mass of one piece by the highest one of all, for one head."""
    i = tl.program_id(0).to(tl.int64)
    b_mass = piece_of(masses, lasts, i // N, i % N, F, HEADS, ZONES, BLOCK_F)
    tl.store(sums + i, tl.sum(fixed(parts_in(b_mass, tops, i // N, N)), 0))


@triton.jit(do_not_specialize=["F", "N", "W", "sinks", "budget"])
def piece_kernel(
    masses, firsts, lasts, known, read, tops, sums, found, F, N, W, sinks, budget,
    H: tl.constexpr, G: tl.constexpr, ZONES: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The pages [W] of one piece that the whole list may take, and those that it has `read` where a row is `known`.

    Of all pages none is among the `budget` heaviest, of equal ones the lower, that is not among those of its piece.
    """
    i = tl.program_id(0).to(tl.int64)
    i_l = i // N
    o_f = (i % N).to(tl.int32) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_seen, m_zone = seen_and_zone(firsts, lasts, i_l // H, o_f, F, sinks, ZONES)
    b_group = group_shares(masses, tops, sums, i_l, o_f, m_seen, F, N, G)
    b_rank = rank_of(b_group, (b_group >= 0.0) & ~m_zone)
    m_taken = m_zone | take(b_rank, b_rank, budget, 0, WEIGHED=False)
    if read is not None:
        m_seen = m_seen & (tl.load(known + i_l // H) != 0)
        m_taken = m_taken | (tl.load(read + i_l * F + o_f, mask=m_seen, other=0) != 0)
    store_list(found + i * W, m_taken, o_f, W)


@triton.jit(do_not_specialize=["F", "N", "P"])
def kept_kernel(masses, tops, sums, pages, kept, F, N, P, G: tl.constexpr, BLOCK_F: tl.constexpr):
    """Store the share of a head on the pages [P] of a list in N pieces."""
    i_h = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BLOCK_F)
    b_page = tl.load(pages + i_h // G * P + o_p, mask=o_p < P, other=-1)
    b_mass = tl.load(masses + i_h * F + b_page, mask=b_page >= 0, other=float("-inf"))
    tl.store(kept + i_h, total(shares_in(b_mass, tops, sums, i_h, N)))
