"""Offloaded caches give the results of a cache on the device, for pools and stages of any size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from keysift.attention import bind, make
from keysift.kvcache import CacheSpec, HostStore, OffloadError, Span
from tests.strategies import IDS, ROWS, Row
from tests.tiers import in_file, in_memory, offloaded, on_device, run

PAGE, CHUNK, ROW = 4, 32, 8
LENGTHS = (90, 37, 64)


def spec_of(dtype: torch.dtype = torch.float32, **changes: object) -> CacheSpec:
    return CacheSpec(num_layers=2, num_kv_heads=2, head_dim=16, page_size=PAGE, dtype=dtype, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_large_pool_changes_no_bit(row: Row, tmp_path: Path) -> None:
    strategy, spec = make(row.name, **row.sparse), spec_of(**row.spec)
    wanted = run(on_device(spec), strategy, LENGTHS, CHUNK, ROW, new=12)
    for store in (in_memory, in_file(tmp_path)):
        cache = offloaded(store, slots=100, staged=100)(spec)
        found = run(cache, strategy, LENGTHS, CHUNK, ROW, new=12)
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        cache.tier.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["retrieval", "quest"])
@pytest.mark.parametrize("slots", [0, 12, 24, 60])
def test_a_small_pool_changes_no_bit_either(name: str, slots: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """As long as the stage takes a layer; 24 slots hold what all three read at once, 12 do not."""
    strategy = make(name, sink=4, window=6, budget=16, epsilon=0.0, dense_layers=0, dense_below=0)
    wanted = run(on_device(spec_of(dtype)), strategy, LENGTHS, CHUNK, ROW, new=12)
    cache = offloaded(in_file(tmp_path), slots=slots, staged=80)(spec_of(dtype))
    found = run(cache, strategy, LENGTHS, CHUNK, ROW, new=12)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["dense", "streaming", "quest"])
@pytest.mark.parametrize("staged", [9, 10, 15, 23])
def test_a_stage_smaller_than_a_layer_reads_in_parts(name: str, staged: int) -> None:
    strategy = make(name, **{} if name == "dense" else {"window": 40, "sink": 8})
    wanted = run(on_device(spec_of()), strategy, LENGTHS, CHUNK, ROW, new=12)
    cache = offloaded(in_memory, slots=3, staged=staged)(spec_of())
    found = run(cache, strategy, LENGTHS, CHUNK, ROW, new=12)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_selection_that_exceeds_the_stage_is_an_error_with_sizes() -> None:
    cache = offloaded(in_memory, slots=3, staged=10)(spec_of())
    with pytest.raises(
        OffloadError, match=r"kv_memory: 1\d pages of a layer .* room for 10 pages = 10240 bytes"
    ) as caught:
        run(cache, make("sift"), (90,), CHUNK, ROW, new=0)
    assert caught.value.exhausted


def test_windows_are_read_from_the_pool() -> None:
    spec = spec_of(windows=(0, 9))
    strategy = make("quest", budget=16, dense_layers=0)
    wanted = run(on_device(spec), strategy, LENGTHS, CHUNK, ROW, new=12)
    cache = offloaded(in_memory, slots=24, staged=30)(spec)
    found = run(cache, strategy, LENGTHS, CHUNK, ROW, new=12)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("slots", [12, 24, 60])
def test_prefetching_changes_no_bit(slots: int, tmp_path: Path) -> None:
    strategy = make("retrieval", sink=4, window=6, budget=16, epsilon=0.0, dense_below=0)
    wanted = run(on_device(spec_of()), strategy, (90,), CHUNK, ROW, new=40)
    caches = [offloaded(in_file(tmp_path), slots=slots, staged=80, prefetch_pages=n)(spec_of()) for n in (0, 4)]
    for cache in caches:
        found = run(cache, strategy, (90,), CHUNK, ROW, new=40)
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    before, after = (cache.tier.traffic for cache in caches)
    assert before.prefetched == before.prefetch_hits == 0
    assert after.hits + after.misses == before.hits + before.misses
    if slots == 60:
        assert 0 < after.prefetch_hits <= after.prefetched
        assert after.misses < before.misses
    pieces = after.prefetched + after.misses - before.misses
    assert after.fetched - before.fetched == pieces * caches[0].spec.read_bytes


@pytest.mark.parametrize("name", ["retrieval", "quest"])
def test_traffic_is_what_moved(name: str) -> None:
    """As counted by a store."""
    moved = {"read": 0, "written": 0, "pieces": 0}

    class Counting(HostStore):
        def write(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
            moved["written"] += pages.nbytes
            super().write(layer, frames, pages)

        def read(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
            moved["read"] += pages.nbytes
            super().read(layer, frames, pages)

        def fetch(self, layer: int, pool: Tensor, loads: Tensor, slots: Tensor) -> None:
            moved["pieces"] += int((loads >= 0).sum())
            super().fetch(layer, pool, loads, slots)

    strategy = make(name, sink=4, window=6, budget=16, epsilon=0.0, dense_layers=0, dense_below=0)
    cache = offloaded(lambda spec: Counting(spec, torch.device("cpu")), slots=30, staged=80)(spec_of())
    run(cache, strategy, LENGTHS, CHUNK, ROW, new=12)
    traffic, spec = cache.tier.traffic, cache.spec
    assert traffic.misses == moved["pieces"]
    assert traffic.fetched == moved["read"] + moved["pieces"] * spec.read_bytes
    assert traffic.written == moved["written"]
    full = sum((length + 12) // PAGE for length in LENGTHS)
    assert traffic.written == full * spec.kv_bytes


def test_two_tokens_of_one_sequence_are_refused() -> None:
    """They would share one tail, and the page in it."""
    cache = offloaded(in_memory, slots=30, staged=80)(spec_of())
    cache.reserve(sequence := cache.open(), 20)
    step = cache.decode([Span(sequence, 0, 1), Span(sequence, 1, 1)])
    q, k = torch.randn(2, 4, 16), torch.randn(2, 2, 16)
    with pytest.raises(ValueError, match="one token of each sequence"):
        bind(make("dense"), cache, step)(0, q, k, k)
