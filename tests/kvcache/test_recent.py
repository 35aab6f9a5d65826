"""Decode history: the next token of a sequence finds the record of the last one, and no other token does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keysift.kvcache import CacheSpec, PagedCache, Past, Recent, Span, Step
from keysift.kvcache.recent import turns

PAGE, HEADS = 4, 2


def cache_of(**fields: int) -> PagedCache:
    spec = CacheSpec(num_layers=2, num_kv_heads=HEADS, head_dim=8, page_size=PAGE)
    return PagedCache(spec, 3000, **{"max_sequences": 4, "max_len": 4000} | fields)


def opened(cache: PagedCache, tokens: int) -> int:
    sequence = cache.open()
    cache.reserve(sequence, tokens)
    return sequence


def step_of(cache: PagedCache, *places: tuple[int, int]) -> Step:
    """One token of each (sequence, position)."""
    return cache.decode([Span(sequence, position, 1) for sequence, position in places])


def record(cache: PagedCache, step: Step, layer: int = 0) -> tuple[Tensor, Tensor]:
    """Record random pages and averages for the step; returns them."""
    read = torch.rand(step.num_rows, HEADS, step.max_pages) < 0.5
    averages = torch.rand(step.num_rows, HEADS, step.max_pages)
    cache.context(layer, step).remember(None, read, averages)
    return read, averages


def past(cache: PagedCache, step: Step, layer: int = 0) -> Past:
    found = cache.context(layer, step).previous()
    assert found.read.shape == found.averages.shape == (step.num_rows, HEADS, step.max_pages)
    return found


def test_the_next_token_finds_the_record_and_no_other() -> None:
    cache = cache_of()
    sequence = opened(cache, 200)
    assert not past(cache, step_of(cache, (sequence, 20))).known.any()
    read, averages = record(cache, step_of(cache, (sequence, 20)))
    found = past(cache, step_of(cache, (sequence, 21)))
    assert found.known.tolist() == [True]
    assert torch.equal(found.read, read)
    assert torch.equal(found.averages, averages)
    for position in (0, 18, 19, 20, 22, 23, 100):
        assert not past(cache, step_of(cache, (sequence, position))).known.any(), position
    assert not past(cache, step_of(cache, (sequence, 21)), layer=1).known.any()


def test_a_new_page_has_no_history() -> None:
    cache = cache_of()
    first = opened(cache, 200)
    for position in (198, 199):  # so that both places have a history of every page
        record(cache, step_of(cache, (first, position)))
    record(cache, step_of(cache, (first, 2 * PAGE - 1)))
    found = past(cache, step_of(cache, (first, 2 * PAGE)))
    assert found.known.all()
    assert found.read.shape[2] == 3
    assert not found.read[..., 2].any()
    assert not found.averages[..., 2].any()


def test_a_step_that_runs_again_finds_the_same_history() -> None:
    """After it has run in full, or in some layers, or with a part of its sequences."""
    cache = cache_of()
    first, second = opened(cache, 200), opened(cache, 200)
    record(cache, step_of(cache, (first, 10), (second, 33)))
    step = step_of(cache, (first, 11), (second, 34))
    before = past(cache, step)
    for _ in range(2):
        record(cache, step)
        again = past(cache, step)
        assert all(torch.equal(one, other) for one, other in zip(before, again, strict=True))
    alone = past(cache, step_of(cache, (second, 34)))
    assert alone.known.all()
    assert torch.equal(alone.read[0], before.read[1, :, : alone.read.shape[2]])
    read, _ = record(cache, step_of(cache, (second, 34)))
    after = past(cache, step_of(cache, (first, 12), (second, 35)))
    assert after.known.all(), "the first run's"
    assert torch.equal(after.read[1], read[0])


def test_sequences_are_opened_and_released() -> None:
    cache = cache_of()
    first, second = opened(cache, 900), opened(cache, 100)
    kept, _ = record(cache, step_of(cache, (first, 50), (second, 50)))
    third = opened(cache, 3000)
    record(cache, step_of(cache, (third, 2999)))  # more sequences and pages than fit so far
    found = past(cache, step_of(cache, (first, 51), (second, 51), (third, 3000 - 1)))
    assert found.known.tolist() == [True, True, False]
    assert torch.equal(found.read[0, :, : kept.shape[2]], kept[0])
    assert not found.read[:2, :, kept.shape[2] :].any()
    cache.release(first)
    assert past(cache, step_of(cache, (second, 51))).known.all()
    assert opened(cache, 100) == first, "the number is reused"
    assert not past(cache, step_of(cache, (first, 51))).known.any()


def test_a_rollback_forgets() -> None:
    cache = cache_of()
    sequence = opened(cache, 100)
    record(cache, step_of(cache, (sequence, 50)))
    cache.rollback(sequence, 51)
    assert not past(cache, step_of(cache, (sequence, 50 + 0))).known.any()
    cache.reserve(sequence, 100)
    assert not past(cache, step_of(cache, (sequence, 51))).known.any()


def test_memory_is_small_and_freed_with_the_last_sequence() -> None:
    cache = cache_of(max_sequences=64)
    sequence = opened(cache, 4000)
    assert cache.recent.bytes == 0
    for layer in range(2):
        record(cache, step_of(cache, (sequence, 3999)), layer)
    pages = 4 * 256
    assert cache.recent.bytes == 2 * 4 * (HEADS * pages * 5 + 4)
    cache.release(sequence)
    assert cache.recent.bytes == 0


def test_a_record_made_in_inference_mode_can_be_replaced_outside() -> None:
    cache = cache_of()
    sequence = opened(cache, 100)
    with torch.inference_mode():
        record(cache, step_of(cache, (sequence, 50)))
    record(cache, step_of(cache, (sequence, 52)))
    cache.release(sequence)


def test_turns_take_one_token_of_each_sequence() -> None:
    cache = cache_of()
    first, second = opened(cache, 100), opened(cache, 100)
    step = step_of(cache, (first, 7), (first, 8), (second, 3), (first, 9), (second, 4))
    assert turns(step) == [[0, 2], [1, 4], [3]]
    assert turns(step_of(cache, (second, 1), (first, 1))) == [[0, 1]]


def test_prompts_have_no_history() -> None:
    cache = cache_of()
    step = cache.prefill(Span(opened(cache, 100), 0, 64), 8)
    recent = Recent(cache.spec)
    with pytest.raises(AssertionError, match="prompts"):
        recent.previous(0, step, None)
