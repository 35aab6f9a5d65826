"""Random events of many sequences over an offloaded cache whose store fails at times, and a twin on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from keysift.attention import Strategy, bind, make
from keysift.kvcache import (
    CacheSpec,
    DeviceTier,
    HostStore,
    OffloadError,
    OffloadTier,
    PagedCache,
    PageKeys,
    Phase,
    PoolSize,
    Span,
    Step,
)
from keysift.kvcache.tiers.file_store import FileStore
from tests.failing import Failing

CPU = torch.device("cpu")
WORDS, SEQUENCES, FRAMES, GROUP = 97, 4, 40, 2
EVENTS, SEEDS = 60, 12
CHOICE: dict[str, object] = {"sink": 3, "window": 6, "dense_below": 0}
TOKENS: tuple[tuple[str, dict[str, object]], ...] = (
    ("dense", {}),
    ("streaming", {"sink": 5, "window": 9}),
    ("retrieval", CHOICE | {"budget": 24, "epsilon": 0.0}),
    ("retrieval", CHOICE | {"budget": 40, "epsilon": 0.1, "index": "flat"}),
    ("retrieval", CHOICE | {"budget": 16, "epsilon": 0.0, "index": "summary"}),
    ("quest", CHOICE | {"budget": 24, "dense_layers": 1}),
    ("nosa", CHOICE | {"budget": 32, "queried": 16, "m_max": 1, "epsilon": 0.2}),
    ("topk", {"sink": 3, "window": 6, "top_k": 9}),
)


@dataclass
class Life:
    """One open sequence."""

    handle: int
    words: list[int]
    """Tokens that are cached."""


@dataclass
class World:
    """An offloaded cache, its twin on the device, and the sequences that are open in both."""

    dice: Random
    cache: PagedCache
    twin: PagedCache
    store: Failing
    embedded: tuple[Tensor, ...]
    """q, k and v of each layer and word: [L, WORDS, heads, D]"""
    lives: list[Life] = field(default_factory=list)
    failures: int = 0
    exact: int = 0

    @property
    def spec(self) -> CacheSpec:
        return self.cache.spec

    @property
    def tier(self) -> OffloadTier:
        assert isinstance(self.cache.tier, OffloadTier)
        return self.cache.tier

    def begin(self) -> None:
        """Open a sequence, whose first pages may be shared with another one."""
        if len(self.lives) == SEQUENCES:
            return
        words = list(self._text(self.dice.randrange(3), self.dice.randrange(1, 70)))
        keys = PageKeys("", self.spec.page_size).upto(words)
        handles = [cache.open() for cache in (self.cache, self.twin)]
        assert handles[0] == handles[1]
        known = min(len(cache.prefix.match(keys)) for cache in (self.cache, self.twin))
        for cache in (self.cache, self.twin):
            cache.share(handles[0], cache.prefix.match(keys)[:known])
        self.lives.append(Life(handles[0], words[: known * self.spec.page_size]))

    def _text(self, which: int, length: int) -> Iterator[int]:
        """Random words; texts of one kind have a common start."""
        kind, alike = Random(which), self.dice.randrange(length)
        for i in range(length):
            word = kind.randrange(WORDS)
            yield word if i < alike else self.dice.randrange(WORDS)

    def reserve(self, life: Life, tokens: int) -> bool:
        """True if both have the pages; a failure leaves the number of free pages as it was."""
        missing = self.spec.pages_for(tokens) - len(self.cache._frames[life.handle])
        if tokens > 200 or missing > min(self.cache.free_pages, self.twin.free_pages):
            return False
        self.twin.reserve(life.handle, tokens)
        for _ in range(100):
            free = self.cache.free_pages
            try:
                self.cache.reserve(life.handle, tokens)
                return True
            except OffloadError:
                self.failures += 1
                assert self.cache.free_pages == free
        raise AssertionError("never")

    def prompt(self) -> None:
        """Run a prompt's chunk that begins and ends anywhere."""
        life = self.dice.choice(self.lives)
        length = self.dice.randrange(1, 1 + self.tier.size.staged * self.spec.page_size // 2)
        words = list(self._text(self.dice.randrange(3), length)) if life.words else []
        words = words or list(self._text(0, length))
        if not self.reserve(life, len(life.words) + length):
            return
        span, row = Span(life.handle, len(life.words), length), self.dice.choice([4, 8, 16])
        steps = [cache.prefill(span, row) for cache in (self.cache, self.twin)]
        if self._same(self._prompt_strategy(), steps, words):
            life.words += words

    def _prompt_strategy(self) -> Strategy:
        return make("dense") if self.dice.random() < 0.7 else make("streaming", sink=5, window=9)

    def generate(self) -> None:
        """Generate some tokens of some sequences, each step under the same strategy or another."""
        which = [life for life in self.lives if self.dice.random() < 0.7]
        name, options = self.dice.choice(TOKENS)
        for _ in range(self.dice.randrange(1, 7)):
            if self.dice.random() < 0.2:
                name, options = self.dice.choice(TOKENS)
            strategy = make(name, **options)
            ready = [life for life in which if self.reserve(life, len(life.words) + 1)]
            if not ready or not self._possible(strategy, ready):
                return
            spans = [Span(life.handle, len(life.words), 1) for life in ready]
            words = [self.dice.randrange(WORDS) for _ in ready]
            if not self._same(strategy, [cache.decode(spans) for cache in (self.cache, self.twin)], words):
                return
            for life, word in zip(ready, words, strict=True):
                life.words.append(word)

    def _possible(self, strategy: Strategy, lives: Sequence[Life]) -> bool:
        return not strategy.scans or self.tier.holds(sum(self._pages(life) + 1 for life in lives))

    def _pages(self, life: Life) -> int:
        return self.spec.pages_for(len(life.words))

    def _same(self, strategy: Strategy, steps: Sequence[Step], words: Sequence[int]) -> bool:
        """Run a step in both and compare; False: it failed and was given up."""
        if self.dice.random() < 0.2:
            self._mistake(steps[0])
        while (found := self._tried(strategy, steps[0], words)) is None:
            if self.dice.random() < 0.3:
                self._give_up(steps[0])
                return False
        if self.dice.random() < 0.1:
            found = self._tried(strategy, steps[0], words) or found  # as a step may run twice
        wanted = self._run(strategy, self.twin, steps[1], words)
        held = sum(self.spec.pages_for(span.stop) for span in steps[0].spans) <= self.tier.size.staged
        self.exact += held
        tolerance = 0.0 if held else 2e-2
        for one, other in zip(found, wanted, strict=True):
            assert not other.isnan().any()
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        return True

    def _mistake(self, step: Step) -> None:
        """Run the same step with other words and selections, whose results are discarded."""
        strategy, words = make("dense"), [self.dice.randrange(WORDS) for _ in step.positions]
        if step.phase is Phase.DECODE:
            strategy = make("quest", sink=3, window=6, budget=self.dice.choice([8, 24]), dense_layers=0, dense_below=0)
        self._tried(strategy, step, words)

    def _give_up(self, step: Step) -> None:
        """Roll both caches back to before the step."""
        for cache in (self.cache, self.twin):
            for span in step.spans:
                cache.rollback(span.sequence, span.start)

    def _tried(self, strategy: Strategy, step: Step, words: Sequence[int]) -> list[Tensor] | None:
        try:
            return self._run(strategy, self.cache, step, words)
        except OffloadError:
            self.failures += 1
            return None

    def _run(self, strategy: Strategy, cache: PagedCache, step: Step, words: Sequence[int]) -> list[Tensor]:
        attend, index = bind(strategy, cache, step), torch.tensor(words)
        with torch.inference_mode():
            return [
                attend(layer, *(part[layer, index] for part in self.embedded)) for layer in range(self.spec.num_layers)
            ]

    def keep(self) -> None:
        """Offer full pages for reuse."""
        life, size = self.dice.choice(self.lives), self.spec.page_size
        keys = PageKeys("", size).upto(life.words)
        for cache in (self.cache, self.twin):
            cache.keep(life.handle, keys)

    def rollback(self) -> None:
        life = self.dice.choice(self.lives)
        tokens = self.dice.randrange(len(life.words) + 1)
        if self.dice.random() < 0.3:
            tokens = tokens // self.spec.page_size * self.spec.page_size
        try:
            self.twin.rollback(life.handle, tokens)
        except ValueError:
            return
        self.cache.rollback(life.handle, tokens)
        del life.words[tokens:]

    def end(self) -> None:
        life = self.lives.pop(self.dice.randrange(len(self.lives)))
        for cache in (self.cache, self.twin):
            cache.release(life.handle)

    def poison(self) -> None:
        """Fill all memory that must not be read with NaN."""
        tier, free = self.tier, self.cache.allocator._free
        pool, stage = tier._pool_reader.pool, tier._stage_reader.stage
        for layer in range(self.spec.num_layers):
            tier._pool_reader.prefetcher.wait(layer)
            pages, owner = pool.pages[layer], pool.residents(layer).owner
            unused = (owner < 0) | torch.isin(owner, torch.tensor(free, dtype=torch.int32))
            for head, slot in unused.nonzero().tolist():
                pages[slot, head] = torch.nan
            for handle in set(range(SEQUENCES)) - {life.handle for life in self.lives}:
                if pool.opened(layer, handle) in {*free, None}:
                    pages[tier.size.slots + handle] = torch.nan
        stage.pages[len(stage) :] = torch.nan
        self.store.poison(sorted(self.store.claimed & set(free)))

    def events(self) -> Iterator[Callable[[], None]]:
        for _ in range(EVENTS):
            yield self.dice.choices(
                [self.begin, self.prompt, self.generate, self.keep, self.rollback, self.end, self.poison],
                [3, 5, 8, 2, 4, 1, 2],
            )[0]


@contextmanager
def world(seed: int, folder: Path | None) -> Iterator[World]:
    dice = Random(seed)
    heads, layers = dice.choice([1, 2, 3]), dice.choice([1, 2, 3])
    dim, page = dice.choice([5, 8, 13, 16]), dice.choice([4, 16])
    windows = (0, 7, 0)[:layers] if dice.random() < 0.3 else ()
    dtype = dice.choice([torch.float32, torch.bfloat16])
    spec = CacheSpec(layers, heads, dim, page, dtype, windows=windows)
    staged = FRAMES if dice.random() < 0.6 else dice.randrange(3, 12)
    size = PoolSize(dice.choice([1, 4, 9, 16, 60]), staged, SEQUENCES, dice.choice([0, 0, 1, 3, 8]))
    store = Failing(
        HostStore(spec, CPU) if folder is None else FileStore(spec, folder), spec, dice.choice([0.0, 0.1, 0.25]), seed
    )
    tiers = OffloadTier(spec, FRAMES, store, size, CPU), DeviceTier(spec, FRAMES, CPU)
    caches = [PagedCache(spec, FRAMES, max_sequences=SEQUENCES, max_len=256, tier=tier) for tier in tiers]
    pools = (tiers[0]._pool_reader.pool.pages, tiers[0]._stage_reader.stage.pages, tiers[1].k, tiers[1].v)
    for pages in (*pools, *(tier.summaries(layer) for tier in tiers for layer in range(layers))):
        pages.fill_(torch.nan)
    generator = torch.Generator().manual_seed(seed)
    embedded = [
        torch.randn(layers, WORDS, count, dim, generator=generator).to(dtype) for count in (GROUP * heads, heads, heads)
    ]
    yield World(dice, caches[0], caches[1], store, (2 * embedded[0], *embedded[1:]))
    tiers[0].close()


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_events_give_the_results_of_the_twin(seed: int, place: str, tmp_path: Path) -> None:
    with world(seed, tmp_path if place == "file" else None) as here:
        for event in here.events():
            if here.lives or event == here.begin:
                event()
        while here.lives:
            here.end()
        assert here.cache.free_pages == here.twin.free_pages == FRAMES
