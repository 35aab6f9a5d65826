"""No index ever answers from an entry whose page is gone: random lives of sequences, compared with recomputation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from keysift.kvcache import CacheSpec, Context, OutOfFrames, PagedCache, Span
from keysift.kvcache.index import (
    BoundIndex,
    CodeIndex,
    FlatIndex,
    Graph,
    IndexSpec,
    Ivf,
    MeanIndex,
)

PAGE, HEADS, KV_HEADS, DIM, FRAMES = 4, 4, 2, 16, 12
SPEC = CacheSpec(num_layers=1, num_kv_heads=KV_HEADS, head_dim=DIM, page_size=PAGE)
INDEXES: dict[str, IndexSpec] = {
    "flat": FlatIndex(),
    "codes": CodeIndex(),
    "few codes": CodeIndex(candidates=2),
    "bound": BoundIndex(),
    "summary": MeanIndex(),
}


def fresh() -> PagedCache:
    cache = PagedCache(SPEC, FRAMES, max_sequences=4, max_len=FRAMES * PAGE)
    for tensor in (cache.tier.k, cache.tier.v):  # type: ignore[attr-defined]
        tensor.fill_(math.nan)
    return cache


def query() -> Tensor:
    return torch.randn(1, HEADS, DIM, generator=torch.Generator().manual_seed(7))


@dataclass
class Life:
    """A sequence and what was written to it."""

    handle: int
    keys: Tensor = field(default_factory=lambda: torch.empty(0, KV_HEADS, DIM))

    @property
    def full(self) -> int:
        return len(self.keys) // PAGE


def write(cache: PagedCache, handle: int, start: int, keys: Tensor) -> None:
    """Append keys [n, Hkv, D] after the first `start` tokens: a single one at decode, several as a chunk."""
    cache.reserve(handle, start + len(keys))
    span = Span(handle, start, len(keys))
    step = cache.decode([span]) if len(keys) == 1 else cache.prefill(span, PAGE)
    cache.append(0, keys, keys + 1, step)
    cache.observe(0, torch.randn(len(keys), HEADS, DIM), step)


def masses_of(cache: PagedCache, life: Life, which: IndexSpec) -> Tensor:
    """Masses for the sequence's last token, written again."""
    step = cache.decode([Span(life.handle, len(life.keys) - 1, 1)])
    cache.append(0, life.keys[-1:], life.keys[-1:] + 1, step)
    context: Context = cache.context(0, step, which)
    assert context.index is not None
    return context.index.masses(query(), context)


class Lives(RuleBasedStateMachine):
    """Sequences come, share, grow, roll back and go in a cache that is too small for all of them."""

    which: IndexSpec

    @initialize()
    def begin(self) -> None:
        self.cache = fresh()
        self.lives: list[Life] = []
        self.seed = 0

    def keys(self, count: int) -> Tensor:
        self.seed += 1
        return torch.randn(count, KV_HEADS, DIM, generator=torch.Generator().manual_seed(self.seed)) * 2

    @precondition(lambda self: len(self.lives) < 4)
    @rule(tokens=st.integers(1, 14), pick=st.integers(0, 9), pages=st.integers(0, 3))
    def open(self, tokens: int, pick: int, pages: int) -> None:
        """A new sequence, with the first pages of another one where there is one."""
        life = Life(self.cache.open(self.which))
        if self.lives:
            other = self.lives[pick % len(self.lives)]
            pages = min(pages, other.full)
            self.cache.share(life.handle, self.cache._frames[other.handle][:pages])
            life.keys = other.keys[: pages * PAGE].clone()
        self.lives.append(life)
        self.grow(len(self.lives) - 1, tokens)
        if not len(life.keys):
            self.cache.release(self.lives.pop().handle)

    @precondition(lambda self: bool(self.lives))
    @rule(pick=st.integers(0, 9), tokens=st.integers(1, 9))
    def grow(self, pick: int, tokens: int) -> None:
        life = self.lives[pick % len(self.lives)]
        keys = self.keys(tokens)
        try:
            write(self.cache, life.handle, len(life.keys), keys)
        except OutOfFrames:
            return
        life.keys = torch.cat([life.keys, keys])

    @precondition(lambda self: bool(self.lives))
    @rule(pick=st.integers(0, 9))
    def end(self, pick: int) -> None:
        self.cache.release(self.lives.pop(pick % len(self.lives)).handle)

    @precondition(lambda self: bool(self.lives))
    @rule(pick=st.integers(0, 9), drop=st.integers(1, 7))
    def roll_back(self, pick: int, drop: int) -> None:
        life = self.lives[pick % len(self.lives)]
        left = max(len(life.keys) - drop, 1)
        try:
            self.cache.rollback(life.handle, left)
        except ValueError:
            return
        life.keys = life.keys[:left]

    @invariant()
    def every_sequence_is_answered_as_if_it_were_alone(self) -> None:
        for life in getattr(self, "lives", []):
            alone, cache = Life(0, life.keys), fresh()
            alone.handle = cache.open(self.which)
            write(cache, alone.handle, 0, life.keys)
            torch.testing.assert_close(masses_of(self.cache, life, self.which), masses_of(cache, alone, self.which))


