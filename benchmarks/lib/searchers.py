"""Interface of the searchers in `benchmarks.ops.index`, and our own: indexes in a paged cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from keysift.kvcache import CacheSpec, Context, PagedCache, Span, Step
from keysift.kvcache.index import (
    BoundIndex,
    CodeIndex,
    FlatIndex,
    Graph,
    GraphIndex,
    IndexSpec,
    Ivf,
    IvfIndex,
    MeanIndex,
    PageIndex,
)
from keysift.kvcache.index.graph.ops import Reach, search_graphs
from keysift.kvcache.index.ivf.lists import list_masses

PAGE, CHUNK, ROW = 16, 1024, 64
BATCH = 8
"""Sequences of a step, which all share the keys."""
BEST_KEYS = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """Keys of a layer, and the queries that a prompt showed with them."""

    keys: Tensor
    """[T, Hkv, D] fp32, T a multiple of the page size."""
    shown: Tensor
    """[T, Hq, D] fp32"""

    @property
    def scale(self) -> float:
        return float(self.keys.shape[2] ** -0.5)


class Found(NamedTuple):
    """Answers to queries [n, H, D]."""

    keys: Tensor | None
    """[n, H, BEST_KEYS] int32, -1 pads the end; None: the search knows pages only."""
    masses: Tensor
    """[n, H, F] fp32, log mass of each page."""
    scanned: float
    """Share of the keys that a query was multiplied with, stand-ins of keys included."""
    seconds: float
    """Time of one query of one head."""


class Searcher(Protocol):
    """One kind of index over the keys of a problem, in several settings."""

    build_seconds: dict[str, float]
    """By setting: of all KV heads."""
    bytes_per_key: dict[str, float]
    """By setting: of one KV head, the keys themselves only where the index has a copy of them."""

    def search(self, q: Tensor, setting: str) -> Found:
        """The best keys for q [n, H, D], H a multiple of Hkv."""


Family = Callable[[Problem], Searcher]
"""Builds an index over the keys of a problem."""


@dataclass(slots=True)
class Paged:
    """Our indexes: `BATCH` sequences share the prompt's pages, and each decodes a token that is none of the keys.

    That token's own key points away from the query, so that it is not found in place of another.
    """

    problem: Problem
    cache: PagedCache
    sequences: list[int]
    built: dict[str, PageIndex]
    build_seconds: dict[str, float]
    bytes_per_key: dict[str, float] = field(default_factory=dict)

    @classmethod
    def make(cls, problem: Problem, specs: Mapping[str, IndexSpec]) -> Paged:
        tokens, num_kv_heads, dim = problem.keys.shape
        spec = CacheSpec(num_layers=1, num_kv_heads=num_kv_heads, head_dim=dim, page_size=PAGE)
        count = spec.pages_for(tokens) + BATCH
        cache = PagedCache(spec, count, max_sequences=BATCH + 1, max_len=tokens + 1)
        first = cache.open(*specs.values())
        built = {setting: cache.index(which) for setting, which in specs.items()}
        made = cls(problem, cache, [], built, dict.fromkeys(specs, 0.0))
        made._fill(first)
        for setting in specs:
            made._finish(setting)
        alike = {setting: [other for other in built if _share(built[setting], built[other])] for setting in built}
        made.build_seconds = {setting: sum(made.build_seconds[other] for other in alike[setting]) for setting in built}
        return made

    def search(self, q: Tensor, setting: str) -> Found:
        which, tokens = self.built[setting], len(self.problem.keys)
        keys, masses, scanned, seconds = [], [], 0.0, 0.0
        for part in torch.split(q, BATCH):
            step = self._decode(part)
            context = self.cache.context(0, step)
            began = time.perf_counter()
            answer = which.masses(part, context)
            seconds += time.perf_counter() - began
            masses.append(answer[..., : tokens // PAGE])
            if (hits := _hits(which, part, context)) is not None:
                keys.append(hits[0].masked_fill(hits[0] >= tokens, -1))
                scanned += float(hits[1].sum())
        count = q.shape[:2].numel()
        share = scanned / count / tokens if keys else _stand_ins(which, tokens) / tokens
        return Found(torch.cat(keys) if keys else None, torch.cat(masses), share, seconds / count)

    def _fill(self, first: int) -> None:
        cache, keys = self.cache, self.problem.keys
        cache.reserve(first, len(keys))
        for start in range(0, len(keys), CHUNK):
            stop = min(start + CHUNK, len(keys))
            step = cache.prefill(Span(first, start, stop - start), ROW, len(keys) - stop)
            cache.append(0, keys[start:stop], torch.zeros_like(keys[start:stop]), step)
            for setting, which in self.built.items():
                began = time.perf_counter()
                if which.entries is not None:
                    which.entries.observe(self.problem.shown[start:stop], cache.context(0, step), [0])
                self.build_seconds[setting] += time.perf_counter() - began
        self._build(first)
        for _ in range(BATCH):
            self.sequences.append(cache.open())
            cache.share(self.sequences[-1], step.held[0])
            cache.reserve(self.sequences[-1], len(keys) + 1)

    def _build(self, first: int) -> None:
        """Have the prompt's own sequence search, for what is built then."""
        keys = self.problem.keys
        step = self.cache.decode([Span(first, len(keys) - 1, 1)])
        self.cache.append(0, keys[-1:], torch.zeros_like(keys[-1:]), step)
        for setting, which in self.built.items():
            began = time.perf_counter()
            which.masses(self.problem.shown[-1:], self.cache.context(0, step))
            self.build_seconds[setting] += time.perf_counter() - began

    def _finish(self, setting: str) -> None:
        """Search once, for what is built at the first search; what a second one takes less was building."""
        query = self.problem.shown[-1:]
        first, second = (self.search(query, setting).seconds * query.shape[1] for _ in range(2))
        self.build_seconds[setting] += max(first - second, 0.0)
        which, (tokens, heads, _) = self.built[setting], self.problem.keys.shape
        self.bytes_per_key[setting] = _page_bytes(which, self.cache.spec) / PAGE or _kept(which) / tokens / heads

    def _decode(self, q: Tensor) -> Step:
        step = self.cache.decode([Span(sequence, len(self.problem.keys), 1) for sequence in self.sequences[: len(q)]])
        key = -torch.unflatten(q, 1, (self.problem.keys.shape[1], -1)).mean(2)
        self.cache.append(0, key, torch.zeros_like(key), step)
        return step


