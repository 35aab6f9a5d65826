"""Random lives of sequences with different indexes, or none, in one cache: answers are those of a cache for each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from keysift.kvcache import CacheSpec, OutOfFrames, PagedCache, PageKeys, Span
from keysift.kvcache.index import CodeIndex, FlatIndex, Graph, IndexSpec, Ivf
from keysift.kvcache.index import room as room_module
from keysift.kvcache.index.graph import build

PAGE, HEADS, KV_HEADS, DIM, FRAMES, WORDS, LONGEST = 4, 4, 2, 32, 40, 50, 96
SPEC = CacheSpec(num_layers=1, num_kv_heads=KV_HEADS, head_dim=DIM, page_size=PAGE)
GRAPH = Graph(degree=4, beam=3, top_k=3, queries=8, lag=8, sink=4, window=4, wait=True)
GRAPHS: list[IndexSpec] = [GRAPH, replace(GRAPH, beam=9)]
OTHERS: list[IndexSpec] = [
    FlatIndex(),
    CodeIndex(candidates=2),
    *(Ivf(segment=16, tokens_per_list=4, nprobe=nprobe) for nprobe in (1, 2)),
    Ivf(segment=8, tokens_per_list=4, nprobe=2),
    Graph(degree=6, beam=3, top_k=3, queries=0, lag=12, sink=0, window=4, wait=True),
]
EMBEDDED = torch.randn(WORDS, HEADS + KV_HEADS, DIM, generator=torch.Generator().manual_seed(3))


@dataclass
class Life:
    """A sequence, its index, and its tokens."""

    handle: int
    spec: IndexSpec | None
    words: list[int]


def write(cache: PagedCache, lives: list[Life], words: list[list[int]]) -> None:
    """Append words to the lives: one to each at decode, or several to one as a chunk."""
    for life, more in zip(lives, words, strict=True):
        cache.reserve(life.handle, len(life.words) + len(more))
    spans = [Span(life.handle, len(life.words), len(more)) for life, more in zip(lives, words, strict=True)]
    step = cache.decode(spans) if len(words[0]) == 1 else cache.prefill(spans[0], PAGE)
    q, k = EMBEDDED[[word for more in words for word in more]].split([HEADS, KV_HEADS], 1)
    cache.append(0, k, k + 1, step)
    cache.observe(0, q, step)
    for life, more in zip(lives, words, strict=True):
        life.words += more


def masses(cache: PagedCache, life: Life, spec: IndexSpec) -> Tensor:
    """[Hq, F], for the sequence's last token, written again."""
    step = cache.decode([Span(life.handle, len(life.words) - 1, 1)])
    q, k = EMBEDDED[life.words[-1:]].split([HEADS, KV_HEADS], 1)
    cache.append(0, k, k + 1, step)
    cache.observe(0, q, step)
    context = cache.context(0, step, spec)
    assert context.index is not None
    return context.index.masses(q, context)[0]


