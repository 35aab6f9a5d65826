"""Page lists by log masses: the zones, then the heaviest pages until enough is covered."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keysift.kvcache.ops.dispatch import op


class TopPages(NamedTuple):
    """The chosen pages, and their share of the masses."""

    pages: Tensor
    """[R, H, P] int32, ascending, -1 pads the end; P = min(F, sinks + window + budget)."""
    kept: Tensor
    """[R, Hq] fp32, share of each query's mass on them."""


@op(
    native="keysift.attention.ops.top_pages.native:top_pages",
    triton="keysift.attention.ops.top_pages.triton:top_pages",
)
def top_pages(
    masses: Tensor,
    firsts: Tensor,
    lasts: Tensor,
    *,
    heads: int,
    sinks: int,
    window: int,
    budget: int,
    epsilon: float,
) -> TopPages:
    """The zones of each row, and of all other pages the heaviest until at most `epsilon` of the mass is left out.

    The query heads of a group share a list: a page weighs the sum of their shares, and what is left out is the mean
    over them. Of equal pages the lower one is taken first.

    Args:
        masses: [R, Hq, F] fp32, natural log of each page's mass up to a factor per row and head; -inf: never chosen
            but in a zone, and without a share.
        firsts: [R] int32, first page of each row's window.
        lasts: [R] int32, the row's own page, the last of its window; pages after it are never chosen.
        heads: H, lists of a row.
        sinks: pages at the start that every row reads.
        window: the most pages from a row's first to its last.
        budget: the most pages besides.
        epsilon: share that may be left out; 0: the whole budget is spent.
    """
    count = masses.shape[2]
    page = torch.arange(count, device=masses.device)
    seen = (page <= lasts[:, None])[:, None]  # [R, 1, F]
    shares = masses.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)  # all -inf: no share anywhere
    group = torch.unflatten(shares, 1, (heads, -1)).mean(2)  # [R, H, F]
    found = torch.unflatten(masses > -torch.inf, 1, (heads, -1)).any(2)  # a share may be 0 by rounding
    zone = ((page < sinks) | (page >= firsts[:, None]))[:, None] & seen
    left = 1.0 - (group * zone).sum(-1, keepdim=True)
    order = group.masked_fill(zone | ~found | ~seen, -1.0).sort(dim=-1, descending=True, stable=True)
    before = order.values.clamp(min=0).cumsum(-1) - order.values.clamp(min=0)
    wanted = (left - before > epsilon) | (epsilon == 0)
    taken = wanted & (torch.arange(count, device=page.device) < budget) & (order.values >= 0)
    mask = zone | torch.zeros_like(taken).scatter_(-1, order.indices, taken)
    width = min(count, sinks + window + budget)
    pages = torch.where(mask, page, count).sort(-1).values[..., :width]
    kept = (shares * mask.repeat_interleave(shares.shape[1] // heads, 1)).sum(-1)
    return TopPages(torch.where(pages < count, pages, -1).int(), kept)
