"""Every index answers alike over every tier, wherever pages lie: in high, shuffled, shared and reused frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pytest
import torch
from torch import Tensor

from keysift.attention import Strategy, bind
from keysift.attention.strategies.retrieval import Retrieval
from keysift.kvcache import CacheSpec, PagedCache, Span
from keysift.kvcache.index import BoundIndex, CodeIndex, FlatIndex, Graph, IndexSpec, Ivf, MeanIndex
from keysift.kvcache.index.graph import build
from tests.strategies import ROWS
from tests.tiers import Make, in_memory, offloaded, on_device, open_for, qkv

SPEC = CacheSpec(num_layers=2, num_kv_heads=2, head_dim=32, page_size=4)
LENGTH, SHARED, CHUNK, NEW = 96, 64, 32, 10
TIERS: dict[str, Make] = {
    "resident": on_device,
    "pool": offloaded(in_memory, slots=120, staged=100),
    "stage": offloaded(in_memory, slots=0, staged=100),
    "both": offloaded(in_memory, slots=40, staged=60),
}
INDEXES: dict[str, IndexSpec] = {
    "flat": FlatIndex(),
    "codes": CodeIndex(),
    "few codes": CodeIndex(candidates=2),
    "bound": BoundIndex(),
    "summary": MeanIndex(),
    "ivf": Ivf(segment=16, tokens_per_list=4, nprobe=2),
    "graph": Graph(degree=6, beam=4, top_k=4, queries=16, lag=16, sink=4, window=4, wait=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Searching(Retrieval):
    """Retrieval through one of `INDEXES`."""

    which: str

    def index_spec(self) -> IndexSpec:
        return INDEXES[self.which]


FEW = {"sink": 4, "window": 8, "budget": 16, "epsilon": 0.0, "dense_below": 0}
STRATEGIES: dict[str, Strategy] = {
    **{name: Searching(which=name, **FEW) for name in INDEXES},  # type: ignore[arg-type]
    **{str(row): row.make() for row in ROWS if not row.spec and row.make().index_spec() is not None},
}
CASES = [(name, tier) for name in STRATEGIES for tier in TIERS if name in INDEXES or tier in ("pool", "stage")]


@pytest.fixture(autouse=True)
def _few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else walks begin at most keys."""
    monkeypatch.setattr(build, "LEAST_POINTS", 4)


def write(cache: PagedCache, strategy: Strategy, sequence: int, number: int, start: int, stop: int) -> list[Tensor]:
    """Attention of tokens `start` to `stop` of a text: a prompt's in chunks up to `LENGTH`, then one by one."""
    cache.reserve(sequence, stop)
    outs = []
    while start < stop:
        prompt = start < LENGTH
        span = Span(sequence, start, min(CHUNK, LENGTH - start, stop - start) if prompt else 1)
        step = cache.prefill(span, 8, LENGTH - span.stop) if prompt else cache.decode([span])
        attend = bind(strategy, cache, step)
        outs += [attend(layer, *qkv(SPEC, number, span, layer)) for layer in range(SPEC.num_layers)]
        start = span.stop
    return outs


def shaken(make: Make, strategy: Strategy, seed: int) -> PagedCache:
    """A cache in which others have been: one still is, and the free frames are in any order and hold other texts."""
    cache, dice = make(SPEC), Random(seed)
    lives = [open_for(cache, strategy) for _ in range(2)]
    for number, sequence in enumerate(lives):
        write(cache, strategy, sequence, number + 7, 0, LENGTH + 3)
    for sequence in lives[1:]:
        cache.release(sequence)
    dice.shuffle(cache.allocator._free)
    return cache


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("name", "tier"), CASES)
def test_where_pages_lie_changes_no_bit(name: str, tier: str) -> None:
    strategy, stop = STRATEGIES[name], LENGTH + NEW
    fresh = on_device(SPEC)
    wanted = write(fresh, strategy, open_for(fresh, strategy), 1, 0, stop)
    cache = shaken(TIERS[tier], strategy, 3)
    first = open_for(cache, strategy)
    assert same(write(cache, strategy, first, 1, 0, stop), wanted)
    second = open_for(cache, strategy)
    cache.share(second, cache._frames[first][: SHARED // 4])
    tail = write(cache, strategy, second, 1, SHARED, stop)
    assert same(tail, wanted[-len(tail) :])
    for sequence in (first, second):
        cache.release(sequence)
    assert same(write(cache, strategy, open_for(cache, strategy), 1, 0, stop), wanted)
    cache.tier.close()


def test_the_graphs_in_question_are_walked() -> None:
    """They cover most of a text, and walks of so few keys do not find all that a scan finds."""
    graph = STRATEGIES["graph"]
    cache = on_device(SPEC)
    walked = write(cache, graph, open_for(cache, graph), 1, 0, LENGTH + NEW)
    assert len(cache.index(INDEXES["graph"]).entries) == 2  # type: ignore[arg-type]
    cache = on_device(SPEC)
    flat = STRATEGIES["flat"]
    scanned = write(cache, flat, open_for(cache, flat), 1, 0, LENGTH + NEW)
    assert not same(walked, scanned)
