"""Attention mass of each page for single queries: exact, by the codes of its keys, or an upper bound.

All give natural logarithms of masses: the sum of exp(score) over the page's tokens that the query sees, -inf if it
sees none. A query q [R, Hq, D] is at `positions` [R] int32 of the sequence whose frames are its row of `frames`
[R, Hkv, F] int32, page -> frame, which may have strides of 0. Scores are ``scale * q . key``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import op
from ..encode import Codes, decode


@op(
    native="keysift.kvcache.ops.page_masses.native:page_masses",
    triton="keysift.kvcache.ops.page_masses.triton:page_masses",
)
def page_masses(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor, *, scale: float) -> Tensor:
    """[R, Hq, F] fp32, exact log masses by the keys k [N, Hkv, S, D] of q's dtype, up to a factor per row and head.

    -1 as a position: the query sees nothing. A share of less than 2^-126 may count as none.
    """
    return _masses(q, _gather(k, frames), positions, scale)


@op(
    native="keysift.kvcache.ops.page_masses.native:code_masses",
    triton="keysift.kvcache.ops.page_masses.triton:code_masses",
)
def code_masses(
    q: Tensor,
    k: Tensor,
    own: Tensor,
    codes: Codes,
    frames: Tensor,
    positions: Tensor,
    *,
    scale: float,
    candidates: int,
    slack: float = 0.35,
) -> Tensor:
    """[R, Hq, F] fp32, log masses by codes for the `candidates` most promising full pages of each row and KV head.

    The page that a query stands in is exact. Full pages are ranked, per KV head, by the sum over its query heads of the
    softmax of ``scale * (q . middle + slack * |q| . half)``, an estimate of the best score within the page's
    bounds; ties go to the lower page. Those that are no candidates get the score of their middle alone, times S.

    Args:
        k: [*, Hkv, S, D] of q's dtype, read for the page of `positions` alone.
        own: [R, Hkv] int32, the frame of k that holds that page.
        codes: of the frames of `frames`, [N, Hkv, ...]; those of pages that are not full may hold anything.
    """
    page_size = k.shape[2]
    last = positions // page_size  # [R]
    exact = _own(q, k, own, positions, scale)  # [R, Hq]
    here = Codes(*(_gather(part, frames) for part in codes))  # [R, Hkv, F, ...]
    fine = _masses(q, decode(here), _last_full(positions, page_size), scale)
    middle, half = (here.bounds.float() * here.scales[..., None]).unbind(-2)  # [R, Hkv, F, D] each
    full = torch.arange(frames.shape[2], device=q.device) < last[:, None]  # [R, F]
    middle, half = (part.masked_fill(~full[:, None, :, None], 0.0) for part in (middle, half))
    centre, spread = (_scores(x, part, scale) for x, part in ((q, middle), (q.abs(), half)))
    chosen = _candidates(centre + slack * spread, full, frames.shape[1], candidates)
    masses = torch.where(chosen, fine, (centre + math.log(page_size)).masked_fill(~full[:, None], -torch.inf))
    return masses.scatter(2, last.long()[:, None, None].expand(-1, q.shape[1], 1), exact[..., None])


@op(
    native="keysift.kvcache.ops.page_masses.native:page_bounds",
    triton="keysift.kvcache.ops.page_masses.triton:page_bounds",
)
def page_bounds(
    q: Tensor, k: Tensor, own: Tensor, summaries: Tensor, frames: Tensor, positions: Tensor, *, scale: float
) -> Tensor:
    """[R, Hq, F] fp32, an upper bound of each log mass: S times the best key between its least and greatest.

    The page that a query stands in is exact. Tang et al., "Quest", arXiv 2406.10774, rank pages by this.

    Args:
        k: [*, Hkv, S, D] of q's dtype, read for the page of `positions` alone.
        own: [R, Hkv] int32, the frame of k that holds that page.
        summaries: [N, Hkv, 4, D]; those of pages that are not full may hold anything.
    """
    page_size = k.shape[2]
    last = positions // page_size
    full = torch.arange(frames.shape[2], device=q.device) < last[:, None]  # [R, F]
    here = _gather(summaries, frames).float().masked_fill(~full[:, None, :, None, None], 0.0)  # [R, Hkv, F, 4, D]
    least, greatest = here[..., 1, :], here[..., 2, :]
    positive, negative = q.float().clamp(min=0), q.float().clamp(max=0)
    best = _scores(positive, greatest, scale) + _scores(negative, least, scale)
    bounds = (best + math.log(page_size)).masked_fill(~full[:, None], -torch.inf)
    exact = _own(q, k, own, positions, scale)
    return bounds.scatter(2, last.long()[:, None, None].expand(-1, q.shape[1], 1), exact[..., None])


def _gather(pages: Tensor, frames: Tensor) -> Tensor:
    """pages [N, Hkv, ...] of frames [R, Hkv, F] -> [R, Hkv, F, ...]"""
    return pages[frames.long(), torch.arange(pages.shape[1], device=pages.device)[:, None]]


def _scores(q: Tensor, vectors: Tensor, scale: float) -> Tensor:
    """q [R, Hq, D] over vectors [R, Hkv, F, D] -> [R, Hq, F]"""
    grouped = torch.unflatten(q.float(), 1, (vectors.shape[1], -1))
    return torch.einsum("rkgd,rkfd->rkgf", grouped, vectors.float()).flatten(1, 2) * scale


def _masses(q: Tensor, keys: Tensor, positions: Tensor, scale: float) -> Tensor:
    """q [R, Hq, D] over the tokens up to `positions` of keys [R, Hkv, F, S, D] -> [R, Hq, F]"""
    scores = torch.unflatten(_scores(q, keys.flatten(2, 3), scale), -1, (keys.shape[2], -1))
    token = torch.arange(scores.shape[2] * scores.shape[3], device=q.device).view(scores.shape[2:])
    return scores.masked_fill((token > positions[:, None, None])[:, None], -torch.inf).logsumexp(-1)


def _own(q: Tensor, k: Tensor, own: Tensor, positions: Tensor, scale: float) -> Tensor:
    """[R, Hq], the exact log mass of the page that each query stands in, in the frames own [R, Hkv]."""
    keys = _gather(k, own[:, :, None])  # [R, Hkv, 1, S, D]
    return _masses(q, keys, positions % k.shape[2], scale)[..., 0]


def _last_full(positions: Tensor, page_size: int) -> Tensor:
    """[R], the last token of the last full page before each position; -1: none."""
    return positions // page_size * page_size - 1


def _candidates(scores: Tensor, full: Tensor, num_kv_heads: int, count: int) -> Tensor:
    """Scores [R, Hq, F] -> [R, Hq, F] bool, the same for the heads of a group."""
    hidden = scores.masked_fill(~full[:, None], -torch.inf)
    shares = hidden.softmax(-1).nan_to_num(0.0)  # where no page is full
    ranks = torch.unflatten(shares, 1, (num_kv_heads, -1)).sum(2).masked_fill(~full[:, None], -1.0)
    best = ranks.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    chosen = torch.zeros_like(ranks, dtype=torch.bool).scatter_(-1, best, True) & full[:, None]
    return chosen.repeat_interleave(scores.shape[1] // num_kv_heads, 1)
