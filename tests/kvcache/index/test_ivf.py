"""The index of inverted lists: what a search finds, and that no list outlives its keys."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keysift.kvcache import CacheSpec, Context, OutOfFrames, PagedCache, Span
from keysift.kvcache.index import FlatIndex, Ivf
from keysift.kvcache.index.ivf import segments as segments_module
from keysift.kvcache.index.ivf.lists import Lists, cluster
from keysift.kvcache.index.room import Room

SPEC = CacheSpec(num_layers=2, num_kv_heads=2, head_dim=32, page_size=4)
OPTIONS = Ivf(segment=16, tokens_per_list=4, nprobe=2, iterations=3)


def clouds(tokens: int, heads: int, dim: int, centres: int = 32) -> Tensor:
    """Keys [T, Hkv, D] around a few centres."""
    around = torch.randn(centres, heads, dim)[torch.randint(centres, (tokens,))]
    return around * 2 + 0.3 * torch.randn(tokens, heads, dim)


def make_cache(spec: CacheSpec = SPEC, frames: int = 32, max_len: int = 64) -> PagedCache:
    return PagedCache(spec, frames, max_sequences=4, max_len=max_len)


def write(
    cache: PagedCache, sequence: int, keys: Tensor, start: int = 0, layer: int = 0, q: Tensor | None = None
) -> Context:
    """A prompt's keys [T, Hkv, D] from `start` on; the context of queries at each of them."""
    cache.reserve(sequence, start + len(keys))
    step = cache.prefill(Span(sequence, start, len(keys)), queries_per_row=1)
    cache.append(layer, keys, keys, step)
    cache.observe(layer, keys if q is None else q, step)
    return cache.context(layer, step)


def test_options_that_do_not_fit_are_refused() -> None:
    for wrong in ({"nprobe": 0}, {"iterations": 0}, {"segment": 24}, {"segment": 2**16}):
        with pytest.raises(ValueError, match="ivf"):
            Ivf(**wrong)
    with pytest.raises(ValueError, match="page size"):
        Ivf(segment=2, tokens_per_list=1).make(SPEC, Room())


def test_all_lists_are_all_keys() -> None:
    cache = make_cache()
    which = Ivf(segment=16, tokens_per_list=4, nprobe=16)
    index = cache.index(which)
    context = write(cache, cache.open(which), torch.randn(61, 2, 32))
    q = torch.randn(61, 4, 32)
    flat = FlatIndex().masses(q, context).log_softmax(-1)  # masses have a factor of their own
    torch.testing.assert_close(index.masses(q, context).log_softmax(-1), flat, atol=1e-4, rtol=1e-5)


def test_few_lists_find_most_of_the_best_keys() -> None:
    """On pages of one token, whose masses are the scores of single keys."""
    spec = CacheSpec(num_layers=1, num_kv_heads=1, head_dim=64, page_size=1)
    cache = make_cache(spec, frames=4128, max_len=4128)
    index = cache.index(Ivf(segment=1024, nprobe=32))
    keys = clouds(4096, 1, 64)
    write(cache, sequence := cache.open(), keys)
    context = write(cache, sequence, torch.randn(16, 1, 64), start=4096)
    q = keys[torch.randint(4096, (16, 4)), 0] + torch.randn(16, 4, 64)
    scanned = index.masses(q, context)[..., :4096].isfinite()
    exact = keys[:, 0] @ q.flatten(0, 1).T  # [T, R * Hq]
    best = exact.topk(50, dim=0).indices.T.view(16, 4, 50)
    centroids = 4096 // 16
    assert scanned.gather(-1, best).float().mean() > 0.9
    assert scanned.sum(-1).float().mean() + centroids < 0.25 * 4096


