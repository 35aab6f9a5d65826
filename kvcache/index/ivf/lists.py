"""Inverted lists: clusters of the keys of whole segments, and page masses by a scan of the best lists of a query.

A segment is a run of full pages. Its lists are the clusters of one KV head's keys in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.dispatch import op


class Lists(NamedTuple):
    """The lists of one segment and layer."""

    centroids: Tensor
    """[Hkv, C, D] of the keys' dtype, the mean key of each list; of an empty one any finite numbers."""
    ends: Tensor
    """[Hkv, C] int32, end of each list in `tokens`, which is the begin of the next."""
    tokens: Tensor
    """[Hkv, segment] int16, positions in the segment, list by list, ascending in each."""


@op(native="keysift.kvcache.index.ivf.native:cluster")
def cluster(k: Tensor, frames: Tensor, *, lists: int, iterations: int) -> list[Lists]:
    """k-means of the keys of each segment and head, less their mean; evenly spaced keys are the first centroids.

    A key goes to the nearest centroid, the first of equals; a centroid without keys keeps its value. Ends when no key
    moves, or after so many iterations.

    Args:
        k: [N, Hkv, S, D]
        frames: [n, Hkv, F] int32, pages of n segments.
        lists: C of each segment and head.
    """
    keys = _tokens(k, frames).float()  # [n, Hkv, segment, D]
    return [_cluster(segment, lists, iterations, k.dtype) for segment in keys]


@op(native="keysift.kvcache.index.ivf.native:list_masses")
def list_masses(
    q: Tensor,
    k: Tensor,
    frames: Tensor,
    positions: Tensor,
    lists: Sequence[Lists],
    places: Tensor,
    *,
    scale: float,
    segment: int,
    probes: int,
) -> Tensor:
    """[R, Hq, F] fp32, natural log of each page's mass by the keys of it that were scanned; -inf if none was.

    Each query head scans the `probes` lists whose centroids have the greatest inner product with it, of equals the
    first, and every token up to its position that no list covers: those after the last segment that ends before its
    own page. Masses below e^-80 of the greatest may count as nothing.

    Args:
        q: [R, Hq, D], at `positions` [R] int32.
        k: [N, Hkv, S, D] of q's dtype.
        frames: [R, Hkv, F] int32, page -> frame.
        lists: of all segments of all rows.
        places: [R, W] int32, place in `lists` of each row's first W segments, as far as they end before its own page.
        segment: tokens of one.
    """
    scores = _scan(q, k, frames, positions, lists, places, scale, segment, probes)
    return torch.unflatten(scores, -1, (-1, k.shape[2])).logsumexp(-1)


def _tokens(k: Tensor, frames: Tensor) -> Tensor:
    """k [N, Hkv, S, D] of frames [*, Hkv, F] -> [*, Hkv, F * S, D]"""
    heads = torch.arange(k.shape[1], device=k.device)[:, None]
    return k[frames.long(), heads].flatten(2, 3)


def _cluster(keys: Tensor, lists: int, iterations: int, dtype: torch.dtype) -> Lists:
    """keys [Hkv, segment, D]"""
    heads = [_cluster_one(head, lists, iterations, dtype) for head in keys]
    return Lists(*(torch.stack([head[part] for head in heads]) for part in range(3)))


def _cluster_one(keys: Tensor, lists: int, iterations: int, dtype: torch.dtype) -> Lists:
    """keys [segment, D] fp32 -> centroids [C, D], ends [C], tokens [segment]"""
    count = len(keys)
    mean = keys.mean(0)
    keys = keys - mean
    centroids = keys[torch.arange(lists, device=keys.device) * count // lists]
    nearest = torch.full((count,), -1, device=keys.device)
    for _ in range(iterations):
        before, nearest = nearest, (keys @ centroids.T - centroids.square().sum(-1) / 2).argmax(-1)
        if torch.equal(before, nearest):
            break
        sizes = torch.bincount(nearest, minlength=lists)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, keys)
        centroids = torch.where(sizes[:, None] > 0, sums / sizes[:, None], centroids)
    tokens = nearest.sort(stable=True).indices
    return Lists((centroids + mean).to(dtype), sizes.cumsum(0).int(), tokens.to(torch.int16))


def _scan(
    q: Tensor,
    k: Tensor,
    frames: Tensor,
    positions: Tensor,
    lists: Sequence[Lists],
    places: Tensor,
    scale: float,
    segment: int,
    probes: int,
) -> Tensor:
    """Scores [R, Hq, F * S] of the keys that are scanned, -inf elsewhere."""
    keys = _tokens(k, frames).float()
    scores = (torch.unflatten(q.float(), 1, (k.shape[1], -1)) @ keys.transpose(2, 3)).flatten(1, 2) * scale
    token = torch.arange(scores.shape[2], device=q.device)
    scanned = torch.zeros_like(scores, dtype=torch.bool)
    for row, position in enumerate(positions.tolist()):
        count = min(position // k.shape[2] * k.shape[2] // segment, places.shape[1])
        scanned[row] = (token >= count * segment) & (token <= position)
        if count > 0:
            row_lists = [lists[place] for place in places[row, :count].tolist()]
            scanned[row, :, : count * segment] = _members(q[row], row_lists, probes)
    return scores.masked_fill(~scanned, -torch.inf)


def _members(q: Tensor, lists: Sequence[Lists], probes: int) -> Tensor:
    """[Hq, n * segment] bool, the tokens of the `probes` best lists of consecutive segments for q [Hq, D]."""
    centroids = torch.cat([part.centroids for part in lists], 1).float()  # [Hkv, n * C, D]
    sizes = torch.cat([part.ends.diff(prepend=part.ends.new_zeros(len(part.ends), 1)) for part in lists], 1)
    groups = q.shape[0] // centroids.shape[0]
    scores = (torch.unflatten(q.float(), 0, (-1, groups)) @ centroids.transpose(1, 2)).flatten(0, 1)  # [Hq, n * C]
    empty = (sizes == 0).repeat_interleave(groups, 0)
    best = scores.masked_fill(empty, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[:, :probes]
    chosen = torch.zeros_like(empty).scatter_(1, best, True) & ~empty
    owners = torch.cat([owner(part) + i * part.ends.shape[1] for i, part in enumerate(lists)], 1)
    return chosen.gather(1, owners.repeat_interleave(groups, 0))


def owner(lists: Lists) -> Tensor:
    """[Hkv, segment] int64, the list of each token."""
    places = torch.arange(lists.tokens.shape[1], device=lists.tokens.device, dtype=torch.int32)
    owners = torch.searchsorted(lists.ends, places.expand(lists.tokens.shape).contiguous(), right=True)
    return torch.zeros_like(owners).scatter_(1, lists.tokens.long(), owners)
