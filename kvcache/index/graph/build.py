"""Building of a graph over keys from the queries of a prompt, after RoarGraph (arXiv 2408.08933)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import KeyGraph, link_keys, nearest_keys

WANTED = 100
"""Nearest keys of a training query that become linked."""
TOKENS_PER_POINT = 256
"""A graph has one hub and one entry for so many tokens."""
LEAST_POINTS = 32
PIECE = 128
"""Training queries between two looks at whether to go on."""

Stopped = Callable[[], bool]


class Cancelled(Exception):
    """The graph is not wanted any more."""


def never() -> bool:
    """`Stopped` of a build that runs to its end."""
    return False


class Source(NamedTuple):
    """Keys and training queries of a graph."""

    queries: Tensor
    """[M, Hq, D], training queries; M = 0: keys stand for them."""
    k: Tensor
    """[N, Hkv, S, D], of the `Frames` whose table this is."""
    table: Tensor
    """[Hkv, F] int32, the full pages that it covers in `k`."""
    first: int
    """First token in the graph; those before are scanned anyway."""
    degree: int
    threads: int
    """0: as many as there are."""

    @property
    def tokens(self) -> int:
        return self.table.shape[1] * self.k.shape[2]


def build(source: Source, stopped: Stopped = never) -> KeyGraph:
    """A graph that links keys wanted by the same queries: the projection of query-key neighbourhoods.

    Raises `Cancelled` soon after `stopped` has become true.
    """
    nearest = _nearest(source, stopped)
    counts = _counts(nearest, source.tokens)
    points = _points(source.tokens)
    hubs = counts.sort(dim=-1, descending=True, stable=True).indices[:, :points]
    nearest = _without(nearest, hubs, source.tokens)
    links = link_keys(nearest, source.tokens, source.degree, threads=source.threads)
    entries = _entries(nearest, counts, points)
    return KeyGraph(links, torch.cat([hubs.int(), entries], 1).contiguous(), hubs.shape[1])


def graph_bytes(tokens: int, degree: int, num_kv_heads: int) -> int:
    """Bytes of a graph over so many tokens."""
    return 4 * num_kv_heads * (tokens * degree + 2 * _points(tokens))


def _points(tokens: int) -> int:
    """Hubs of a graph over so many tokens, and its entries."""
    return min(max(tokens // TOKENS_PER_POINT, LEAST_POINTS), tokens)


def _nearest(source: Source, stopped: Stopped) -> Tensor:
    """[Hkv, M, WANTED], nearest keys of each training query."""
    k, frames = _one_table(source)
    queries = _grouped(source.queries, k.shape[1]) if source.queries.shape[0] else _keys(k, frames, source.first)
    numbers = source.first, source.tokens, min(WANTED, source.tokens)
    nearest = []
    for piece in torch.split(queries, PIECE, dim=1):
        _check(stopped)
        nearest.append(nearest_keys(piece, k, frames, *numbers, threads=source.threads))
    _check(stopped)
    return torch.cat(nearest, 1)


def _check(stopped: Stopped) -> None:
    if stopped():
        raise Cancelled


def _one_table(source: Source) -> tuple[Tensor, Tensor]:
    """Keys [N, Hkv, S, D] and a table [F] of all heads: a copy where heads have tables of their own."""
    k, table = source.k, source.table
    if table.shape[0] == 1 or table.stride(0) == 0:
        return k, table[0]
    heads = torch.arange(table.shape[0])[:, None]
    return k[table.long(), heads].transpose(0, 1).contiguous(), torch.arange(table.shape[1], dtype=torch.int32)


def _grouped(queries: Tensor, num_kv_heads: int) -> Tensor:
    """[M, Hq, D] -> [Hkv, M * G, D]: all query heads of a group train the graph of their KV head."""
    grouped: Tensor = torch.unflatten(queries, 1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)
    return grouped.contiguous()


def _keys(k: Tensor, frames: Tensor, first: int) -> Tensor:
    """[Hkv, M, D], at most 1,024 evenly spread keys."""
    tokens, size = len(frames) * k.shape[2], k.shape[2]
    token = torch.linspace(first, tokens - 1, min(tokens, 1024)).long()
    return k[frames[token // size].long(), :, token % size].transpose(0, 1).contiguous()


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
