"""Indexes of a cache: whose sequences they see, how long they stay, and what becomes of others when one fails."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from keysift.kvcache import CacheSpec, Context, PagedCache, Span
from keysift.kvcache.contents import Contents
from keysift.kvcache.context import Entries
from keysift.kvcache.index import CodeIndex, FlatIndex, Graph, Ivf
from keysift.kvcache.index.room import Room
from keysift.kvcache.indexes import SPARE

SPEC = CacheSpec(num_layers=1, num_kv_heads=1, head_dim=32, page_size=4)


@dataclass
class Noted:
    """Entries that note what they are told, and fail where they should."""

    failing: str = ""
    told: list[tuple[str, object]] = field(default_factory=list)
    bytes: int = 0

    def observe(self, q: Tensor, context: Context, rows: Sequence[int]) -> None:
        self._note("observe", [(context.step.spans[row].sequence, q.shape[0]) for row in rows])

    def known(self, pages: Sequence[Contents]) -> int:
        return min(len(pages), 2)

    def forget(self, frames: Set[int]) -> None:
        self._note("forget", sorted(frames))

    def claim(self, frames: Set[int]) -> None:
        self._note("claim", sorted(frames))

    def clear(self) -> None:
        self._note("clear", None)

    def _note(self, name: str, what: object) -> None:
        if name == self.failing:
            raise ZeroDivisionError(name)
        self.told.append((name, what))


@dataclass
class NotedIndex:
    entries: Noted
    estimates_mass: ClassVar[bool] = True

    def masses(self, q: Tensor, context: Context) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Spec:
    """An index of a plug-in; those of one family share entries."""

    name: str
    failing: str = ""
    fits: bool = True
    scans: ClassVar[bool] = False
    host: ClassVar[bool] = False

    def make(self, spec: CacheSpec, room: Room, others: Iterable[Entries] = ()) -> NotedIndex:
        if not self.fits:
            raise ValueError("it does not fit")
        return NotedIndex(Noted(self.failing))


def make_cache() -> PagedCache:
    return PagedCache(SPEC, 32, max_sequences=8, max_len=64)


def noted(cache: PagedCache, spec: Spec) -> Noted:
    entries = cache.index(spec).entries
    assert isinstance(entries, Noted)
    return entries


def step(cache: PagedCache, *sequences: int, length: int = 1) -> None:
    """Write tokens of these sequences from their start on."""
    for sequence in sequences:
        cache.reserve(sequence, length)
    spans = [Span(sequence, 0, length) for sequence in sequences]
    made = cache.decode(spans) if length == 1 else cache.prefill(spans[0], 4)
    k = torch.randn(made.positions.shape[0], 1, 32)
    cache.append(0, k, k, made)
    cache.observe(0, k, made)


def test_an_index_sees_the_sequences_that_name_it() -> None:
    cache, one, other = make_cache(), Spec("one"), Spec("other")
    first, second, third = cache.open(one), cache.open(), cache.open(one, other)
    step(cache, first, second, third)
    assert [what for name, what in noted(cache, one).told if name == "observe"] == [[(first, 3), (third, 3)]]
    assert [what for name, what in noted(cache, other).told if name == "observe"] == [[(third, 3)]]
    spans = [Span(sequence, 0, 1) for sequence in (first, second)]
    assert [cache.indexes.observes([span]) for span in spans] == [True, False]
    cache.release(first)
    assert cache.open() == first, "its number is reused"
    assert not cache.indexes.observes(spans)
    step(cache, first, second)
    assert [what for name, what in noted(cache, one).told if name == "observe"] == [[(first, 3), (third, 3)]]


def test_an_index_hears_of_pages_that_are_taken_and_become_full() -> None:
    cache, spec = make_cache(), Spec("one")
    sequence = cache.open(spec)
    step(cache, sequence, length=9)
    told, frames = noted(cache, spec).told, cache._frames[sequence]
    assert told[:2] == [("claim", sorted(frames)), ("forget", sorted(frames[:2]))]


def test_pages_that_are_taken_are_looked_at_once_whatever_the_number_of_indexes() -> None:
    cache, hashed = make_cache(), []

    class Frame(int):
        def __hash__(self) -> int:
            hashed.append(int(self))
            return int(self)

    cache.open(*(Graph(sink=sink, wait=True) for sink in range(8)))
    cache.indexes.claim([Frame(number) for number in range(32)])
    assert hashed == list(range(32))


def test_a_prefix_is_used_as_far_as_an_index_knows_it() -> None:
    cache = make_cache()
    sequence, keys = cache.open(), [bytes([page]) for page in range(4)]
    step(cache, sequence, length=16)
    cache.keep(sequence, keys)
    frames = cache._frames[sequence]
    assert cache.match(keys) == cache.match(keys, FlatIndex(), Ivf()) == frames
    assert cache.match(keys, FlatIndex(), Spec("knows two pages")) == frames[:2]


def test_the_last_few_indexes_stay_without_a_sequence() -> None:
    cache = make_cache()
    specs = [Spec(str(number)) for number in range(SPARE + 4)]
    named = cache.open(specs[0], specs[1])
    entries = [noted(cache, specs[0])]
    for spec in specs[2:]:
        sequence = cache.open(spec)
        entries.append(noted(cache, spec))
        cache.release(sequence)
    assert list(cache.indexes._known) == [*specs[:2], *specs[-SPARE:]]
    assert [("clear", None) in each.told for each in entries] == [False, True, True, False, False, False, False]
    cache.release(named)
    assert len(cache.indexes) == SPARE
    assert noted(cache, specs[0]) is entries[0], "it was the last one in use"


def test_a_sequence_whose_index_does_not_fit_is_not_opened() -> None:
    cache = make_cache()
    for _ in range(20):
        with pytest.raises(ValueError, match="it does not fit"):
            cache.open(Spec("fits"), Spec("one", fits=False))
    assert len({cache.open() for _ in range(8)}) == 8
    assert not cache.indexes._named


def test_an_index_does_not_give_way_to_another_of_its_sequence() -> None:
    cache, first, new = make_cache(), Spec("first"), Spec("new")
    cache.release(cache.open(first))
    for number in range(SPARE - 1):
        cache.release(cache.open(Spec(str(number))))
    sequence = cache.open(first, new)
    step(cache, sequence)
    assert all(("observe", [(sequence, 1)]) in noted(cache, spec).told for spec in (first, new))
    cache.release(sequence)
    assert len({cache.open() for _ in range(8)}) == 8, "none is lost"


def test_a_sequence_that_fails_to_close_gives_its_number_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache()
    sequence = cache.open()
    with monkeypatch.context() as patch:
        patch.setattr(cache.recent, "drop", lambda sequence: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.release(sequence)
    assert len({cache.open() for _ in range(8)}) == 8


def test_indexes_without_entries_do_not_take_the_place_of_others() -> None:
    cache, lists = make_cache(), Ivf(16, 4)
    entries = cache.index(lists).entries
    for number in range(3 * SPARE):
        cache.index(CodeIndex(number))
    assert cache.index(lists).entries is entries
    assert len(cache.indexes) == SPARE + 1


def test_an_index_that_fails_to_observe_fails_the_steps_of_its_own_sequences() -> None:
    cache, bad, good = make_cache(), Spec("bad", "observe"), Spec("good")
    first, second = cache.open(bad), cache.open(good)
    with pytest.raises(ZeroDivisionError):
        step(cache, first, second)
    step(cache, second)
    assert ("observe", [(second, 1)]) in noted(cache, good).told


@pytest.mark.parametrize("failing", ["forget", "claim"])
def test_an_index_that_fails_to_forget_begins_anew_and_harms_nobody(
    failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache, bad, good = make_cache(), Spec("bad", failing), Spec("good")
    first, second = cache.open(bad), cache.open(good)
    before = noted(cache, bad)
    step(cache, second, length=9)
    step(cache, first, second)
    assert [name for name, _ in noted(cache, good).told] == ["claim", "forget", "observe", "claim", "forget", "observe"]
    assert noted(cache, bad) is not before
    assert ("clear", None) in before.told
    assert {record.message for record in caplog.records} == {"an index failed to forget pages and begins anew"}


def test_an_index_that_cannot_begin_anew_fails_those_who_search_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, bad, good = make_cache(), Spec("bad", "forget"), Spec("good")
    first, second = cache.open(bad), cache.open(good)
    with monkeypatch.context() as patch:
        patch.setattr(Spec, "make", lambda *of: 1 / 0)
        step(cache, first, length=9)
        with pytest.raises(ZeroDivisionError):
            cache.index(bad)
    step(cache, first, second)
    assert ("observe", [(second, 2)]) in noted(cache, good).told
    cache.release(first)
    assert len({cache.open() for _ in range(7)}) == 7, "none is lost"


def test_an_index_that_fails_to_free_its_entries_is_told(caplog: pytest.LogCaptureFixture) -> None:
    cache = make_cache()
    cache.release(cache.open(Spec("bad", "clear")))
    for number in range(SPARE):
        cache.release(cache.open(Spec(str(number))))
    assert [record.message for record in caplog.records] == ["an index failed to free its entries"]
    assert len(cache.indexes) == SPARE


def test_indexes_that_build_alike_share_what_they_build() -> None:
    cache = make_cache()
    few, many, other = (cache.index(Ivf(16, 4, nprobe=n, iterations=i)) for n, i in ((1, 4), (64, 4), (1, 5)))
    assert few.entries is many.entries is not other.entries
    assert few is not many
