"""What telemetry makes of a step's selections: coverage by sequence, by layer and head, and when it is unknown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from keysift.attention import Coverage, Locality, Telemetry, bind, make
from keysift.kvcache import CacheSpec, Evidence, PagedCache, Selection, Span, Step

from .devices import NoWaiting

PAGE, ROW, HEADS, KV_HEADS = 4, 8, 4, 2


def cache_of(layers: int, windows: tuple[int, ...] = (), device: str = "cpu") -> PagedCache:
    spec = CacheSpec(num_layers=layers, num_kv_heads=KV_HEADS, head_dim=8, page_size=PAGE, windows=windows)
    return PagedCache(spec, 64, max_sequences=4, max_len=100, device=device)


def chunk(cache: PagedCache, tokens: int = 32) -> Step:
    cache.reserve(sequence := cache.open(), tokens)
    return cache.prefill(Span(sequence, 0, tokens), ROW)


def tokens_of(cache: PagedCache, lengths: Sequence[int]) -> Step:
    spans = []
    for length in lengths:
        cache.reserve(sequence := cache.open(), length)
        spans.append(Span(sequence, length - 1, 1))
    return cache.decode(spans)


def some(step: Step, coverage: Tensor | None, widened: Tensor | None = None) -> Selection:
    """Each row's own pages and no others."""
    page = torch.arange(step.max_pages, device=step.starts.device)
    mask = (page >= (step.starts // PAGE)[:, None]) & (page <= step.last_pages[:, None])
    return Selection.from_mask(mask[:, None].expand(-1, HEADS, -1), Evidence(coverage=coverage, widened=widened))


def all_of(step: Step, coverage: Tensor | None = None) -> Selection:
    """Every page, found by counting: nothing says that it is complete."""
    return Selection(Selection.all(step, KV_HEADS).pages, evidence=Evidence(coverage=coverage))


def covered(telemetry: Telemetry) -> list[Coverage]:
    return telemetry.coverage(telemetry.reads())


def test_layers_heads_and_probes_count_alike() -> None:
    cache = cache_of(4)
    telemetry = Telemetry(cache.spec, step := chunk(cache))
    low, high = torch.full((3, HEADS), 0.5), torch.full((3, HEADS), 0.9)
    low[1, 2] = 0.2
    wide = torch.zeros(3, HEADS, dtype=torch.bool)
    wide[0, :3] = True
    telemetry.record(0, Selection.all(step, KV_HEADS))
    telemetry.record(1, some(step, low))
    telemetry.record(2, some(step, high, wide))
    telemetry.record(3, some(step, torch.full((1, HEADS), 1.0 + 1e-6)))
    (found,) = covered(telemetry)
    mean = (1 + (0.5 * 11 + 0.2) / 12 + 0.9 + 1) / 4
    assert found.mean == pytest.approx(mean, abs=1e-6)
    assert found.least == pytest.approx(0.2)
    assert found.widened_share == pytest.approx(3 / 12 / 4)
    assert found.tokens == 32
    assert found.chose


@pytest.mark.parametrize("measured", [True, False])
def test_a_selection_that_nobody_measured_makes_all_unknown(measured: bool) -> None:
    cache = cache_of(2)
    telemetry = Telemetry(cache.spec, step := chunk(cache))
    telemetry.record(0, some(step, torch.full((1, HEADS), 0.5)) if measured else Selection.all(step, KV_HEADS))
    telemetry.record(1, some(step, None))
    (found,) = covered(telemetry)
    assert found.mean is found.least is None
    assert (Coverage(100, 100.0) + found).mean is None


def test_what_reads_everything_keeps_everything() -> None:
    cache = cache_of(2)
    telemetry = Telemetry(cache.spec, step := chunk(cache))
    telemetry.record(0, Selection.all(step, KV_HEADS))
    assert covered(telemetry) == [Coverage(32, 32.0)]
    telemetry.record(1, all_of(step))
    (found,) = covered(telemetry)
    assert (found.mean, found.least, found.widened_share, found.chose) == (1.0, 1.0, 0.0, True)


def test_layers_with_a_window_are_left_out() -> None:
    cache = cache_of(2, windows=(0, 8))
    telemetry = Telemetry(cache.spec, step := chunk(cache))
    strategy = make("sift", threshold=0.2, sink=0, local=0, last_rows_dense=0)
    q, k, v = torch.randn(32, HEADS, 8), torch.randn(32, KV_HEADS, 8), torch.randn(32, KV_HEADS, 8)
    attend = bind(strategy, cache, step, telemetry)
    for layer in range(2):
        attend(layer, q, k, v)
    (found,) = covered(telemetry)
    coverage = strategy.prefill(q, cache.context(0, step)).evidence.coverage
    assert coverage is not None
    assert found.mean == pytest.approx(float(coverage.mean()))
    assert found.least == pytest.approx(float(coverage.min()))
    assert found.mean is not None
    assert 0 < found.mean < 1


def test_every_sequence_of_a_decode_step_has_its_own() -> None:
    cache = cache_of(2)
    telemetry = Telemetry(cache.spec, step := tokens_of(cache, [4, 30, 40]))
    for layer, low in enumerate((0.5, 0.7)):
        coverage = torch.tensor([1.0, 0.9, low])[:, None].repeat(1, HEADS)
        telemetry.record(layer, some(step, coverage, coverage == low))
    found = covered(telemetry)
    assert [each.mean for each in found] == pytest.approx([1.0, 0.9, 0.6])
    assert [each.least for each in found] == pytest.approx([1.0, 0.9, 0.5])
    assert [each.widened_share for each in found] == [0, 0, 1]


def test_a_short_sequence_is_known_beside_one_that_is_not() -> None:
    cache = cache_of(1)
    telemetry = Telemetry(cache.spec, step := tokens_of(cache, [4, 30]))
    telemetry.record(0, some(step, None))
    assert [each.mean for each in covered(telemetry)] == [1.0, None]


def test_steps_weigh_by_their_tokens() -> None:
    both = Coverage(90, 90.0) + Coverage(10, 5.0, 0.25, 10.0, chose=True)
    assert (both.mean, both.least, both.widened_share, both.chose) == (0.95, 0.25, 0.1, True)
    assert (Coverage().mean, Coverage().least, Coverage().widened_share) == (1.0, 1.0, 0.0)


def test_noting_a_selection_waits_for_nothing() -> None:
    cache = cache_of(2, device="meta")
    telemetry = Telemetry(cache.spec, step := chunk(cache))
    coverage, widened = torch.ones(3, HEADS, device="meta"), torch.ones(3, HEADS, dtype=torch.bool, device="meta")
    selections = [some(step, coverage, widened), some(step, None)]
    with NoWaiting():
        for layer, selection in enumerate(selections):
            telemetry.record(layer, selection)
        with pytest.raises(NotImplementedError, match="meta"):
            telemetry.reads()  # which does wait


def test_a_page_counts_alike_whether_heads_list_it_apart_or_together() -> None:
    """A dense layer lists pages by KV head, another by query head: both weigh the same in the density."""
    cache = cache_of(2)
    telemetry = Telemetry(cache.spec, step := chunk(cache))
    telemetry.record(0, Selection.all(step, KV_HEADS))
    telemetry.record(1, sparse := some(step, None))
    (reads,) = telemetry.reads()
    alone = Telemetry(cache.spec, step)
    alone.record(1, sparse)
    assert reads.density == pytest.approx((1 + alone.reads()[0].density) / 2)


def test_choices_that_were_compared_with_the_last_token_s_count() -> None:
    cache = cache_of(3)
    telemetry = Telemetry(cache.spec, step := tokens_of(cache, [30, 25]))
    pages, none = Selection.all(step, KV_HEADS).pages[..., :5], math.nan
    for layer, (overlaps, valves) in enumerate(
        [
            ([[0.5, 0.9], [0.1, none]], [[True, False], [True, False]]),
            ([[none, 0.4], [none, none]], [[True, False]] * 2),
        ]
    ):
        evidence = Evidence(overlap=torch.tensor(overlaps), bound_exceeded=torch.tensor(valves))
        telemetry.record(layer, Selection(pages, evidence=evidence))
    telemetry.record(2, Selection(pages))
    first, second = telemetry.locality()
    assert (first.choices, first.bound_exceeded, second.choices, second.bound_exceeded) == (3, 1.0, 1, 1.0)
    assert first.mean_overlap == pytest.approx(0.6)
    assert first.bound_exceeded_share == pytest.approx(1 / 3)
    assert (first + second).mean_overlap == pytest.approx(1.9 / 4)
    assert (Locality().mean_overlap, Locality().bound_exceeded_share) == (None, 0.0)


def test_without_such_choices_nothing_is_told_of_them() -> None:
    cache = cache_of(1)
    step = tokens_of(cache, [30, 25])
    telemetry = Telemetry(cache.spec, step)
    telemetry.record(0, Selection.all(step, KV_HEADS))
    assert telemetry.locality() == [Locality(), Locality()]