def test_a_generated_token_is_found_at_once_and_ever_after() -> None:
    cache = make_cache(max_len=128)
    index = cache.index(OPTIONS)
    sequence, aim = cache.open(), torch.nn.functional.normalize(torch.randn(1, 2, 32), dim=-1)
    write(cache, sequence, torch.randn(21, 2, 32))
    for position in range(21, 80):
        keys = 20 * aim if position == 30 else torch.randn(1, 2, 32)
        cache.reserve(sequence, position + 1)
        step = cache.decode([Span(sequence, position, 1)])
        cache.append(0, keys, keys, step)
        q = aim.repeat_interleave(2, 1)
        cache.observe(0, q, step)
        context = cache.context(0, step)
        if position >= 30:
            assert index.masses(q, context)[0].argmax(-1).tolist() == [30 // 4] * 4


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Segments of each time that some were clustered."""
    counts: list[int] = []

    def record(k: Tensor, frames: Tensor, **numbers: int) -> list[Lists]:
        counts.append(len(frames))
        return cluster(k, frames, **numbers)

    monkeypatch.setattr(segments_module, "cluster", record)
    return counts


def test_layers_with_a_window_have_no_lists(built: list[int]) -> None:
    spec = CacheSpec(num_layers=2, num_kv_heads=2, head_dim=32, page_size=4, windows=(8, 0))
    for layer, expected in ((0, []), (1, [2])):
        cache = make_cache(spec)
        write(cache, cache.open(OPTIONS), torch.randn(40, 2, 32), layer=layer)
        assert built == expected


def test_a_segment_is_clustered_when_it_is_full(built: list[int]) -> None:
    cache = make_cache()
    sequence = cache.open(OPTIONS)
    for start, length in ((0, 15), (15, 1), (16, 30), (46, 1), (47, 1)):
        write(cache, sequence, torch.randn(length, 2, 32), start)
    assert built == [1, 1, 1]


def test_a_shared_prefix_shares_its_lists(built: list[int]) -> None:
    cache = make_cache()
    first, second = cache.open(OPTIONS), cache.open(OPTIONS)
    write(cache, first, torch.randn(34, 2, 32))
    names = [bytes([page]) for page in range(8)]
    cache.keep(first, names)
    cache.share(second, cache.prefix.match(names))
    write(cache, second, torch.randn(20, 2, 32), start=32)
    assert built == [2, 1]
    cache.release(first)
    cache.release(second)
    cache.share(first := cache.open(OPTIONS), cache.prefix.match(names))
    write(cache, first, torch.randn(20, 2, 32), start=32)
    assert built == [2, 1, 1]


@dataclass
class Play:
    """A small cache under a random schedule, whose index must always answer as a new one does."""

    generator: torch.Generator
    cache: PagedCache = field(default_factory=lambda: make_cache(frames=24, max_len=64))
    lengths: dict[int, int] = field(default_factory=dict)
    kept: list[list[bytes]] = field(default_factory=list)
    compared: int = 0

    def __post_init__(self) -> None:
        self.index = self.cache.index(OPTIONS)

    def open(self, amount: int) -> None:
        """A new sequence, with a prefix that was kept where there is one."""
        if len(self.lengths) == 4:
            return
        sequence = self.cache.open(*[OPTIONS] * (amount % 3 > 0))  # some are never observed, but searched all the same
        frames = self.cache.prefix.match(self.kept[amount % len(self.kept)]) if self.kept else []
        self.cache.share(sequence, frames[: amount % 13])
        self.lengths[sequence] = 4 * len(frames[: amount % 13])

    def prefill(self, amount: int) -> None:
        if (sequence := self._any(amount)) is None or not self._reserve(sequence, amount):
            return
        span = Span(sequence, self.lengths[sequence], amount)
        self._run([span], prompt=True)

    def decode(self, amount: int) -> None:
        chosen = [sequence for i, sequence in enumerate(self.lengths) if amount >> i & 1]
        spans = [Span(sequence, self.lengths[sequence], 1) for sequence in chosen if self._reserve(sequence, 1)]
        if spans:
            self._run(spans, prompt=False)

    def abandon(self, amount: int) -> None:
        """A step that never ran, or not in all layers; its sequence is preempted or goes on."""
        if (sequence := self._any(amount)) is None or not self._reserve(sequence, amount):
            return
        step = self.cache.prefill(Span(sequence, self.lengths[sequence], amount), queries_per_row=1)
        for layer in range(amount % 3):
            self._append(layer, step.positions.shape[0], step)
        if amount % 2:
            self.release(amount)

    def keep(self, amount: int) -> None:
        if (sequence := self._any(amount)) is not None:
            names = [bytes([len(self.kept), page]) for page in range(self.lengths[sequence] // 4)]
            self.kept.append(names)
            self.cache.keep(sequence, names)

    def release(self, amount: int) -> None:
        if (sequence := self._any(amount)) is not None:
            self.cache.release(sequence)
            del self.lengths[sequence]

    def _any(self, amount: int) -> int | None:
        return list(self.lengths)[amount % len(self.lengths)] if self.lengths else None

    def _reserve(self, sequence: int, amount: int) -> bool:
        if (total := self.lengths[sequence] + amount) > 64:
            return False
        try:
            self.cache.reserve(sequence, total)
        except OutOfFrames:
            return False
        return True

    def _append(self, layer: int, tokens: int, step: object) -> Tensor:
        k = torch.randn(tokens, 2, 32, generator=self.generator)
        q = torch.randn(tokens, 4, 32, generator=self.generator)
        self.cache.append(layer, k, k, step)  # type: ignore[arg-type]
        self.cache.observe(layer, q, step)  # type: ignore[arg-type]
        return q

    def _run(self, spans: list[Span], prompt: bool) -> None:
        step = self.cache.prefill(spans[0], queries_per_row=1) if prompt else self.cache.decode(spans)
        for layer in range(2):
            q = self._append(layer, step.num_rows, step)
            context, fresh = self.cache.context(layer, step), OPTIONS.make(SPEC, Room())
            assert self.index.masses(q, context).equal(fresh.masses(q, context))
        for span in spans:
            self.lengths[span.sequence] += span.length


MOVES = ["open", "prefill", "prefill", "decode", "decode", "abandon", "keep", "release"]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(MOVES), st.integers(1, 40)), min_size=5, max_size=40), st.integers(0, 99))
def test_no_schedule_leaves_a_stale_list(moves: list[tuple[str, int]], seed: int) -> None:
    play = Play(torch.Generator().manual_seed(seed))
    for move, amount in [("open", 1), ("prefill", 33), ("keep", 1), ("open", 5), *moves]:
        getattr(play, move)(amount)


def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    cache = make_cache(frames=64)
    index = cache.index(OPTIONS)
    lengths = {cache.open(): length for length in (19, 3, 49, 32)}
    for sequence, length in lengths.items():
        write(cache, sequence, torch.randn(length, 2, 32))
        cache.reserve(sequence, length + 1)
    spans = [Span(sequence, length, 1) for sequence, length in lengths.items()]
    q, k = torch.randn(4, 4, 32), torch.randn(4, 2, 32)
    together = cache.decode(spans)
    cache.append(0, k, k, together)
    context = cache.context(0, together)
    masses = index.masses(q, context)
    for row, span in enumerate(spans):
        alone = cache.context(0, cache.decode([span]))
        mine = index.masses(q[row : row + 1], alone)
        assert mine.equal(masses[row : row + 1, :, : mine.shape[2]])
        assert (masses[row, :, mine.shape[2] :] == -torch.inf).all()
    assert index.masses(q, context).equal(masses)


def test_a_row_that_lacks_room_changes_no_other() -> None:
    cache = make_cache(frames=64, max_len=128)
    index = cache.index(OPTIONS)
    first = cache.open(OPTIONS)
    write(cache, first, torch.randn(61, 2, 32))
    cache.indexes.room.limit = cache.indexes.bytes  # the first one's lists are in use, and leave no room
    others = [cache.open(OPTIONS) for _ in range(2)]
    for other, length in zip(others, (61, 20), strict=True):
        write(cache, other, torch.randn(length, 2, 32))
    q, k = torch.randn(3, 4, 32), torch.randn(3, 2, 32)
    spans = [Span(sequence, length, 1) for sequence, length in zip((first, *others), (61, 61, 20), strict=True)]
    for span in spans:
        cache.reserve(span.sequence, span.stop)
    step = cache.decode(spans)
    cache.append(0, k, k, step)
    together = index.masses(q, cache.context(0, step))
    for row, span in enumerate(spans):
        context = cache.context(0, cache.decode([span]))
        alone = index.masses(q[row : row + 1], context)
        assert alone[0].equal(together[row, :, : alone.shape[2]])
        assert alone.isfinite().all() == (row > 0), "the first one's lists are searched, the others' keys are scanned"