def _hits(index: PageIndex, q: Tensor, context: Context) -> tuple[Tensor, Tensor] | None:
    """Best keys [n, H, BEST_KEYS] and the number [n, H] of vectors scored for them; None for an index over pages."""
    if isinstance(index, GraphIndex):
        return _graph_hits(index, q, context)
    return _ivf_hits(index, q, context) if isinstance(index, IvfIndex) else None


def _graph_hits(index: GraphIndex, q: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Best keys [n, H, BEST_KEYS] of a search, and the number [n, H] of keys that it scored."""
    own, rows, frames = index.options, index.entries.of(context), context.fetch(context.all())
    reach = Reach(own.degree, own.beam, BEST_KEYS, own.sink, own.window)
    found = search_graphs(q, frames.k, frames.table, context.step.starts, rows, reach, context.spec.softmax_scale)
    return found.keys, found.scanned


def _ivf_hits(index: IvfIndex, q: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Best keys [n, H, BEST_KEYS] of a search over pages of one token, and the number [n, H] of keys and centroids."""
    own, ((_, lists, places),), frames = index.options, index.entries.of(context), context.fetch(context.all())
    slots = frames.table[..., None] * PAGE + torch.arange(PAGE, dtype=torch.int32)
    scores = list_masses(
        *(q, frames.k.transpose(1, 2).flatten(0, 1)[:, :, None], slots.flatten(2), context.step.starts),
        *(lists, places),
        scale=context.spec.softmax_scale,
        segment=own.segment,
        probes=own.nprobe,
    )
    best, centroids = scores.topk(BEST_KEYS), len(lists) * own.segment // own.tokens_per_list
    return best.indices.int().masked_fill(best.values == -torch.inf, -1), scores.isfinite().sum(-1) + centroids


def _stand_ins(which: PageIndex, tokens: int) -> float:
    """Vectors of a key's length that an index over pages multiplies a query with."""
    pages = tokens // PAGE
    if isinstance(which, FlatIndex):
        return tokens
    if isinstance(which, CodeIndex):
        return 2 * pages + min(which.candidates, pages) * PAGE
    return (2 if isinstance(which, BoundIndex) else 1) * pages


def _share(one: PageIndex, other: PageIndex) -> bool:
    """True if what the one builds is the other's too."""
    return one is other or (one.entries is not None and one.entries is other.entries)


def _kept(which: PageIndex) -> int:
    """Bytes that the index keeps of its own."""
    return 0 if which.entries is None else which.entries.bytes


def _page_bytes(which: PageIndex, spec: CacheSpec) -> int:
    """Bytes that the cache stores for the index per page and KV head, summaries at 2 bytes; 0: none."""
    if isinstance(which, CodeIndex):
        return spec.page_size * spec.code_words * 4 + 2 * spec.head_dim + 8
    return (4 * isinstance(which, BoundIndex) + 2 * isinstance(which, MeanIndex)) * spec.head_dim


def own_families() -> dict[str, tuple[Family, list[str]]]:
    """Our indexes by name, with their settings."""
    specs: dict[str, dict[str, IndexSpec]] = {
        "exact pages": {"": FlatIndex()},
        "codes": {str(count): CodeIndex(candidates=count) for count in (64, 128, 256, 512, 1024, 2048)},
        "bound": {"": BoundIndex()},
        "summary": {"": MeanIndex()},
        "ivf": {str(count): Ivf(nprobe=count) for count in (8, 16, 32, 64, 128, 256)},
        "graph": {
            str(beam): Graph(beam=beam, queries=2048, top_k=BEST_KEYS, sink=0, window=1, wait=True)
            for beam in (128, 256, 512, 640, 768)
        },
    }
    return {name: (_paged(kinds), list(kinds)) for name, kinds in specs.items()}


def _paged(specs: Mapping[str, IndexSpec]) -> Family:
    return lambda problem: Paged.make(problem, specs)