@pytest.mark.parametrize("name", INDEXES)
def test_no_index_answers_from_what_is_gone(name: str) -> None:
    class Case(Lives):
        which = INDEXES[name]

    Case.TestCase.settings = settings(deadline=None, max_examples=12, stateful_step_count=15)
    Case.TestCase("runTest").runTest()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 30])
def test_flat_masses_are_log_sums_of_exponentials(length: int) -> None:
    cache, life = fresh(), Life(0)
    life.handle = cache.open()
    life.keys = torch.randn(length, KV_HEADS, DIM, generator=torch.Generator().manual_seed(1))
    write(cache, life.handle, 0, life.keys)
    found = masses_of(cache, life, FlatIndex())
    keys = life.keys.double().repeat_interleave(HEADS // KV_HEADS, 1)
    scores = torch.einsum("hd,jhd->hj", query()[0].double(), keys) * DIM**-0.5
    pages = [scores[:, start : start + PAGE].logsumexp(1) for start in range(0, length, PAGE)]
    torch.testing.assert_close(
        found[0].double().log_softmax(-1), torch.stack(pages, -1).log_softmax(-1), rtol=1e-5, atol=1e-5
    )


def test_codes_find_the_page_of_a_key_and_bounds_hold() -> None:
    cache, life = fresh(), Life(0)
    life.handle = cache.open()
    life.keys = torch.randn(40, KV_HEADS, DIM, generator=torch.Generator().manual_seed(2)) * 0.5
    life.keys[17] = query()[0].view(KV_HEADS, -1, DIM).mean(1) * 3
    write(cache, life.handle, 0, life.keys)
    exact, codes, bounds = (masses_of(cache, life, INDEXES[name]) for name in ("flat", "codes", "bound"))
    exact = exact - exact.logsumexp(-1, keepdim=True)
    assert torch.equal(codes.argmax(-1), exact.argmax(-1))
    scores = exact - exact[..., -1:] + bounds[..., -1:]  # the own page is exact in both
    assert bool((bounds >= scores - 1e-4).all())


def assert_masses_of_some_keys(masses: Tensor, scores: Tensor) -> None:
    """Every finite mass [H, F] is that of some of its page's keys by their scores [H, F, S], and some are finite."""
    subsets = torch.arange(1, 2**PAGE)[:, None] >> torch.arange(PAGE) & 1  # [2^S - 1, S]
    possible = (scores.exp() @ subsets.T.float()).log()  # [H, F, 2^S - 1]
    right = torch.isclose(masses[..., None], possible, rtol=1e-5, atol=1e-5).any(-1)
    assert bool(masses.isfinite().any())
    assert bool((right | (masses == -math.inf)).all())


@pytest.mark.parametrize(
    "which",
    [
        Ivf(segment=8, tokens_per_list=4, nprobe=2),
        Graph(4, 8, 8, queries=8, lag=4, sink=4, window=4, wait=True),
    ],
    ids=["ivf", "graph"],
)
def test_a_search_after_a_rollback_finds_what_is_there_now(which: Ivf | Graph) -> None:
    cache, life = fresh(), Life(0)
    index = cache.index(which)
    life.handle = cache.open(which)
    life.keys = torch.randn(40, KV_HEADS, DIM, generator=torch.Generator().manual_seed(5))
    write(cache, life.handle, 0, life.keys)
    masses_of(cache, life, which)
    for left, more in ((30, 1), (29, 7), (21, 2)):
        cache.rollback(life.handle, left)
        fill = torch.randn(more, KV_HEADS, DIM, generator=torch.Generator().manual_seed(left)) * 3
        write(cache, life.handle, left, fill)
        life.keys = torch.cat([life.keys[:left], fill])
        step = cache.decode([Span(life.handle, len(life.keys) - 1, 1)])
        masses = index.masses(query(), cache.context(0, step, which))[0]
        scores = torch.einsum("hd,jhd->hj", query()[0], life.keys.repeat_interleave(HEADS // KV_HEADS, 1)) * DIM**-0.5
        padded = torch.nn.functional.pad(scores, (0, -len(life.keys) % PAGE), value=-math.inf)
        assert_masses_of_some_keys(masses, torch.unflatten(padded, -1, (-1, PAGE)))


def test_rollback_refuses_to_reopen_a_shared_page() -> None:
    cache = fresh()
    first, second = cache.open(), cache.open()
    write(cache, first, 0, torch.randn(8, KV_HEADS, DIM))
    cache.share(second, cache._frames[first])
    with pytest.raises(ValueError, match="tokens: 6"):
        cache.rollback(second, 6)
    cache.rollback(second, 4)
    assert cache.allocator.available == FRAMES - 2
    cache.release(second)
    cache.rollback(first, 6)
    cache.release(first)
    assert cache.allocator.available == FRAMES