def of_its_own_tokens(found: Tensor, life: Life) -> bool:
    """Every finite mass is that of some of its page's keys."""
    q, k = EMBEDDED[life.words].split([HEADS, KV_HEADS], 1)
    scores = torch.einsum("hd,jhd->hj", q[-1], k.repeat_interleave(HEADS // KV_HEADS, 1)) * DIM**-0.5
    pages = torch.nn.functional.pad(scores, (0, -len(life.words) % PAGE), value=-math.inf).unflatten(-1, (-1, PAGE))
    subsets = torch.arange(1, 2**PAGE)[:, None] >> torch.arange(PAGE) & 1
    possible = (pages.exp() @ subsets.T.float()).log()
    right = torch.isclose(found[..., None], possible, rtol=1e-4, atol=1e-4).any(-1)
    return bool((right | (found == -math.inf)).all())


class Lives(RuleBasedStateMachine):
    """Sequences come, share prefixes, grow alone and together, are preempted, roll back and go."""

    specs: list[IndexSpec]
    limit: int | None
    lives: list[Life]

    @initialize()
    def begin(self) -> None:
        self.cache = PagedCache(SPEC, FRAMES, max_sequences=4, max_len=LONGEST, index_bytes=self.limit)
        self.lives = []

    @precondition(lambda self: len(self.lives) < 4)
    @rule(which=st.integers(-1, 9), seed=st.integers(0, 2), length=st.integers(20, 60))
    def open(self, which: int, seed: int, length: int) -> None:
        """A prompt, which shares with others of its seed what the prefix cache has of it, as the index knows it."""
        spec = None if which < 0 else self.specs[which % len(self.specs)]
        specs = () if spec is None else (spec,)
        words = torch.randint(WORDS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        shared = self.cache.match(PageKeys("", PAGE).upto(words[:-1]), *specs)
        life = Life(self.cache.open(*specs), spec, words[: len(shared) * PAGE])
        self.cache.share(life.handle, shared)
        rest = words[len(life.words) :]
        cuts = [rest[start : start + 13] for start in range(0, len(rest), 13)]
        try:
            for chunk in cuts:
                write(self.cache, [life], [chunk])
        except OutOfFrames:
            self.cache.release(life.handle)
            return
        self.lives.append(life)
        self.cache.keep(life.handle, PageKeys("", PAGE).upto(words))

    @precondition(lambda self: bool(self.lives))
    @rule(words=st.lists(st.integers(0, WORDS - 1), min_size=4, max_size=4), times=st.integers(1, 9))
    def say(self, words: list[int], times: int) -> None:
        """Some tokens of all at once."""
        for _ in range(times):
            if any(len(life.words) >= LONGEST - 1 for life in self.lives):
                return
            try:
                for life in self.lives:
                    self.cache.reserve(life.handle, len(life.words) + 1)
            except OutOfFrames:
                return
            write(self.cache, self.lives, [[word] for word in words[: len(self.lives)]])

    @precondition(lambda self: bool(self.lives))
    @rule(pick=st.integers(0, 3))
    def end(self, pick: int) -> None:
        self.cache.release(self.lives.pop(pick % len(self.lives)).handle)

    @precondition(lambda self: bool(self.lives))
    @rule(pick=st.integers(0, 3))
    def fail(self, pick: int) -> None:
        """Its pages may be wrong, so nobody may share them."""
        life = self.lives.pop(pick % len(self.lives))
        self.cache.withdraw(life.handle)
        self.cache.release(life.handle)

    @precondition(lambda self: bool(self.lives))
    @rule(pick=st.integers(0, 3), drop=st.integers(1, 20))
    def roll_back(self, pick: int, drop: int) -> None:
        life = self.lives[pick % len(self.lives)]
        left = max(len(life.words) - drop, 1)
        try:
            self.cache.rollback(life.handle, left)
        except ValueError:
            return
        del life.words[left:]

    @invariant()
    def every_answer_is_that_of_a_cache_of_its_own(self) -> None:
        for life in getattr(self, "lives", []):
            spec = life.spec or FlatIndex()
            found = masses(self.cache, life, spec)
            if self.limit is not None and isinstance(spec, Ivf | Graph):
                assert of_its_own_tokens(found, life)
                continue
            alone = PagedCache(SPEC, LONGEST // PAGE, max_sequences=1, max_len=LONGEST)
            copy = Life(alone.open(spec), spec, [])
            write(alone, [copy], [life.words])
            assert torch.equal(found, masses(alone, copy, spec))

    @invariant()
    def what_is_built_is_within_its_bytes(self) -> None:
        if hasattr(self, "cache") and self.limit is not None:
            assert self.cache.indexes.bytes <= self.limit


@pytest.mark.parametrize(
    ("these", "limit", "examples"),
    [(GRAPHS, None, 30), (OTHERS, None, 15), (GRAPHS + OTHERS, 0, 5), (GRAPHS + OTHERS, 20_000, 15)],
    ids=["graphs", "others", "no room", "little room"],
)
def test_no_life_answers_from_another(
    these: list[IndexSpec], limit: int | None, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_module, "IN_USE", 0)
    monkeypatch.setattr(build, "LEAST_POINTS", 2)  # else walks begin at all keys

    class Case(Lives):
        pass

    Case.specs, Case.limit = these, limit
    Case.TestCase.settings = settings(deadline=None, max_examples=examples, stateful_step_count=20)
    Case.TestCase("runTest").runTest()
