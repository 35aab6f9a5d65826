"""Selection maths, against their docstrings counted out one by one."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from keysift.attention import patterns, probe
from keysift.attention.strategies.sampleattention import strided
from keysift.kvcache import CacheSpec, PagedCache, Selection, Span, Step

PAGE, ROW, LENGTH = 4, 8, 128
CACHE = PagedCache(
    CacheSpec(num_layers=1, num_kv_heads=1, head_dim=8, page_size=PAGE), 64, max_sequences=1, max_len=LENGTH
)
SEQUENCE = CACHE.open()
CACHE.reserve(SEQUENCE, LENGTH)

anywhere = st.tuples(st.integers(0, 60), st.integers(1, 60)).map(lambda p: CACHE.prefill(Span(SEQUENCE, *p), ROW))
aligned = st.tuples(st.integers(0, 8), st.integers(1, 60)).map(
    lambda p: CACHE.prefill(Span(SEQUENCE, p[0] * ROW, p[1]), ROW)
)


def rows(step: Step) -> list[range]:
    """Positions of each row's queries."""
    return [range(first, last + 1) for first, last in zip(step.starts.tolist(), step.lasts.tolist(), strict=True)]


def true(mask: torch.Tensor) -> set[int]:
    return set(mask.nonzero().flatten().tolist())


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 7), st.integers(0, 15))
def test_cover_is_the_fewest_entries_the_crossing_one_included_and_the_earlier_of_equals(
    masses: list[int], eighths: int, least: int
) -> None:
    order = sorted(range(len(masses)), key=lambda entry: (-masses[entry], entry))
    enough = [
        count for count in range(len(masses) + 1) if 8 * sum(masses[e] for e in order[:count]) >= eighths * sum(masses)
    ]
    expected = set(order[: max(enough[0], least)])
    assert true(patterns.cover(torch.tensor(masses) / 16, eighths / 8, least)) == expected


def test_cover_of_everything_loses_nothing_to_rounding() -> None:
    mass = torch.tensor([[1.0, 1e-30, 0.0], [0.0, 0.0, 0.0]])
    assert patterns.cover(mass, 1.0).all()
    assert patterns.cover(mass, 0.9999).tolist() == [[True, False, False], [False, False, False]]


