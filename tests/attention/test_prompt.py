"""Options that all prompt strategies share."""

from __future__ import annotations

import pytest
import torch

from keysift.attention import make
from keysift.kvcache import CacheSpec, PagedCache, Span
from tests.strategies import Row, prompt_rows

from .prompts import random_prompt, select

EACH = pytest.mark.parametrize("row", prompt_rows(), ids=str)
PAGES, ROWS = 160, 5
PROMPT = random_prompt(640, 40, page=4, row=8, scale=0.05)


@EACH
def test_a_budget_adds_pages_that_a_strategy_would_leave_out(row: Row) -> None:
    before = select(row.make(coverage=0.0), PROMPT).mask(PAGES)
    after = select(row.make(coverage=0.0, min_budget=400), PROMPT).mask(PAGES)
    assert bool((before[-1].sum(-1) < 100).all()), "nothing would show"
    assert bool((after[-1].sum(-1) >= 100).all()), "the last row has a probe of its own"
    assert not bool((before & ~after).any())


@EACH
def test_rows_that_cover_too_little_read_more_and_report_it(row: Row) -> None:
    loose = select(row.make(coverage=0.0), PROMPT)
    strict = select(row.make(coverage=0.9), PROMPT)
    coverage, widened = strict.evidence.coverage, strict.evidence.widened
    assert loose.evidence.coverage is not None
    assert coverage is not None
    assert widened is not None
    assert bool((loose.evidence.coverage < 0.9).any()), "nothing would show"
    assert torch.equal(widened, loose.evidence.coverage < 0.9 - 1e-4)
    assert bool((coverage >= 0.9 - 1e-4).all())
    before, after = loose.mask(PAGES), strict.mask(PAGES)
    widened = widened if len(widened) == ROWS else widened.any(0).expand(ROWS, -1)
    assert torch.equal(before[~widened], after[~widened])
    assert not bool((before & ~after).any())


@EACH
def test_dense_last_rows_do_not_hide_losses_of_the_rows_before_them(row: Row) -> None:
    reported = [select(row.make(coverage=0.0, last_rows_dense=rows), PROMPT).evidence.coverage for rows in (0, 1)]
    assert torch.equal(*reported)  # type: ignore[arg-type]


@EACH
def test_without_a_target_coverage_is_reported_and_nothing_is_widened(row: Row) -> None:
    selection = select(row.make(coverage=0.0), PROMPT)
    assert selection.evidence.coverage is not None
    assert selection.evidence.widened is not None
    assert not bool(selection.evidence.widened.any())


def test_the_first_layers_read_everything() -> None:
    cache = PagedCache(CacheSpec(2, 1, 8, page_size=4), 16, max_sequences=1, max_len=64)
    sequence = cache.open()
    cache.reserve(sequence, 64)
    step = cache.prefill(Span(sequence, 0, 64), 8)
    q = torch.randn(64, 2, 8)
    strategy = make("ashape", sink=4, local=4, last_rows_dense=0, dense_layers=1)
    for layer, complete in ((0, True), (1, False)):
        cache.append(layer, q[:, :1], q[:, 1:], step)
        assert strategy.prefill(q, cache.context(layer, step)).complete is complete
