"""Page lists by log masses that change little from one token to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keysift.kvcache.ops.dispatch import op

ONE = 2**40
"""A share of 1 as an integer: sums of integers do not depend on their order or on padding."""


class SteadyPages(NamedTuple):
    """The chosen pages, the queried pages that were refused, and the state for the next token."""

    pages: Tensor
    """[R, H, P] int32, ascending, -1 pads the end; P = min(F, sinks + window + budget)."""
    refused: Tensor
    """[R, H, Q] int32, likewise: pages queried and not chosen; Q = min(F, queried, budget)."""
    kept: Tensor
    """[R, Hq] fp32, share of each query's mass on the chosen pages."""
    read: Tensor
    """[R, H, F] bool, the chosen pages again."""
    averages: Tensor
    """[R, H, F] fp32, the moving average of each page's share, this token's included; 0 after the row's own page."""
    overlap: Tensor
    """[R, H] fp32, share of the chosen pages that the previous token had chosen; NaN without one."""
    bound_exceeded: Tensor
    """[R, H] bool, lists that took more pages than the bound allows."""


class _Choice(NamedTuple):
    """Pages by their shares [R, H, F], the heaviest first, and a mask of the queried ones."""

    shares: Tensor
    pages: Tensor
    queried: Tensor


class _Limits(NamedTuple):
    budget: int
    most: Tensor
    """[R, 1, 1], the most pages that may come in."""
    factor: float
    refusable: Tensor
    """[R, 1, 1] int64, the most that may be refused, in units of 1 / `ONE`."""


