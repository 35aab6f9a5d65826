"""Whatever happens to the sequences of an offloaded cache, it answers as one that has everything at hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from keysift.attention import Strategy, bind, make
from keysift.kvcache import CacheSpec, HomeError, MemoryHome, OffloadTier, PagedCache, PoolSize, Span, Step

FRAMES, SEQUENCES, MAX_LEN, LAYERS, KV_HEADS = 90, 4, 200, 2, 2
ZONES: dict[str, Any] = {"sink": 4, "window": 9, "dense_below": 0, "dense_layers": 0}
TOKENS = [
    make("dense"),
    make("retrieval", **ZONES, budget=24),
    make("retrieval", **ZONES, budget=16, tail="mean"),
    make("quest", **ZONES, budget=24),
    make("nosa", **ZONES, budget=24, queried=16, m_max=1),
    make("streaming", sink=4, window=20),
    make("topk", sink=4, window=8, top_k=5),
]


class Faulty(MemoryHome):
    """Fails at random, before or after its work is done, and leaves garbage where it was to bring something."""

    def __init__(self, spec: CacheSpec, chance: random.Random, share: float) -> None:
        super().__init__(spec, torch.device("cpu"))
        self._chance, self._share = chance, share

    def claim(self, frames: Iterable[int]) -> None:
        self._fail()
        known = len(self._extents)
        super().claim(frames)
        for extent in self._extents[known:]:
            extent.fill_(torch.nan)

    def write(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        self._fail()
        super().write(layer, frames, pages)
        self._fail()

    def read(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        pages.fill_(torch.nan)
        self._fail()
        super().read(layer, frames, pages)

    def fetch(self, layer: int, pool: Tensor, loads: Tensor, slots: Tensor) -> None:
        for head, row in enumerate(loads.tolist()):
            for frame, slot in zip(row, slots[head].tolist(), strict=True):
                if frame >= 0:
                    pool[slot, head] = torch.nan
        self._fail()
        super().fetch(layer, pool, loads, slots)

    def _fail(self) -> None:
        if self._chance.random() < self._share:
            raise HomeError("by chance")


@dataclass(slots=True)
class Twins:
    """Two caches to which the same happens; what every token holds is remembered, so that it can be shared."""

    chance: random.Random
    plain: PagedCache
    offloaded: PagedCache
    strategies: list[Strategy]
    tokens: dict[int, list[Tensor]] = field(default_factory=dict)
    """Of each open sequence, [L, 2 * Hkv + Hq, D] each."""
    failures: int = 0

    def both(self, act: Callable[[PagedCache], object]) -> None:
        act(self.plain)
        self.again(lambda: act(self.offloaded))

    def again(self, act: Callable[[], Any]) -> Any:
        """What fails by chance is done once more, from its beginning."""
        while True:
            try:
                return act()
            except HomeError:
                self.failures += 1

    def open(self) -> int:
        sequence = self.plain.open()
        assert self.offloaded.open() == sequence
        self.tokens[sequence] = []
        return sequence

    def share(self, sequence: int, other: int) -> None:
        size = self.plain.spec.page_size
        pages = self.chance.randint(0, (len(self.tokens[other]) - 1) // size)
        self.both(lambda cache: cache.share(sequence, cache._frames[other][:pages]))
        self.tokens[sequence] = self.tokens[other][: pages * size]

    def grow(self, sequences: Sequence[int], count: int) -> list[Span]:
        """`count` new tokens of each, with pages for them."""
        spans = []
        for sequence in sequences:
            known = self.tokens[sequence]
            spans.append(Span(sequence, len(known), count))
            known += torch.randn(count, LAYERS, 4 * KV_HEADS, self.plain.spec.head_dim)
            self.both(lambda cache, span=spans[-1]: cache.reserve(span.sequence, span.stop))  # type: ignore[misc]
        return spans

    def run(self, strategy: Strategy, spans: list[Span], step: Callable[[PagedCache], Step], exact: bool) -> None:
        wanted = self._attend(strategy, self.plain, step, spans)
        found = self.again(lambda: self._attend(strategy, self.offloaded, step, spans))
        for one, other in zip(found, wanted, strict=True):
            assert not one.isnan().any()
            assert torch.equal(one, other) if exact else torch.allclose(one, other, atol=1e-5)

    def _attend(
        self, strategy: Strategy, cache: PagedCache, make_step: Callable[[PagedCache], Step], spans: list[Span]
    ) -> list[Tensor]:
        attend = bind(strategy, cache, make_step(cache))
        each = torch.stack([token for span in spans for token in self.tokens[span.sequence][span.start : span.stop]])
        q, k, v = each.split([2 * KV_HEADS, KV_HEADS, KV_HEADS], 2)
        return [attend(layer, 2 * q[:, layer], k[:, layer], v[:, layer]) for layer in range(LAYERS)]

    def prefill(self, exact: bool) -> None:
        (span,) = self.grow([self.chance.choice(list(self.tokens))], self.chance.randint(1, 30))
        self.run(make("dense"), [span], lambda cache: cache.prefill(span, 8), exact)

    def decode(self, exact: bool) -> None:
        ready = [sequence for sequence, known in self.tokens.items() if known]
        if not ready:
            return
        strategy = self.chance.choice(self.strategies)
        sequences = self.chance.sample(ready, self.chance.randint(1, len(ready)))
        for _ in range(self.chance.randint(1, 9)):
            spans = self.grow(sequences, 1)
            self.run(strategy, spans, lambda cache, spans=spans: cache.decode(spans), exact)  # type: ignore[misc]

    def rollback(self) -> None:
        sequence = self.chance.choice(list(self.tokens))
        length = self.chance.randint(0, len(self.tokens[sequence]))
        try:
            self.plain.rollback(sequence, length)
        except ValueError:
            return
        self.offloaded.rollback(sequence, length)
        del self.tokens[sequence][length:]

    def release(self, sequence: int) -> None:
        self.both(lambda cache: cache.release(sequence))
        del self.tokens[sequence]


def happen(twins: Twins, exact: bool) -> None:
    """One random event."""
    longest = max((len(known) for known in twins.tokens.values()), default=0)
    total = sum(len(known) for known in twins.tokens.values())
    event = twins.chance.choice(["open", "prefill", "prefill", "decode", "decode", "decode", "rollback", "release"])
    if not twins.tokens or (event == "open" and len(twins.tokens) < SEQUENCES):
        others = [sequence for sequence, known in twins.tokens.items() if known]
        sequence = twins.open()
        if others and twins.chance.random() < 0.5:
            twins.share(sequence, twins.chance.choice(others))
    elif event == "release" or longest > MAX_LEN - 40 or total > 0.7 * FRAMES * twins.plain.spec.page_size:
        twins.release(max(twins.tokens, key=lambda sequence: len(twins.tokens[sequence])))
    elif event == "rollback":
        twins.rollback()
    elif event == "prefill":
        twins.prefill(exact)
    elif event == "decode":
        twins.decode(exact)


@pytest.mark.parametrize("share", [0.0, 0.02])
@pytest.mark.parametrize("seed", range(12))
def test_random_events(seed: int, share: float) -> None:
    torch.manual_seed(seed)
    chance = random.Random(seed)
    dim, page, whole = chance.choice([8, 12, 16]), chance.choice([3, 4, 8]), chance.random() < 0.6
    spec = CacheSpec(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=dim, page_size=page)
    staged = FRAMES if whole else -(-30 // page) + 2
    size = PoolSize(chance.choice([0, 5, 20, FRAMES]), staged, SEQUENCES, chance.choice([0, 0, 3]))
    tier = OffloadTier(spec, FRAMES, Faulty(spec, random.Random(seed), share), size, torch.device("cpu"))
    for pages in (tier._pool.pages, tier._stage.pages):
        pages.fill_(torch.nan)
    sizes = {"max_sequences": SEQUENCES, "max_len": MAX_LEN}
    strategies = [strategy for strategy in TOKENS if whole or not strategy.scans]
    twins = Twins(chance, PagedCache(spec, FRAMES, **sizes), PagedCache(spec, FRAMES, **sizes, tier=tier), strategies)
    for _ in range(60):
        happen(twins, whole)
    for sequence in list(twins.tokens):
        twins.release(sequence)
    assert twins.plain.free_pages == twins.offloaded.free_pages == FRAMES
    assert bool(twins.failures) == bool(share)
