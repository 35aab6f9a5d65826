"""Building of a graph over keys from the queries of a prompt, after RoarGraph (arXiv 2408.08933)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .ops import KeyGraph, link_keys, nearest_keys

WANTED = 100
"""Nearest keys of a training query that become linked."""
TOKENS_PER_POINT = 256
"""A graph has one hub and one entry for so many tokens."""
LEAST_POINTS = 32
REPLACED = 4
"""An extension may replace one in so many of a token's older links."""


class Source(NamedTuple):
    """Keys and training queries of a graph."""

    queries: Tensor
    """[M, Hq, D], training queries; M = 0: keys stand for them."""
    k: Tensor
    """[N, Hkv, S, D]"""
    frames: tuple[int, ...]
    """Frames of the full pages that it covers."""
    first: int
    """First token in the graph; those before are scanned anyway."""
    degree: int
    threads: int
    """0: as many as there are."""

    @property
    def tokens(self) -> int:
        return len(self.frames) * self.k.shape[2]


def build(source: Source) -> KeyGraph:
    """A graph that links keys wanted by the same queries: the projection of query-key neighbourhoods."""
    nearest = _nearest(source)
    counts = _counts(nearest, source.tokens)
    points = max(source.tokens // TOKENS_PER_POINT, LEAST_POINTS)
    hubs = counts.sort(dim=-1, descending=True, stable=True).indices[:, :points]
    nearest = _without(nearest, hubs, source.tokens)
    links = link_keys(nearest, source.tokens, source.degree, threads=source.threads)
    entries = _entries(nearest, counts, points)
    return KeyGraph(links, torch.cat([hubs.int(), entries], 1).contiguous(), hubs.shape[1])


def extend(graph: KeyGraph, source: Source) -> KeyGraph:
    """The same graph over more tokens: the queries since then link new keys with each other and with old ones."""
    nearest = _nearest(source)
    counts = _counts(nearest, source.tokens)
    nearest = _without(nearest, graph.points[:, : graph.hubs].long(), source.tokens)
    links = link_keys(nearest, source.tokens, source.degree, threads=source.threads)
    _keep_older(links, graph.links)
    points = max((source.tokens - graph.tokens) // TOKENS_PER_POINT, LEAST_POINTS)
    entries = _entries(nearest, counts, points)
    return KeyGraph(links, torch.cat([graph.points, entries], 1).contiguous(), graph.hubs)


def _nearest(source: Source) -> Tensor:
    """[Hkv, M, WANTED], nearest keys of each training query."""
    frames = torch.tensor(source.frames, dtype=torch.int32)
    queries = _grouped(source.queries, source.k.shape[1]) if source.queries.shape[0] else _keys(source, frames)
    return nearest_keys(
        queries, source.k, frames, source.first, source.tokens, min(WANTED, source.tokens), threads=source.threads
    )


def _grouped(queries: Tensor, num_kv_heads: int) -> Tensor:
    """[M, Hq, D] -> [Hkv, M * G, D]: all query heads of a group train the graph of their KV head."""
    grouped: Tensor = torch.unflatten(queries, 1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)
    return grouped.contiguous()


def _keys(source: Source, frames: Tensor) -> Tensor:
    """[Hkv, M, D], at most 1,024 evenly spread keys."""
    token = torch.linspace(source.first, source.tokens - 1, min(source.tokens, 1024)).long()
    size = source.k.shape[2]
    return source.k[frames[token // size].long(), :, token % size].transpose(0, 1).contiguous()


def _counts(nearest: Tensor, tokens: int) -> Tensor:
    """[Hkv, tokens], number of queries that want each token."""
    flat = nearest.flatten(1).long()
    counts = flat.new_zeros(nearest.shape[0], tokens + 1)  # the last one counts the padding
    return counts.scatter_add_(1, flat.where(flat >= 0, tokens), torch.ones_like(flat))[:, :tokens]


def _without(nearest: Tensor, hubs: Tensor, tokens: int) -> Tensor:
    """The same lists with hubs [Hkv, *] replaced by -1."""
    struck = torch.zeros(nearest.shape[0], tokens, dtype=torch.bool).scatter_(1, hubs, True)
    hit = struck.gather(1, nearest.flatten(1).clamp(min=0).long()).view_as(nearest)
    return nearest.masked_fill(hit, -1)


def _entries(nearest: Tensor, counts: Tensor, points: int) -> Tensor:
    """[Hkv, points] int32: of the keys nearest to each of some evenly spread queries, the one wanted by the fewest."""
    query = torch.linspace(0, nearest.shape[1] - 1, points).long()
    liked = nearest[:, query, : WANTED // 2]
    rarity = counts.gather(1, liked.flatten(1).clamp(min=0).long()).view(liked.shape)
    rarest = rarity.masked_fill(liked < 0, 2**62).argmin(-1, keepdim=True)
    return liked.gather(-1, rarest)[..., 0]


def _keep_older(links: Tensor, older: Tensor) -> None:
    """Append older links [Hkv, tokens, degree] to a few new ones, in place, without duplicates."""
    degree = links.shape[2]
    older_rows = links[:, : older.shape[1]]
    for head, token in (older_rows[..., 0] >= 0).nonzero().tolist():
        before = older[head, token].tolist()
        fresh = [to for to in older_rows[head, token].tolist() if to >= 0 and to not in before]
        free = max(degree // REPLACED, before.count(-1))
        merged = [*fresh[:free], *(to for to in before if to >= 0)][:degree]
        older_rows[head, token] = older.new_tensor(merged + [-1] * (degree - len(merged)))
    untouched = older_rows[..., 0] < 0
    older_rows[untouched] = older[untouched]
