"""Telemetry of a step: coverage of each sequence, density over heads, overlap with the previous token's pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from keysift.attention import Coverage, Locality, Reads, Telemetry, bind, make
from keysift.kvcache import CacheSpec, Evidence, PagedCache, Selection, Span, Step

from .devices import NoWaiting

PAGE, ROW, HEADS, KV_HEADS = 4, 8, 4, 2


def cache_of(layers: int, windows: tuple[int, ...] = (), device: str = "cpu") -> PagedCache:
    spec = CacheSpec(num_layers=layers, num_kv_heads=KV_HEADS, head_dim=8, page_size=PAGE, windows=windows)
    return PagedCache(spec, 64, max_sequences=4, max_len=100, device=device)


def prompt_step(cache: PagedCache, tokens: int = 32) -> Step:
    cache.reserve(sequence := cache.open(), tokens)
    return cache.prefill(Span(sequence, 0, tokens), ROW)


def decode_step(cache: PagedCache, lengths: Sequence[int]) -> Step:
    spans = []
    for length in lengths:
        cache.reserve(sequence := cache.open(), length)
        spans.append(Span(sequence, length - 1, 1))
    return cache.decode(spans)


def own_pages(step: Step, coverage: Tensor | None, widened: Tensor | None = None) -> Selection:
    """The own pages of each row and no others."""
    page = torch.arange(step.max_pages, device=step.starts.device)
    mask = (page >= (step.starts // PAGE)[:, None]) & (page <= step.last_pages[:, None])
    return Selection.from_mask(mask[:, None].expand(-1, HEADS, -1), Evidence(coverage=coverage, widened=widened))


def all_pages(step: Step, coverage: Tensor | None = None) -> Selection:
    """Every page, without the flag `complete`."""
    return Selection(Selection.all(step, KV_HEADS).pages, evidence=Evidence(coverage=coverage))


def coverage_of(telemetry: Telemetry) -> list[Coverage]:
    return telemetry.coverage(telemetry.reads())


def test_layers_heads_and_probes_count_alike() -> None:
    cache = cache_of(4)
    telemetry = Telemetry(cache.spec, step := prompt_step(cache))
    low, high = torch.full((3, HEADS), 0.5), torch.full((3, HEADS), 0.9)
    low[1, 2] = 0.2
    wide = torch.zeros(3, HEADS, dtype=torch.bool)
    wide[0, :3] = True
    telemetry.record(0, Selection.all(step, KV_HEADS))
    telemetry.record(1, own_pages(step, low))
    telemetry.record(2, own_pages(step, high, wide))
    telemetry.record(3, own_pages(step, torch.full((1, HEADS), 1.0 + 1e-6)))
    (found,) = coverage_of(telemetry)
    mean = (1 + (0.5 * 11 + 0.2) / 12 + 0.9 + 1) / 4
    assert found.mean == pytest.approx(mean, abs=1e-6)
    assert found.least == pytest.approx(0.2)
    assert found.widened_share == pytest.approx(3 / 12 / 4)
    assert found.tokens == 32
    assert found.chose


@pytest.mark.parametrize("measured", [True, False])
def test_an_unmeasured_selection_makes_the_coverage_unknown(measured: bool) -> None:
    cache = cache_of(2)
    telemetry = Telemetry(cache.spec, step := prompt_step(cache))
    telemetry.record(0, own_pages(step, torch.full((1, HEADS), 0.5)) if measured else Selection.all(step, KV_HEADS))
    telemetry.record(1, own_pages(step, None))
    (found,) = coverage_of(telemetry)
    assert found.mean is found.least is None
    assert (Coverage(100, 100.0) + found).mean is None


def test_layers_that_read_everything_keep_everything() -> None:
    cache = cache_of(2)
    telemetry = Telemetry(cache.spec, step := prompt_step(cache))
    telemetry.record(0, Selection.all(step, KV_HEADS))
    assert coverage_of(telemetry) == [Coverage(32, 32.0)]
    telemetry.record(1, all_pages(step))
    (found,) = coverage_of(telemetry)
    assert (found.mean, found.least, found.widened_share, found.chose) == (1.0, 1.0, 0.0, True)


def test_layers_with_a_window_are_left_out() -> None:
    cache = cache_of(2, windows=(0, 8))
    telemetry = Telemetry(cache.spec, step := prompt_step(cache))
    strategy = make("sift", threshold=0.2, sink=0, local=0, last_rows_dense=0)
    q, k, v = torch.randn(32, HEADS, 8), torch.randn(32, KV_HEADS, 8), torch.randn(32, KV_HEADS, 8)
    attend = bind(strategy, cache, step, telemetry)
    for layer in range(2):
        attend(layer, q, k, v)
    (found,) = coverage_of(telemetry)
    coverage = strategy.prefill(q, cache.context(0, step)).evidence.coverage
    assert coverage is not None
    assert found.mean == pytest.approx(float(coverage.mean()))
    assert found.least == pytest.approx(float(coverage.min()))
    assert found.mean is not None
    assert 0 < found.mean < 1


def test_each_sequence_of_a_decode_step_has_its_own_coverage() -> None:
    cache = cache_of(2)
    telemetry = Telemetry(cache.spec, step := decode_step(cache, [4, 30, 40]))
    for layer, low in enumerate((0.5, 0.7)):
        coverage = torch.tensor([1.0, 0.9, low])[:, None].repeat(1, HEADS)
        telemetry.record(layer, own_pages(step, coverage, coverage == low))
    found = coverage_of(telemetry)
    assert [each.mean for each in found] == pytest.approx([1.0, 0.9, 0.6])
    assert [each.least for each in found] == pytest.approx([1.0, 0.9, 0.5])
    assert [each.widened_share for each in found] == [0, 0, 1]


def test_a_fully_read_sequence_is_known_next_to_an_unknown_one() -> None:
    cache = cache_of(1)
    telemetry = Telemetry(cache.spec, step := decode_step(cache, [4, 30]))
    telemetry.record(0, own_pages(step, None))
    assert [each.mean for each in coverage_of(telemetry)] == [1.0, None]


def test_steps_weigh_by_their_tokens() -> None:
    both = Coverage(90, 90.0) + Coverage(10, 5.0, 0.25, 10.0, chose=True)
    assert (both.mean, both.least, both.widened_share, both.chose) == (0.95, 0.25, 0.1, True)
    assert (Coverage().mean, Coverage().least, Coverage().widened_share) == (1.0, 1.0, 0.0)


def test_recording_a_selection_does_not_wait_for_the_device() -> None:
    cache = cache_of(2, device="meta")
    telemetry = Telemetry(cache.spec, step := prompt_step(cache))
    coverage, widened = torch.ones(3, HEADS, device="meta"), torch.ones(3, HEADS, dtype=torch.bool, device="meta")
    selections = [own_pages(step, coverage, widened), own_pages(step, None)]
    with NoWaiting():
        for layer, selection in enumerate(selections):
            telemetry.record(layer, selection)
        with pytest.raises(NotImplementedError, match="meta"):
            telemetry.reads()  # this does wait


def test_density_weighs_a_page_alike_by_kv_head_and_by_query_head() -> None:
    """A dense layer lists pages by KV head, a sparse one by query head."""
    cache = cache_of(2)
    telemetry = Telemetry(cache.spec, step := prompt_step(cache))
    telemetry.record(0, Selection.all(step, KV_HEADS))
    telemetry.record(1, sparse := own_pages(step, None))
    (reads,) = telemetry.reads()
    alone = Telemetry(cache.spec, step)
    alone.record(1, sparse)
    assert reads.density == pytest.approx((1 + alone.reads()[0].density) / 2)


def test_locality_sums_the_choices_whose_overlap_is_known() -> None:
    cache = cache_of(3)
    telemetry = Telemetry(cache.spec, step := decode_step(cache, [30, 25]))
    pages, unknown = Selection.all(step, KV_HEADS).pages[..., :5], math.nan
    for layer, (overlaps, exceeded) in enumerate(
        [
            ([[0.5, 0.9], [0.1, unknown]], [[True, False], [True, False]]),
            ([[unknown, 0.4], [unknown, unknown]], [[True, False]] * 2),
        ]
    ):
        evidence = Evidence(overlap=torch.tensor(overlaps), bound_exceeded=torch.tensor(exceeded))
        telemetry.record(layer, Selection(pages, evidence=evidence))
    telemetry.record(2, Selection(pages))
    first, second = telemetry.locality()
    assert (first.choices, first.bound_exceeded, second.choices, second.bound_exceeded) == (3, 1.0, 1, 1.0)
    assert first.mean_overlap == pytest.approx(0.6)
    assert first.bound_exceeded_share == pytest.approx(1 / 3)
    assert (first + second).mean_overlap == pytest.approx(1.9 / 4)
    assert (Locality().mean_overlap, Locality().bound_exceeded_share) == (None, 0.0)


def test_locality_is_empty_without_compared_choices() -> None:
    cache = cache_of(1)
    step = decode_step(cache, [30, 25])
    telemetry = Telemetry(cache.spec, step)
    telemetry.record(0, Selection.all(step, KV_HEADS))
    assert telemetry.locality() == [Locality(), Locality()]


def approximated(step: Step, pages: int, **measured: Tensor) -> Selection:
    """The own pages of each row, with the first `pages` others estimated."""
    page, own = torch.arange(step.max_pages), step.last_pages[:, None]
    estimated = Selection.from_mask(((page < pages) & (page < own))[:, None].expand(-1, KV_HEADS, -1)).pages
    return Selection(Selection.own(step, KV_HEADS).pages, estimated=estimated, evidence=Evidence(**measured))


def test_shares_without_dropped_pages_are_those_that_the_op_weighed() -> None:
    cache = cache_of(1)
    telemetry = Telemetry(cache.spec, step := decode_step(cache, [30, 25]))
    kept = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.5, 0.4, 0.3, 0.2]])
    telemetry.record(0, approximated(step, step.max_pages), exact=kept.log(), lse=torch.zeros(2, HEADS))
    first, second = coverage_of(telemetry)
    assert (first.mean, second.mean) == pytest.approx((0.75, 0.35))
    assert (first.estimated_share, second.estimated_share) == pytest.approx((0.25, 0.65))
    assert (first.least, second.least) == pytest.approx((0.6, 0.2))


def test_shares_with_dropped_pages_scale_the_measured_coverage() -> None:
    """Means weigh 0.25 of what the chosen pages do, but never more than the coverage leaves."""
    cache = cache_of(1)
    telemetry = Telemetry(cache.spec, step := decode_step(cache, [30, 25]))
    coverage = torch.tensor([[0.4], [0.9]]).expand(2, HEADS)
    exact, lse = torch.zeros(2, HEADS), torch.full((2, HEADS), math.log(1.25))
    telemetry.record(0, approximated(step, 2, coverage=coverage), exact, lse)
    first, second = coverage_of(telemetry)
    assert (first.mean, second.mean) == pytest.approx((0.4, 0.9))
    assert (first.estimated_share, second.estimated_share) == pytest.approx((0.1, 0.1))


def test_shares_with_unmeasured_dropped_pages_are_unknown() -> None:
    cache = cache_of(1)
    telemetry = Telemetry(cache.spec, step := decode_step(cache, [30, 3]))
    exact, lse = torch.zeros(2, HEADS), torch.full((2, HEADS), 0.1)
    telemetry.record(0, approximated(step, 2), exact, lse)
    long, short = coverage_of(telemetry)
    assert (long.mean, long.estimated_share) == (None, 0.0)
    assert short.mean == pytest.approx(math.exp(-0.1)), "its one page is its own"


def test_the_dropped_bound_is_a_share_of_all_attention() -> None:
    cache = cache_of(2)
    telemetry = Telemetry(cache.spec, step := decode_step(cache, [30, 25]))
    dropped, lse = torch.tensor([[1.0], [0.0]]).expand(2, HEADS).log(), torch.tensor(3.0).log().expand(2, HEADS)
    selection = replace(own_pages(step, torch.full((2, HEADS), 0.5)), evidence=Evidence(dropped_bound=dropped))
    telemetry.record(0, Selection.all(step, KV_HEADS))
    telemetry.record(1, selection, lse, lse)
    assert [found.dropped_bound for found in coverage_of(telemetry)] == pytest.approx([0.25 / 2, 0.0])
    telemetry.record(0, own_pages(step, None))
    assert [found.dropped_bound for found in coverage_of(telemetry)] == [None, None]


def test_the_first_rows_have_the_statistics_of_a_step_without_the_others() -> None:
    cache = cache_of(3)
    every = Telemetry(cache.spec, step := decode_step(cache, [30, 25, 40]))
    first = Telemetry(cache.spec, step.head(2))
    for telemetry, rows in ((every, 3), (first, 2)):
        values, part = torch.arange(12.0).view(3, HEADS)[:rows] / 12, step.head(rows)
        bound, overlap = values.log(), values[:, :KV_HEADS]
        evidence = Evidence(coverage=values, dropped_bound=bound, overlap=overlap, bound_exceeded=overlap > 0.5)
        telemetry.record(0, Selection.all(part, KV_HEADS))
        telemetry.record(1, replace(own_pages(part, None), evidence=evidence), values, values)
        telemetry.record(2, approximated(part, 3, coverage=values, dropped_bound=bound), values, values + 0.1)
    head = every.head(2)
    assert head.reads() == first.reads()
    assert coverage_of(head) == coverage_of(first)
    assert head.locality() == first.locality()
    assert torch.equal(head.density(), first.density())


def test_density_by_layer_and_head_repeats_the_heads_that_share_a_list() -> None:
    cache = cache_of(4, windows=(0, 0, 0, 8))
    telemetry = Telemetry(cache.spec, step := decode_step(cache, [40]))
    pages = torch.tensor([[[8, 9, -1], [7, 8, 9]]], dtype=torch.int32)
    telemetry.record(0, Selection.all(step, KV_HEADS))
    telemetry.record(1, Selection(pages))
    telemetry.record(2, Selection(pages.repeat_interleave(2, 1).flip(1)))
    expected = torch.tensor([[1.0] * 4, [0.2, 0.2, 0.3, 0.3], [0.3, 0.3, 0.2, 0.2], [1.0] * 4])
    torch.testing.assert_close(telemetry.density(), expected)


def test_a_step_whose_layers_all_have_windows_reads_nothing_else() -> None:
    cache = cache_of(1, windows=(8,))
    telemetry = Telemetry(cache.spec, decode_step(cache, [30, 25]))
    assert telemetry.reads() == [Reads(), Reads()]
    assert coverage_of(telemetry) == [Coverage(1, 1.0)] * 2
    assert [reads.density for reads in telemetry.reads()] == [1.0, 1.0]
