"""Selection maths that strategies share: from attention masses to masks of pages, for all rows and heads at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from keysift.kvcache import Context, Step

from .ops.column_scores import ColumnScores, column_scores


def pages(step: Step) -> Tensor:
    """[F] int32, every page number."""
    return torch.arange(step.max_pages, dtype=torch.int32, device=step.starts.device)


def causal(step: Step) -> Tensor:
    """[R, F] bool, the pages that some query of the row may see."""
    return pages(step) <= step.last_pages[:, None]


def zones(step: Step, sink: int, local: int | Tensor) -> Tensor:
    """[R, F] bool: the first `sink` tokens and every query's last `local`, in whole pages, and the row's own pages.

    `local` is one number for all rows or one for each, [R].
    """
    first = torch.minimum(step.starts, step.starts - local + 1).clamp(min=0) // step.page_size  # [R]
    page = pages(step)
    return causal(step) & ((page * step.page_size < sink) | (page >= first[:, None]))


def cover(mass: Tensor, share: float, least: int = 0, unit: int = 1) -> Tensor:
    """Bool mask of the fewest entries of mass [..., F] that together hold `share` of it, but at least `least`.

    Entries are chosen in blocks of `unit` neighbours. The entry that crosses the share is in; of equals the earlier. A
    share of 1 takes everything, so that rounding cannot lose a page.
    """
    if share >= 1.0:
        return torch.ones_like(mass, dtype=torch.bool)
    if (unit := min(unit, mass.shape[-1])) > 1:
        padded = torch.nn.functional.pad(mass, (0, -mass.shape[-1] % unit))
        blocks = cover(torch.unflatten(padded, -1, (-1, unit)).sum(-1), share, -(-least // unit))
        return blocks.repeat_interleave(unit, -1)[..., : mass.shape[-1]]
    ordered = mass.double().sort(dim=-1, descending=True, stable=True)
    total = ordered.values.cumsum(-1)
    before = total - ordered.values
    rank = torch.arange(mass.shape[-1], device=mass.device)
    chosen = (before < share * total[..., -1:]) | (rank < least)
    return torch.zeros_like(chosen).scatter_(-1, ordered.indices, chosen)


def level(mass: Tensor, share: float) -> Tensor:
    """Bool mask of the entries of mass [..., F] above the highest of four levels that holds `share` of the total.

    Cheaper than `cover`, as nothing is sorted, and a little larger. The lowest level always suffices: entries below
    ``(1 - share) / F`` of the total add up to less than ``1 - share``.
    """
    total = mass.sum(-1, keepdim=True)
    least = (1.0 - share) / mass.shape[-1] * total
    keep = mass >= least
    for factor in (4.0, 16.0, 64.0):
        higher = mass >= factor * least
        keep = torch.where((mass * higher).sum(-1, keepdim=True) >= share * total, higher, keep)
    return keep


def spread_bands(bands: Tensor, step: Step) -> Tensor:
    """Diagonal bands [Hq, F] bool -> [R, Hq, F] bool: every page that a band crosses within the row.

    Band b holds the keys ``b * S ... (b + 1) * S - 1`` tokens before a query. Over a row it crosses one page more than
    the row and the band are long; dropping that one would lose ``r / S`` of a diagonal that lies r tokens off the
    page grid.
    """
    size, page = step.page_size, pages(step).long()
    nearest = (step.starts[:, None] - (page + 1) * size + 1).clamp(min=0) // size  # [R, F], band of the closest pair
    furthest = (step.lasts[:, None] - page * size) // size  # negative: the page lies in the row's future
    counts = torch.nn.functional.pad(bands.long().cumsum(-1), (1, 0))  # [Hq, F + 1], chosen bands before each
    upto = counts[:, (furthest + 1).clamp(min=0)]  # [Hq, R, F]
    return (upto > counts[:, nearest.clamp(max=step.max_pages)]).transpose(0, 1)


def estimate(means: Tensor, ends: Tensor, context: Context, *, queries_per_probe: int) -> ColumnScores:
    """`column_scores` of mean queries [n, Hq, D] over the mean keys of full pages that begin by positions `ends` [n].

    One score a page: blind to a single key that its page's mean does not show.
    """
    step, frames = context.step, context.page_means()
    last_full = (step.lasts[-1] + 1) // step.page_size - 1
    return column_scores(
        means.to(frames.k.dtype),
        frames.k,
        frames.table[:1].expand(means.shape[0] // queries_per_probe, -1, -1),
        torch.minimum(ends // step.page_size, last_full).int(),
        queries_per_probe=queries_per_probe,
        scale=context.spec.softmax_scale,
    )


def pooled(q: Tensor, context: Context, group: int) -> Tensor:
    """[R, Hq, F] fp32: the greatest `estimate` of each page over the means of every `group` queries of the row.

    A `group` that does not divide the row's width is cut to their common divisor; a short row repeats its last query.
    """
    step = context.step
    width = step.queries_per_row
    group = math.gcd(group, width)
    if missing := step.num_rows * width - q.shape[0]:
        q = torch.cat([q, q[-1:].expand(missing, -1, -1)])
    means = torch.unflatten(q, 0, (-1, group)).mean(1, dtype=torch.float32)  # [R * M / group, Hq, D]
    ends = (step.starts[:, None] + torch.arange(group - 1, width, group, device=q.device)).flatten()
    return estimate(means, ends, context, queries_per_probe=width // group).peak


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """[...], the square root of the Jensen-Shannon divergence in nats of distributions p and q [..., F]; 0 to 0.83.

    Zero entries count as zero, and rounding cannot make it NaN.
    """
    middle = (p + q) / 2
    terms = torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(middle, middle)
    return (terms.sum(-1) / 2).clamp(min=0).sqrt()
