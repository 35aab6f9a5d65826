"""The heaviest pages of each list by their log masses: a search for the threshold instead of a sort."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PAGES = 8192
"""A list's pages live in the registers of one program: more do not fit."""
SHARE = tl.constexpr(2**30)
"""A group's whole mass, where pages are searched."""


@triton.jit
def fixed(x):
    """Shares as whole numbers: their sums are the same in any order, so that no bit depends on the length of a list."""
    return (x * 1099511627776.0).to(tl.int64)


@triton.jit
def total(x):
    """The sum of shares, as a share again."""
    return tl.sum(fixed(x), 0).to(tl.float32) * (1.0 / 1099511627776.0)


@triton.jit
def shares_of(b_mass):
    """Softmax of a head's log masses; zeros where all are -inf, or any is no number."""
    m_nan = b_mass != b_mass
    b_mass = tl.where(m_nan, float("-inf"), b_mass)
    top = tl.max(b_mass, 0)
    b_e = tl.exp(b_mass - tl.where(top == float("-inf"), 0.0, top))
    return tl.where(tl.sum(m_nan.to(tl.int32), 0) > 0, 0.0, b_e / tl.maximum(total(b_e), 1e-30))


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
    """Whether so many pages, and their weights, suffice."""
    enough = count_of(above, WEIGHED) >= budget
    return enough | (weight_of(above) >= limit) if WEIGHED else enough


@triton.jit
def store_list(p_list, m_listed, o_f, width):
    """The listed pages in ascending order, and -1 behind them, `width` numbers in all."""
    b_place = tl.cumsum(m_listed.to(tl.int32), 0) - 1
    tl.store(p_list + b_place, o_f, mask=m_listed & (b_place < width))
    tl.store(p_list + o_f, -1, mask=(o_f >= tl.sum(m_listed.to(tl.int32), 0)) & (o_f < width))


@triton.jit(do_not_specialize=["F", "P", "sinks", "budget", "spare"])
def heaviest_kernel(
    masses, firsts, lasts, pages, kept, F, P, sinks, budget, spare,
    H: tl.constexpr, G: tl.constexpr, ZONES: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One list of a row, for G heads: see `top_pages`. Without ZONES it has neither zones nor a last page.

    `spare` is what may be left out, of SHARE; -1: the budget is spent anyhow.
    """
    i_l = tl.program_id(0).to(tl.int64)
    o_f = tl.arange(0, BLOCK_F)
    m_seen = o_f < F
    m_zone = tl.zeros([BLOCK_F], tl.int1)
    if ZONES:
        m_seen = m_seen & (o_f <= tl.load(lasts + i_l // H))
        m_zone = ((o_f < sinks) | (o_f >= tl.load(firsts + i_l // H))) & m_seen

    b_group = tl.full([BLOCK_F], -1.0, tl.float32)  # nobody found it; a share may be 0 by rounding
    for i_g in range(G):
        b_mass = tl.load(masses + (i_l * G + i_g) * F + o_f, mask=m_seen, other=float("-inf"))
        b_group = tl.where(b_mass > float("-inf"), tl.maximum(b_group, 0.0) + shares_of(b_mass), b_group)
    b_group = b_group / G
    m_free = (b_group >= 0.0) & ~m_zone

    b_weight = (tl.maximum(b_group, 0.0) * SHARE + 0.5).to(tl.uint32)
    left = SHARE - tl.sum(tl.where(m_zone, b_weight, 0).to(tl.int32), 0)  # the part of a head without a share is in it
    limit = tl.where(spare < 0, 2**31 - 1, left - spare)
    m_taken = m_zone | take(rank_of(b_group, m_free), b_weight, budget, limit, WEIGHED=True)
    store_list(pages + i_l * P, m_taken, o_f, P)

    if ZONES:
        for i_g in range(G):
            b_mass = tl.load(masses + (i_l * G + i_g) * F + o_f, mask=m_seen, other=float("-inf"))
            tl.store(kept + i_l * G + i_g, total(tl.where(m_taken, shares_of(b_mass), 0.0)))


def block_of(max_pages: int) -> int:
    """What a program holds of a list of `max_pages` pages."""
    return max(128, triton.next_power_of_2(max_pages))  # type: ignore[no-any-return]


def config(max_pages: int) -> dict[str, int]:
    """The block of a list of `max_pages` pages, and warps with which no target spills registers."""
    block = block_of(max_pages)
    return {"BLOCK_F": block, "num_warps": 8 if block > 512 else 1}


def heaviest(
    masses: Tensor,
    zones: tuple[Tensor, Tensor] | None,
    *,
    lists: int,
    width: int,
    sinks: int = 0,
    budget: int,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Pages [R, lists, width] int32 and what they hold [R, Hq] fp32 of log masses [R, Hq, F]: see `top_pages`.

    Args:
        zones: first page of the window and last page, [R] int32 each; None: there are no zones, masses end in -inf,
            and nothing is told of what the pages hold.
    """
    rows, heads, max_pages = masses.shape
    assert max_pages <= MAX_PAGES
    pages = masses.new_empty(rows, lists, width, dtype=torch.int32)
    kept = masses.new_empty(rows, heads) if max_pages else masses.new_zeros(rows, heads)
    firsts, lasts = (masses, masses) if zones is None else (zone.contiguous() for zone in zones)
    spare = int(epsilon * SHARE.value) if epsilon else -1
    if rows and max_pages:
        heaviest_kernel[(rows * lists,)](
            *(masses.contiguous(), firsts, lasts, pages, kept, max_pages, width, sinks, budget, spare),
            **{"H": lists, "G": heads // lists, "ZONES": zones is not None},
            **config(max_pages),
        )
    return pages, kept