@given(anywhere, st.integers(0, 2**31))
def test_bands_spread_over_every_page_that_they_cross_and_no_other(step: Step, seed: int) -> None:
    bands = torch.rand(2, step.max_pages, generator=torch.Generator().manual_seed(seed)) < 0.2
    spread = patterns.spread_bands(bands, step)
    for head, chosen in enumerate(bands.tolist()):
        for r, row in enumerate(rows(step)):
            crossed = {key // PAGE for query in row for key in range(query + 1) if chosen[(query - key) // PAGE]}
            assert true(spread[r, head]) == crossed


@given(anywhere, st.integers(0, 40), st.lists(st.integers(0, 80), min_size=8, max_size=8), st.booleans())
def test_zones_hold_sinks_and_each_rows_own_window(step: Step, sink: int, windows: list[int], alike: bool) -> None:
    windows = [windows[0]] * 8 if alike else windows
    local = windows[0] if alike else torch.tensor(windows[: step.num_rows], dtype=torch.int32)
    zones = patterns.zones(step, sink, local)
    for r, row in enumerate(rows(step)):
        near = range(max(row[0] - windows[r] + 1, 0), row[-1] + 1)
        expected = {token // PAGE for token in [*range(sink), *near, *row] if token <= row[-1]}
        assert true(zones[r]) == expected


def test_zones_take_the_greatest_numbers_there_are() -> None:
    step = CACHE.prefill(Span(SEQUENCE, 16, 33), ROW)
    for sink, local in ((2**31 - 1, 0), (0, 2**31 - 1)):
        assert torch.equal(patterns.zones(step, sink, local), patterns.causal(step))


@given(aligned, st.integers(1, ROW), st.integers(0, 4))
def test_tails_are_the_last_queries_of_segments_and_of_the_chunk(step: Step, count: int, segment_rows: int) -> None:
    (span,) = step.spans
    segment = segment_rows * ROW
    expected = []
    spans = rows(step)
    for r, row in enumerate(spans):
        joined = r == len(spans) - 2 and len(spans[-1]) < count
        if r == len(spans) - 1 or joined or (segment and (row[-1] + 1) % segment == 0):
            expected.append([position - span.start for position in row[-count:]])
    found = probe.tails(step, count, segment)
    assert [[query for query in each if query >= 0] for each in found.tolist()] == expected
    assert found.shape[1] == count


@given(anywhere, st.integers(1, ROW + 3))
def test_looks_are_spaced_evenly_within_their_row(step: Step, count: int) -> None:
    (span,) = step.spans
    for row, queries in zip(rows(step), probe.every_row(step, count).tolist(), strict=True):
        positions = [query + span.start for query in queries]
        assert set(positions) <= set(row)
        assert positions == sorted(positions)
        assert positions[-1] == row[-1]
        if len(row) == ROW:
            gaps = [b - a for a, b in zip([row[0] - 1, *positions], positions, strict=False)]
            assert len(gaps) == min(count, ROW)
            assert set(gaps) <= {ROW // len(gaps), -(-ROW // len(gaps))}


@given(anywhere, st.integers(1, 70))
def test_strides_count_from_the_start_of_the_prompt(step: Step, every: int) -> None:
    (span,) = step.spans
    picked = strided(step, every)
    for queries in picked.tolist():
        there = [query for query in queries if query >= 0]
        assert queries == there + [-1] * (len(queries) - len(there))
        assert len({query // ROW for query in there}) == 1
    positions = [int(query) + span.start for query in picked[picked >= 0]]
    assert positions == [p for p in range(span.start, span.stop) if (p + 1) % every == 0 or p == span.stop - 1]


@given(aligned, st.lists(st.booleans(), min_size=8, max_size=8))
def test_a_probe_stands_for_the_rows_up_to_its_own(step: Step, probed: list[bool]) -> None:
    chosen = [r for r in range(step.num_rows) if probed[r] or r == step.num_rows - 1]
    nothing = torch.zeros(len(chosen), 1, step.max_pages)
    each = probe.Probe(nothing, nothing, None, rows=torch.tensor(chosen), counts=torch.ones(len(chosen)).long())
    spread = each.to_rows(torch.tensor(chosen), step.num_rows)
    assert spread.tolist() == [min(other for other in chosen if other >= r) for r in range(step.num_rows)]


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 12), st.integers(0, 2**31))
def test_masks_become_ascending_lists(num_rows: int, heads: int, pages: int, seed: int) -> None:
    mask = torch.rand(num_rows, heads, pages, generator=torch.Generator().manual_seed(seed)) < 0.4
    for lists, bits in zip(Selection.from_mask(mask).pages.flatten(0, 1).tolist(), mask.flatten(0, 1), strict=True):
        chosen = sorted(true(bits))
        assert lists == chosen + [-1] * (pages - len(chosen))


@given(st.lists(st.integers(0, 5), min_size=2, max_size=9).filter(any))
def test_divergence_of_equal_distributions_is_zero_with_zeros_among_them(weights: list[int]) -> None:
    p = torch.tensor(weights) / sum(weights)
    assert patterns.divergence(p, p).item() == 0
    wobbly = p * (1 + 1e-7)
    assert 0 <= patterns.divergence(p, wobbly).item() < 1e-2


def test_divergence_is_largest_between_distributions_that_share_nothing() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]), torch.tensor([0.0, 0.0, 0.25, 0.75])
    torch.testing.assert_close(patterns.divergence(p, q), torch.full((2,), math.sqrt(math.log(2))))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40).filter(any), st.floats(0.1, 0.99))
def test_a_level_keeps_the_share_and_everything_above_the_least_it_keeps(masses: list[float], share: float) -> None:
    mass = torch.tensor(masses, dtype=torch.float64)
    keep = patterns.level(mass, share)
    assert float(mass[keep].sum()) >= share * float(mass.sum()) * (1 - 1e-9)
    if bool((~keep).any()):
        assert float(mass[~keep].max()) < float(mass[keep].min())
