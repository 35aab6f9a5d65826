"""Selections: ascending, unique, causal, padded at the end only."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keysift.kvcache import CacheSpec, Evidence, PagedCache, Selection, Span, Step

PAGE = 4
CACHE = PagedCache(
    CacheSpec(num_layers=1, num_kv_heads=2, head_dim=8, page_size=PAGE), 64, max_sequences=2, max_len=256
)
SEQUENCE = CACHE.open()
CACHE.reserve(SEQUENCE, 256)

spans = st.tuples(st.integers(0, 24), st.integers(1, 60)).map(lambda pair: Span(SEQUENCE, 8 * pair[0] % 192, pair[1]))


def check_law(selection: Selection, step: Step) -> None:
    """Pages ascending, unique, causal, padded at the end only, with the row's own among them: law 2 of the design."""
    for row, last in enumerate(step.last_pages.tolist()):
        own = set(range(int(step.starts[row]) // PAGE, last + 1))
        for pages in selection.pages[row].tolist():
            chosen = [page for page in pages if page >= 0]
            assert pages == chosen + [-1] * (len(pages) - len(chosen))
            assert chosen == sorted(set(chosen))
            assert not chosen or chosen[-1] <= last
            assert own <= set(chosen)


def counted_density(selection: Selection, step: Step) -> Tensor:
    """[R, H] chosen share of the causal pairs, counted one by one."""
    rows = []
    for row, (start, last) in enumerate(zip(step.starts.tolist(), step.lasts.tolist(), strict=True)):
        possible = [(q, k) for q in range(start, last + 1) for k in range(q + 1)]
        rows.append(
            [sum(k // PAGE in set(h) for _, k in possible) / len(possible) for h in selection.pages[row].tolist()]
        )
    return torch.tensor(rows)


@settings(deadline=None)
@given(spans)
def test_all_selects_every_causal_page(span: Span) -> None:
    step = CACHE.prefill(span, 8)
    selection = Selection.all(step, 2)
    check_law(selection, step)
    assert selection.counts().tolist() == [[last + 1] * 2 for last in step.last_pages.tolist()]
    assert torch.equal(selection.density(step), torch.ones(step.num_rows, 2))


@settings(deadline=None)
@given(spans, st.integers(0, 40), st.integers(1, 80))
def test_zones_hold_sinks_and_window_and_no_page_more(span: Span, sink: int, window: int) -> None:
    step = CACHE.prefill(span, 8)
    selection = Selection.zones(step, 2, sink=sink, window=window)
    check_law(selection, step)
    for row, (start, last) in enumerate(zip(step.starts.tolist(), step.lasts.tolist(), strict=True)):
        seen = set(range(min(sink, last + 1))) | set(range(max(start - window + 1, 0), last + 1))
        expected = {token // PAGE for token in seen}
        assert {page for page in selection.pages[row, 0].tolist() if page >= 0} == expected


@settings(deadline=None, max_examples=30)
@given(spans, st.integers(0, 20), st.integers(1, 40))
def test_density_is_the_share_of_pairs(span: Span, sink: int, window: int) -> None:
    step = CACHE.prefill(span, 8)
    selection = Selection.zones(step, 2, sink=sink, window=window)
    torch.testing.assert_close(selection.density(step), counted_density(selection, step))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_from_mask_and_mask_are_inverse(rows: int, pages: int, seed: int) -> None:
    mask = torch.rand(rows, 2, pages, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(Selection.from_mask(mask).mask(pages), mask)


def test_from_mask_keeps_the_evidence() -> None:
    evidence = Evidence(coverage=torch.ones(1, 2))
    assert Selection.from_mask(torch.ones(1, 2, 3, dtype=torch.bool), evidence).evidence is evidence
    assert Selection.from_mask(torch.ones(1, 2, 3, dtype=torch.bool)).evidence == Evidence()


@settings(deadline=None)
@given(spans)
def test_own_is_the_page_of_the_last_query(span: Span) -> None:
    step = CACHE.prefill(span, 8)
    assert Selection.own(step, 2).pages.tolist() == [[[last // PAGE]] * 2 for last in step.lasts.tolist()]


def test_frames_are_unique_over_all_rows() -> None:
    step = CACHE.prefill(Span(SEQUENCE, 8, 24), 8)
    pages = torch.tensor([[[0, 2, -1], [1, 2, 3]], [[5, -1, -1], [0, 1, 5]], [[7, -1, -1], [-1, -1, -1]]])
    held = step.held[0]
    assert Selection(pages.int()).frames(step).tolist() == sorted(held[page] for page in (0, 1, 2, 3, 5, 7))
