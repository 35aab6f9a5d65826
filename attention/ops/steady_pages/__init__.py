"""From log masses to page lists that change little from one token to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keysift.kvcache.ops.dispatch import op

ONE = 2**40
"""A share of 1 where shares are added up as integers, in which no order and no padding changes a bit."""


class SteadyPages(NamedTuple):
    """The chosen pages, those that were asked for in vain, and what the next token has to know."""

    pages: Tensor
    """[R, H, P] int32, ascending, -1 pads the end; P = min(F, sinks + window + budget)."""
    refused: Tensor
    """[R, H, Q] int32, listed alike: pages asked for and not chosen; Q = min(F, queried, budget)."""
    kept: Tensor
    """[R, Hq] fp32, share of each query's mass on the chosen pages."""
    read: Tensor
    """[R, H, F] bool, the chosen pages again."""
    averages: Tensor
    """[R, H, F] fp32, the moving average of each page's share, this token's included; 0 behind the row's own page."""
    overlap: Tensor
    """[R, H] fp32, share of the chosen pages that the token before had chosen; NaN where nothing is known of it."""
    bound_exceeded: Tensor
    """[R, H] bool, lists that took more pages than the bound allows."""


class _Choice(NamedTuple):
    """Pages by their shares [R, H, F], the heaviest first, and whether each is asked for."""

    shares: Tensor
    pages: Tensor
    asked: Tensor


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
    """The zones of each row, and of all other pages those that the token before chose, but for a few that change.

    The heaviest pages between the zones are asked for. Those among them that the token before did not choose are
    candidates, the heaviest first; its pages that are not asked for are victims, the lowest average first. A candidate
    comes in where the budget has room, else in the place of the next victim. They do so until `most` have, or until one
    weighs too little against its victim; then more of them while those that are left hold more than `epsilon`. Pages
    that have left the window stay, as far as the budget goes. A row of whose last token nothing is known takes the
    heaviest pages.

    The query heads of a group share a list: a page weighs the mean of their shares. Of equal pages the lower one comes
    first, in and out.

    Args:
        masses: [R, Hq, F] fp32, natural log of each page's mass up to a factor per row and head; -inf: without a share,
            and never asked for.
        firsts: [R] int32, first page of each row's window.
        lasts: [R] int32, the row's own page, the last of its window; pages behind it are never chosen.
        known: [R] bool, rows of whose last token `read` and `averages` tell; those of others may hold anything.
        read: [R, H, F] bool, pages that it chose under the same limits; like `averages` it may hold anything behind the
            row's own page.
        averages: [R, H, F] fp32, as it left them.
        heads: H, lists of a row.
        sinks: pages at the start that every row reads.
        window: the most pages from a row's first to its last.
        budget: the most pages besides.
        queried: the most pages to ask for, besides and within the budget.
        most: pages that may come in; negative: any number.
        factor: so many times what its victim weighs, now or on average, a candidate has to weigh more than; 0: no
            candidate is compared.
        keep: weight of the past in the averages.
        epsilon: share that may be refused.
    """
    count = masses.shape[2]
    page = torch.arange(count, device=masses.device)
    seen = (page <= lasts[:, None])[:, None]  # [R, 1, F]
    zone = ((page < sinks) | (page >= firsts[:, None]))[:, None] & seen
    past = known[:, None, None]
    shares = masses.masked_fill(~seen, -torch.inf).double().softmax(-1).nan_to_num(0.0)  # fp64: alike in any company
    group = torch.unflatten(shares, 1, (heads, -1)).mean(2).float()  # [R, H, F]
    now = torch.where(past, averages * keep + group * (1 - keep), group).masked_fill(~seen, 0.0)
    resident = read & past & seen & ~zone
    asked = torch.where(past, min(queried, budget), budget)
    choice = _ask(group.masked_fill(zone | ~seen, 0.0), asked)
    allowed = torch.where(past, count if most < 0 else most, count)
    limits = _Limits(budget, allowed, factor, torch.where(past, int(epsilon * ONE), ONE))
    between, bound_exceeded = _exchange(choice, resident, now, torch.maximum(now, group), limits)
    mask = zone | between
    refused = _scatter(choice.pages, choice.asked) & ~mask
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


def _ask(shares: Tensor, asked: Tensor) -> _Choice:
    """The `asked` [R, 1, 1] heaviest pages of shares [R, H, F]; those without a share are never asked for."""
    order = shares.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(shares.shape[-1], device=shares.device)
    return _Choice(order.values, order.indices, (order.values > 0) & (rank < asked))


def _exchange(
    choice: _Choice, resident: Tensor, averages: Tensor, bars: Tensor, limits: _Limits
) -> tuple[Tensor, Tensor]:
    """The residents [R, H, F] of this token, between the zones, and which lists [R, H] the bound_exceeded has opened.

    Candidates are numbered by `place`, victims in the order in which they leave. With so many places to spare,
    candidate n takes that of victim n - spare; too many residents are fewer than none to spare.
    """
    candidate = choice.asked & ~resident.gather(-1, choice.pages)
    place = candidate.cumsum(-1) - 1
    idle = resident & ~_scatter(choice.pages, choice.asked)
    leaving = averages.masked_fill(~idle, torch.inf).sort(dim=-1, stable=True).indices
    spare = limits.budget - resident.sum(-1, keepdim=True)
    victim = place - spare
    bar = bars.gather(-1, leaving).gather(-1, victim.clamp(0, victim.shape[-1] - 1))
    better = (victim < 0) | (choice.shares > bar * limits.factor) | (limits.factor == 0)
    follows = (~candidate | (better & (place < limits.most))).long().cumprod(-1).bool()
    opened = candidate & ~follows & (_from_here(choice.shares, candidate) > limits.refusable)
    admitted = (candidate & follows) | opened
    gone = admitted.sum(-1, keepdim=True) - spare
    rank = torch.arange(leaving.shape[-1], device=leaving.device)
    stays = resident & ~_scatter(leaving, rank < gone)
    return stays | _scatter(choice.pages, admitted), opened.any(-1)


def _from_here(shares: Tensor, candidate: Tensor) -> Tensor:
    """[R, H, F] int64, what each candidate and those behind it hold together, in units of 1 / `ONE`."""
    parts = (shares * ONE).long().masked_fill(~candidate, 0)
    return parts.sum(-1, keepdim=True) - parts.cumsum(-1) + parts


def _scatter(pages: Tensor, flags: Tensor) -> Tensor:
    """[R, H, F], flags of pages in some order as flags by page number."""
    return torch.zeros_like(flags).scatter_(-1, pages, flags)


def _listed(mask: Tensor, width: int) -> Tensor:
    """[R, H, width] int32, the true pages of mask [R, H, F] in ascending order, -1 behind them."""
    count = mask.shape[-1]
    page = torch.arange(count, device=mask.device)
    pages = torch.where(mask, page, count).sort(-1).values[..., :width]
    return torch.where(pages < count, pages, -1).int()
