"""Paged cache: page tables, steps and the writes of a step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keysift.kvcache import CacheSpec, OutOfFrames, PagedCache, Phase, Span
from keysift.kvcache.index import CodeIndex, Graph

SPEC = CacheSpec(num_layers=2, num_kv_heads=2, head_dim=8, page_size=4)


def make(frames: int = 16, **options: int) -> PagedCache:
    return PagedCache(SPEC, frames, **{"max_sequences": 4, "max_len": 64} | options)


def test_page_bytes_counts_keys_values_summaries_and_codes() -> None:
    vectors, codes = (2 * 4 + 4) * 8 * 4, 4 * 4 + 2 * 8 + 2 * 4  # a word for each key, bounds and their scales
    assert SPEC.page_bytes == 2 * 2 * (vectors + codes)
    assert SPEC.pages_for(0) == 0
    assert SPEC.pages_for(4) == 1
    assert SPEC.pages_for(5) == 2


def test_a_host_index_requires_host_pages() -> None:
    elsewhere = PagedCache(SPEC, 4, max_sequences=1, max_len=16, device="meta")
    with pytest.raises(ValueError, match="index: graph lives on the host, pages are on meta"):
        elsewhere.index(Graph())
    assert elsewhere.index(CodeIndex()) is elsewhere.index(CodeIndex())
    assert make().index(Graph()) is not None


def test_reserve_is_all_or_nothing() -> None:
    cache = make(frames=3)
    sequence = cache.open()
    cache.reserve(sequence, 8)
    with pytest.raises(OutOfFrames):
        cache.reserve(sequence, 17)
    assert cache.free_pages == 1
    cache.release(sequence)
    assert cache.free_pages == 3


def test_a_prefill_step_has_rows_slots_and_pages() -> None:
    cache = make()
    sequence = cache.open()
    cache.reserve(sequence, 30)
    step = cache.prefill(Span(sequence, 8, 18), queries_per_row=8)
    assert step.phase is Phase.PREFILL
    assert step.positions.tolist() == list(range(8, 26))
    assert step.starts.tolist() == [8, 16, 24]
    assert step.lasts.tolist() == [15, 23, 25]
    assert step.last_pages.tolist() == [3, 5, 6]
    assert step.max_pages == 7
    assert step.table.shape == (3, 2, 7)
    frames = step.table[0, 0].tolist()
    assert step.slots.tolist() == [frames[p // 4] * 4 + p % 4 for p in range(8, 26)]
    assert step.filled.tolist() == frames[2:6]


def test_a_decode_step_has_one_row_per_sequence() -> None:
    cache = make()
    first, second = cache.open(), cache.open()
    cache.reserve(first, 5)
    cache.reserve(second, 12)
    step = cache.decode([Span(first, 4, 1), Span(second, 11, 1)])
    assert step.starts.tolist() == step.lasts.tolist() == [4, 11]
    assert step.max_pages == 3
    assert step.filled.tolist() == [step.table[1, 0, 2].item()]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 13), min_size=1, max_size=6), st.integers(0, 2**31))
def test_appended_keys_values_and_summaries_are_found_through_the_table(lengths: list[int], seed: int) -> None:
    cache = make(frames=40, max_len=96)
    generator = torch.Generator().manual_seed(seed)
    other, sequence = cache.open(), cache.open()
    total = sum(lengths)
    k, v = torch.randn(2, total, 2, 8, generator=generator)
    start = 0
    for length in lengths:  # another sequence grows in between, so that frames interleave
        cache.reserve(other, start + 1)
        cache.reserve(sequence, start + length)
        step = cache.prefill(Span(sequence, start, length), queries_per_row=4)
        cache.append(1, k[start : start + length], v[start : start + length], step)
        start += length
    context = cache.context(1, step)
    frames = context.fetch(context.all())
    table = frames.table[0, 0].long()
    keys = frames.k[table].transpose(1, 2).flatten(0, 1)[:total]  # [T, Hkv, D]
    values = frames.v[table].transpose(1, 2).flatten(0, 1)[:total]
    torch.testing.assert_close(keys, k, rtol=0, atol=0)
    torch.testing.assert_close(values, v, rtol=0, atol=0)
    summaries = cache.tier.summaries(1)[table]  # [F, Hkv, 4, D]
    for page in range(total // 4):
        here = slice(4 * page, 4 * page + 4)
        expected = torch.stack([k[here].mean(0), k[here].amin(0), k[here].amax(0), v[here].mean(0)], dim=1)
        torch.testing.assert_close(summaries[page], expected)


def test_a_shared_prefix_is_held_by_both_and_released_once() -> None:
    cache = make(frames=8)
    first = cache.open()
    cache.reserve(first, 12)
    keys = [b"0", b"1", b"2"]
    cache.keep(first, keys[:2])
    second = cache.open()
    cache.share(second, cache.prefix.match(keys))
    cache.reserve(second, 12)
    assert cache.free_pages == 8 - 4
    cache.release(first)
    assert cache.free_pages == 8 - 3
    cache.release(second)
    assert cache.free_pages == 8
    assert len(cache.prefix.match(keys)) == 2
