"""Ops of key graphs: nearest keys, links and search."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.dispatch import op


@dataclass(frozen=True, slots=True, eq=False)
class KeyGraph:
    """One graph for each KV head over the first tokens of a sequence."""

    links: Tensor
    """[Hkv, tokens, degree] int32, tokens; -1 pads. Each token is also linked with its two neighbours."""
    points: Tensor
    """[Hkv, hubs + entries] int32, tokens; -1 pads."""
    hubs: int
    """Number of first points that most queries want. They are scored, never expanded: they would crowd the beam."""

    @property
    def tokens(self) -> int:
        return self.links.shape[1]

    @property
    def entries(self) -> int:
        return self.points.shape[1] - self.hubs

    @property
    def bytes(self) -> int:
        return 4 * (self.links.numel() + self.points.numel())


class Reach(NamedTuple):
    """Limits of a search."""

    degree: int
    beam: int
    """Keys that a walk keeps; it ends when all of them are expanded."""
    top_k: int
    sink: int
    """First tokens that are scanned, in whole pages, and are no hits."""
    window: int
    """Last tokens that are scanned, in whole pages, and are no hits."""

    def within(self, tokens: int) -> Reach:
        """The same search in a context of so many tokens; a walk reserves memory for its beam."""
        most = max(tokens, 1)
        return self._replace(beam=min(self.beam, most), sink=min(self.sink, most), window=min(self.window, most))


class Found(NamedTuple):
    """The best keys outside of sink and window, and page masses by them and all scanned keys."""

    keys: Tensor
    """[R, Hq, top_k] int32, tokens by exact score, the best first, each once; -1 pads."""
    scores: Tensor
    """[R, Hq, top_k] fp32, ``scale * q . key``; -inf pads."""
    scanned: Tensor
    """[R, Hq] int32, number of keys that were scored."""
    masses: Tensor
    """[R, Hq, F] fp32, log masses: exact for scanned pages, of the hits for others, -inf elsewhere."""


@op(native="keysift.kvcache.index.graph.native:nearest_keys")
def nearest_keys(q: Tensor, k: Tensor, frames: Tensor, first: int, end: int, wanted: int, threads: int = 0) -> Tensor:
    """[Hkv, M, wanted] int32: of tokens `first` to `end` those with the largest inner product, the best first.

    Of equal ones the lower token is taken; -1 pads.

    Args:
        q: [Hkv, M, D], training queries of each KV head.
        k: [N, Hkv, S, D] of q's dtype.
        frames: [F] int32, page -> frame.
        threads: that compute; 0: as many as there are.
    """
    keys = k[frames.long()].transpose(0, 1).flatten(1, 2)[:, first:end]  # [Hkv, T, D]
    scores = torch.einsum("hmd,htd->hmt", q.float(), keys.float())
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :wanted] + first
    return torch.nn.functional.pad(best, (0, wanted - best.shape[-1]), value=-1).int()


@op(native="keysift.kvcache.index.graph.native:link_keys")
def link_keys(nearest: Tensor, tokens: int, degree: int, threads: int = 0) -> Tensor:
    """[Hkv, tokens, degree] int32: links between keys that the same queries want, the strongest first; -1 pads.

    The strength of a link is the squared cosine between the sets of queries that want its ends, so that keys which
    all queries want do not crowd out the others; of equal ones the nearer token is taken, then the lower. The weakest
    quarter gives way to reverse links: in each of ``degree // 4`` rounds every token gets one from the strongest of its
    partners that has room. So every token can be reached.

    Args:
        nearest: [Hkv, M, wanted] int32, nearest keys of each query; -1: none.
    """
    links = nearest.new_full((nearest.shape[0], tokens, degree), -1)
    for head, lists in enumerate(nearest.tolist()):
        partners = []
        wanted: list[list[int]] = [[] for _ in range(tokens)]
        for query, keys in enumerate(lists):
            for key in keys:
                if key >= 0:
                    wanted[key].append(query)
        for token in range(tokens):
            counts: dict[int, int] = {}
            for query in wanted[token]:
                for key in lists[query]:
                    if key >= 0 and key != token:
                        counts[key] = counts.get(key, 0) + 1
            partners.append(_strongest(token, counts, wanted)[:degree])
        for token, best in enumerate(_link_back(partners, degree)):
            links[head, token, : len(best)] = links.new_tensor(best)
    return links


def _strongest(token: int, counts: dict[int, int], wanted: list[list[int]]) -> list[int]:
    return sorted(counts, key=lambda other: (-(counts[other] ** 2) / len(wanted[other]), abs(other - token), other))


def _link_back(partners: list[list[int]], degree: int) -> list[list[int]]:
    room, firm = degree // 4, degree - degree // 4
    given: list[list[int]] = [[] for _ in partners]
    for _ in range(room):
        for token, mine in enumerate(partners):
            for to in mine:
                if len(given[to]) < room and token not in partners[to][:firm] and token not in given[to]:
                    given[to].append(token)
                    break
    merged = ([*own[:firm], *back, *own[firm:]] for own, back in zip(partners, given, strict=True))
    return [list(dict.fromkeys(tokens))[:degree] for tokens in merged]


@op(native="keysift.kvcache.index.graph.native:search_graphs")
def search_graphs(
    q: Tensor,
    k: Tensor,
    frames: Tensor,
    positions: Tensor,
    graphs: Sequence[KeyGraph | None],
    reach: Reach,
    scale: float,
) -> Found:
    """Best-first walks from the entry points of each row's graph; all tokens it does not cover are scanned.

    Args:
        q: [R, Hq, D], one query in each row.
        k: [N, Hkv, S, D] of q's dtype.
        frames: [R, Hkv, F] int32, page -> frame.
        positions: [R] int32, of the queries; -1: the row is left out.
        graphs: of each row.
    """
    heads, page_size, pages = q.shape[1], k.shape[2], frames.shape[2]
    group = heads // k.shape[1]
    rows = []
    for row, graph in enumerate(graphs):
        for head in range(heads):
            kv_head, end = head // group, int(positions[row]) + 1
            held = frames[row, kv_head, : -(-end // page_size)].long()
            keys = k[held, kv_head].flatten(0, 1)[:end].float()
            scores = (keys @ q[row, head].float() * scale).tolist()
            rows.append(_search(scores, graph, kv_head, reach, page_size, pages))
    found = (torch.unflatten(torch.stack(part), 0, (len(graphs), heads)) for part in zip(*rows, strict=True))
    return Found(*found)


def _search(
    scores: list[float], graph: KeyGraph | None, kv_head: int, reach: Reach, page_size: int, pages: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row and head, of which all scores up to its position are known but only looked at when met."""
    end = len(scores)
    first = -(-reach.sink // page_size) * page_size
    window = max(max(end - reach.window, 0) // page_size * page_size, first)
    covered = min(0 if graph is None else graph.tokens, window)
    tail = max(covered, first)
    rest = [*range(min(first, end)), *range(tail, end)]
    best: list[tuple[float, int]] = [(-scores[token], token) for token in range(tail, min(window, end))]
    met: set[int] = set()
    if graph is not None and covered > first:
        best += _walk(scores, graph, kv_head, reach.beam, range(first, covered), met)
    best = sorted(best)[: reach.top_k]
    masses = torch.full((pages * page_size,), -torch.inf)
    for token in [*rest, *(token for _, token in best)]:
        masses[token] = scores[token]
    keys, values = torch.full((reach.top_k,), -1, dtype=torch.int32), torch.full((reach.top_k,), -torch.inf)
    keys[: len(best)] = torch.tensor([token for _, token in best], dtype=torch.int32)
    values[: len(best)] = torch.tensor([-score for score, _ in best])
    scanned = torch.tensor(len(rest) + len(met), dtype=torch.int32)
    return keys, values, scanned, masses.view(pages, page_size).logsumexp(-1)


def _walk(
    scores: list[float], graph: KeyGraph, kv_head: int, size: int, inside: range, met: set[int]
) -> list[tuple[float, int]]:
    """(-score, token) of the hubs and of the best keys of a walk; `met` gets all keys that were scored."""

    def meet(tokens: Iterable[int]) -> list[tuple[float, int]]:
        fresh = [token for token in dict.fromkeys(tokens) if token in inside and token not in met]
        met.update(fresh)
        return [(-scores[token], token) for token in fresh]

    points: list[int] = graph.points[kv_head].tolist()
    hubs, beam = meet(points[: graph.hubs]), sorted(meet(points[graph.hubs :]))[:size]
    walked: set[int] = set()
    while (token := next((token for _, token in beam if token not in walked), None)) is not None:
        walked.add(token)
        for item in meet([token - 1, token + 1, *graph.links[kv_head, token].tolist()]):
            insort(beam, item)
        del beam[size:]
    return hubs + beam