@op(
    native="keysift.attention.ops.steady_pages.native:steady_pages",
    triton="keysift.attention.ops.steady_pages.triton:steady_pages",
)
def steady_pages(
    masses: Tensor,
    firsts: Tensor,
    lasts: Tensor,
    known: Tensor,
    read: Tensor,
    averages: Tensor,
    *,
    heads: int,
    sinks: int,
    window: int,
    budget: int,
    queried: int,
    most: int,
    factor: float,
    keep: float,
    epsilon: float,
) -> SteadyPages:
    """The zones of each row, and of all other pages those that the previous token chose, but for a few that change.

    The heaviest pages between the zones are queried. Those among them that the previous token did not choose are
    candidates, the heaviest first; its pages that are not queried are victims, the lowest average first. A candidate
    comes in if the budget has room, else in the place of the next victim. They do so until `most` have, or until one
    weighs too little against its victim; then more of them while those that are left hold more than `epsilon`. Pages
    that have left the window stay, as far as the budget goes. A row without a previous token takes the heaviest pages.

    The query heads of a group share a list: a page weighs the mean of their shares. Of equal pages the lower one comes
    first, in and out.

    Args:
        masses: [R, Hq, F] fp32, natural log of each page's mass up to a factor per row and head; -inf: without a share,
            and never queried.
        firsts: [R] int32, first page of each row's window.
        lasts: [R] int32, the row's own page, the last of its window; pages after it are never chosen.
        known: [R] bool, rows with a previous token; `read` and `averages` of others may hold anything.
        read: [R, H, F] bool, pages that it chose under the same limits; like `averages` it may hold anything after the
            row's own page.
        averages: [R, H, F] fp32, as it left them.
        heads: H, lists of a row.
        sinks: pages at the start that every row reads.
        window: the most pages from a row's first to its last.
        budget: the most pages besides.
        queried: the most pages to query, besides and within the budget.
        most: pages that may come in; negative: any number.
        factor: a candidate has to weigh more than so many times its victim, now or on average; 0: it is not compared.
        keep: weight of the past in the averages.
        epsilon: share that may be refused.
    """
    count = masses.shape[2]
    page = torch.arange(count, device=masses.device)
    seen = (page <= lasts[:, None])[:, None]  # [R, 1, F]
    zone = ((page < sinks) | (page >= firsts[:, None]))[:, None] & seen
    past = known[:, None, None]
    shares = (
        masses.masked_fill(~seen, -torch.inf).double().softmax(-1).nan_to_num(0.0)
    )  # fp64: the same bits in any batch
    group = torch.unflatten(shares, 1, (heads, -1)).mean(2).float()  # [R, H, F]
    now = torch.where(past, averages * keep + group * (1 - keep), group).masked_fill(~seen, 0.0)
    resident = read & past & seen & ~zone
    choice = _heaviest(group.masked_fill(zone | ~seen, 0.0), torch.where(past, min(queried, budget), budget))
    allowed = torch.where(past, count if most < 0 else most, count)
    limits = _Limits(budget, allowed, factor, torch.where(past, int(epsilon * ONE), ONE))
    between, bound_exceeded = _exchange(choice, resident, now, torch.maximum(now, group), limits)
    mask = zone | between
    refused = _scatter(choice.pages, choice.queried) & ~mask
    both = (mask & read & past).sum(-1) / mask.sum(-1)
    return SteadyPages(
        pages=_listed(mask, min(count, sinks + window + budget)),
        refused=_listed(refused, min(count, queried, budget)),
        kept=(shares * mask.repeat_interleave(shares.shape[1] // heads, 1)).sum(-1).float(),
        read=mask,
        averages=now,
        overlap=torch.where(known[:, None], both, torch.nan),
        bound_exceeded=bound_exceeded,
    )


def _heaviest(shares: Tensor, count: Tensor) -> _Choice:
    """Pages by shares [R, H, F]; the `count` [R, 1, 1] heaviest are queried, unless they have no share."""
    order = shares.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(shares.shape[-1], device=shares.device)
    return _Choice(order.values, order.indices, (order.values > 0) & (rank < count))


def _exchange(
    choice: _Choice, resident: Tensor, averages: Tensor, bars: Tensor, limits: _Limits
) -> tuple[Tensor, Tensor]:
    """The residents [R, H, F] of this token, between the zones, and lists [R, H] that exceeded the bound.

    Candidates are numbered by `place`, victims in the order in which they leave. With so many places to spare,
    candidate n takes that of victim n - spare; too many residents are fewer than none to spare.
    """
    candidate = choice.queried & ~resident.gather(-1, choice.pages)
    place = candidate.cumsum(-1) - 1
    idle = resident & ~_scatter(choice.pages, choice.queried)
    leaving = averages.masked_fill(~idle, torch.inf).sort(dim=-1, stable=True).indices
    spare = limits.budget - resident.sum(-1, keepdim=True)
    victim = place - spare
    bar = bars.gather(-1, leaving).gather(-1, victim.clamp(0, victim.shape[-1] - 1))
    better = (victim < 0) | (choice.shares > bar * limits.factor) | (limits.factor == 0)
    follows = (~candidate | (better & (place < limits.most))).long().cumprod(-1).bool()
    over = candidate & ~follows & (_from_here(choice.shares, candidate) > limits.refusable)
    admitted = (candidate & follows) | over
    gone = admitted.sum(-1, keepdim=True) - spare
    rank = torch.arange(leaving.shape[-1], device=leaving.device)
    stays = resident & ~_scatter(leaving, rank < gone)
    return stays | _scatter(choice.pages, admitted), over.any(-1)


def _from_here(shares: Tensor, candidate: Tensor) -> Tensor:
    """[R, H, F] int64, total share of each candidate and those after it, in units of 1 / `ONE`."""
    parts = (shares * ONE).long().masked_fill(~candidate, 0)
    return parts.sum(-1, keepdim=True) - parts.cumsum(-1) + parts


def _scatter(pages: Tensor, flags: Tensor) -> Tensor:
    """[R, H, F], flags of pages in some order as flags by page number."""
    return torch.zeros_like(flags).scatter_(-1, pages, flags)


def _listed(mask: Tensor, width: int) -> Tensor:
    """[R, H, width] int32, the true pages of mask [R, H, F] in ascending order; -1 pads the end."""
    count = mask.shape[-1]
    page = torch.arange(count, device=mask.device)
    pages = torch.where(mask, page, count).sort(-1).values[..., :width]
    return torch.where(pages < count, pages, -1).int()
