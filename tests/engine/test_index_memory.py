"""What indexes build has a bound; pages without it are scanned, and answers are those of a scan."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from keysift.attention.strategies import retrieval
from keysift.engine import Engine, InvalidRequest, Request
from keysift.kvcache.index import Graph, Ivf
from tests.engine.driver import Make, drain, greedy, said, tokens

SMALL = ("dense_below=0", "sink=16", "window=32", "budget=32", "epsilon=0")
SEARCHES = {"graph": ("wait=true", "beam=4", "top_k=100"), "ivf": ("nprobe=1",), "flat": ()}


@pytest.fixture(autouse=True)
def _small_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments and graphs that short prompts fill several of."""
    monkeypatch.setattr(retrieval, "Ivf", partial(Ivf, segment=64, tokens_per_list=8))
    monkeypatch.setattr(retrieval, "Graph", partial(Graph, degree=6, queries=24, lag=32))


def answer(engine: Engine, index: str, prompt: tuple[int, ...], new: int = 30) -> list[int]:
    arguments = (*SMALL, f"index={index}", *SEARCHES[index])
    engine.add(Request("a", prompt, greedy(new), strategy="retrieval", strategy_args=arguments))
    return said(drain(engine), "a")


def test_the_index_of_the_engines_own_strategy_is_inside_of_kv_memory(make: Make) -> None:
    page = make().cache.spec.page_bytes
    plain = make(kv_memory=90 * page)
    assert (plain.status.pages_total, plain.cache.indexes.room.limit) == (90, 90 * page // 8)
    own = {"strategy": "dense+retrieval", "strategy_args": ("retrieval.index=ivf",), "kv_memory": 90 * page}
    inside = make(**own)
    assert (inside.status.pages_total, inside.cache.indexes.room.limit) == (80, 10 * page)
    stated = make(**own, index_memory=30 * page)
    assert (stated.status.pages_total, stated.cache.indexes.room.limit) == (60, 30 * page)
    with pytest.raises(InvalidRequest, match=r"kv_memory: at least one page = \d+ bytes, got 0"):
        make(**own, index_memory=91 * page)
    codes = make(strategy="dense+retrieval", kv_memory=90 * page)
    assert codes.status.pages_total == 90


def test_a_pool_leaves_room_for_the_index_of_the_engines_own_strategy(make: Make, tmp_path: Path) -> None:
    offload = {"kv_offload": str(tmp_path), "kv_memory": 2**18, "max_num_seqs": 2}
    own = {"strategy": "dense+retrieval", "strategy_args": ("retrieval.index=ivf",)}
    plain, inside = (make(**offload, **fields).cache for fields in ({}, own))
    sizes = [cache.tier.size.bytes(cache.spec) for cache in (plain, inside)]  # type: ignore[attr-defined]
    assert sizes[1] + inside.indexes.room.limit <= 2**18
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize("index", ["graph", "ivf"])
def test_without_room_every_key_is_scanned(make: Make, index: str) -> None:
    engine = make(index_memory=0)
    assert answer(engine, index, tokens(300)) == answer(make(), "flat", tokens(300))
    assert engine.cache.indexes.bytes == 0


@pytest.mark.parametrize("index", ["graph", "ivf"])
def test_bytes_stay_within_the_limit_and_answers_right(make: Make, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that holds what some of the prompts need, one after the other: the first gives way to the last."""
    monkeypatch.setattr("keysift.kvcache.index.room.IN_USE", 0)
    roomy = make()
    prompts = [tokens(300, seed) for seed in range(4)]
    wanted = [answer(roomy, index, prompt) for prompt in prompts]
    alone = make()
    answer(alone, index, prompts[0])
    limit = alone.cache.indexes.bytes * 3 // 2
    assert roomy.cache.indexes.bytes > 2 * limit
    engine = make(index_memory=limit)
    for _ in range(2):
        for prompt, tokens_wanted in zip(prompts, wanted, strict=True):
            assert answer(engine, index, prompt) == tokens_wanted
            assert limit // 2 < engine.cache.indexes.bytes <= limit
            assert engine.cache.indexes.bytes == sum(each.bytes for each in engine.cache.indexes._entries())


def test_nothing_of_an_index_grows_with_requests(make: Make) -> None:
    """Notes of sequences, blocks, users of pages: all are bounded by pages."""
    engine = make(kv_memory=make().cache.spec.page_bytes * 40)
    sizes = []
    for seed in range(24):
        index = "graph" if seed % 2 else "ivf"
        answer(engine, index, tokens(200 + seed, seed), 8)
        if seed % 8 == 7:
            sizes.append([_size(entries) for entries in engine.cache.indexes._entries()])
    assert not engine.cache.indexes._named
    for before, after in zip(sizes[1], sizes[2], strict=True):
        assert after <= before * 1.5


def _size(thing: object, seen: set[int] | None = None) -> int:
    """Objects that a thing of ours holds."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, dict):
        return sum(1 + _size(part, seen) for pair in thing.items() for part in pair)
    if isinstance(thing, (list, tuple, set, frozenset)):
        return sum(1 + _size(part, seen) for part in thing)
    if type(thing).__module__.startswith("keysift"):
        names = [*getattr(thing, "__dict__", {}), *getattr(type(thing), "__slots__", ())]
        return sum(_size(getattr(thing, name), seen) for name in names if hasattr(thing, name))
    return 0
