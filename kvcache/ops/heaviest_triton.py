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
    """Softmax of a head's log masses; zeros where all are -inf."""
    top = tl.max(b_mass, 0)
    b_e = tl.exp(b_mass - tl.where(top == float("-inf"), 0.0, top))
    return b_e / tl.maximum(total(b_e), 1e-30)


@triton.jit(do_not_specialize=["F", "P", "sinks", "budget", "spare"])
def heaviest_kernel(
    masses, firsts, lasts, pages, kept, F, P, sinks, budget, spare,
    H: tl.constexpr, G: tl.constexpr, ZONES: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One list of a row, for G heads: see `top_pages`. Without ZONES it has neither zones nor a last page.

    `spare` is what may be left out, of SHARE; -1: the budget is spent anyhow.

    A page's share, a float that is never negative, orders like its bits do as a whole number. So the lightest page to
    take is found in 30 halvings of the range of those numbers, each with one sum over all pages.
    """
    i_l = tl.program_id(0).to(tl.int64)
    o_f = tl.arange(0, BLOCK_F)
    m_seen = o_f < F
    m_zone = tl.zeros([BLOCK_F], tl.int1)
    if ZONES:
        m_seen = m_seen & (o_f <= tl.load(lasts + i_l // H))
        m_zone = ((o_f < sinks) | (o_f >= tl.load(firsts + i_l // H))) & m_seen

    p_m = masses + i_l * G * F + o_f
    b_group = tl.full([BLOCK_F], -1.0, tl.float32)  # nobody found it; a share may be 0 by rounding
    for _ in range(G):
        b_mass = tl.load(p_m, mask=m_seen, other=float("-inf"))
        b_group = tl.where(b_mass > float("-inf"), tl.maximum(b_group, 0.0) + shares_of(b_mass), b_group)
        p_m += F
    b_group = b_group / G
    m_free = (b_group >= 0.0) & ~m_zone

    b_rank = tl.where(m_free, b_group.to(tl.int32, bitcast=True) + 1, 0)
    b_share = tl.where(m_free, (b_group * SHARE + 0.5).to(tl.uint32), 0)
    b_pair = b_share.to(tl.int64) | (1 << 40)  # sums to how many in the high bits, and their shares in the low ones
    ALL: tl.constexpr = (1 << 40) - 1
    limit = tl.where(spare < 0, 2**31 - 1, tl.sum(b_share.to(tl.int32), 0) - spare)
    below = 0  # pages of this rank and less would be too many
    rank = 1 << 30  # those above are not enough, or just enough
    for _ in range(30):
        middle = (below + rank) // 2
        above = tl.sum(tl.where(b_rank > middle, b_pair, 0), 0)
        enough = ((above >> 40) >= budget) | ((above & ALL) >= limit)
        below = tl.where(enough, middle, below)
        rank = tl.where(enough, rank, middle)

    above = tl.sum(tl.where(b_rank > rank, b_pair, 0), 0)
    m_equal = b_rank == rank
    b_before = tl.cumsum(m_equal.to(tl.int32), 0) - 1  # of equal pages the lower one is taken first
    m_some = b_before < budget - (above >> 40).to(tl.int32)
    m_some = m_some & (b_before * b_share.to(tl.int32) < limit - (above & ALL).to(tl.int32))
    m_taken = m_zone | (b_rank > rank) | (m_equal & m_some)
    b_place = tl.cumsum(m_taken.to(tl.int32), 0) - 1
    tl.store(pages + i_l * P + b_place, o_f, mask=m_taken & (b_place < P))
    tl.store(pages + i_l * P + o_f, -1, mask=(o_f >= tl.sum(m_taken.to(tl.int32), 0)) & (o_f < P))

    if ZONES:
        p_m = masses + i_l * G * F + o_f
        for i_g in range(G):
            b_mass = tl.load(p_m, mask=m_seen, other=float("-inf"))
            tl.store(kept + i_l * G + i_g, total(tl.where(m_taken, shares_of(b_mass), 0.0)))
            p_m += F


def config(max_pages: int) -> dict[str, int]:
    """The block of a list of `max_pages` pages, and its warps; those of AMD have 64 threads."""
    block = max(128, triton.next_power_of_2(max_pages))
    return {"BLOCK_F": block, "num_warps": min(8, max(1, block // 256))}


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
