"""Options that token strategies share: zones, budget, epsilon, and the bound on what was dropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keysift.attention import Strategy, Telemetry, bind, make
from keysift.kvcache import CacheSpec, PagedCache, Selection, Span, Step

PAGE, HEADS, KV_HEADS, DIM, LENGTH = 4, 4, 2, 16, 203
ZONES = {"sink": 8, "window": 10}


@pytest.fixture
def cache() -> PagedCache:
    """One sequence of random keys, its last token left to decode."""
    spec = CacheSpec(num_layers=1, num_kv_heads=KV_HEADS, head_dim=DIM, page_size=PAGE)
    cache = PagedCache(spec, 64, max_sequences=1, max_len=LENGTH)
    sequence = cache.open()
    cache.reserve(sequence, LENGTH)
    k, v = data(LENGTH)
    cache.append(0, k[:-1], v[:-1], cache.prefill(Span(sequence, 0, LENGTH - 1), 64))
    return cache


def data(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(tokens, KV_HEADS, DIM, generator=generator) for _ in range(2))
    return k, v


def query(height: float = 1.0) -> Tensor:
    return torch.randn(1, HEADS, DIM, generator=torch.Generator().manual_seed(4)) * height


def choose(strategy: Strategy, cache: PagedCache, q: Tensor) -> tuple[Selection, Step]:
    step = cache.decode([Span(0, LENGTH - 1, 1)])
    k, v = data(LENGTH)
    cache.append(0, k[-1:], v[-1:], step)
    return strategy.decode(q, cache.context(0, step, strategy.index_spec())), step


def shares(q: Tensor) -> Tensor:
    """[Hq, F] fp64, each page's true share of the attention."""
    keys = data(LENGTH)[0].double().repeat_interleave(HEADS // KV_HEADS, 1)
    weights = (torch.einsum("hd,jhd->hj", q[0].double(), keys) * DIM**-0.5).softmax(-1)
    return torch.nn.functional.pad(weights, (0, -LENGTH % PAGE)).view(HEADS, -1, PAGE).sum(-1)


@pytest.mark.parametrize("index", ["flat", "codes", "summary"])
def test_zones_and_budget_are_kept(cache: PagedCache, index: str) -> None:
    selection, step = choose(make("retrieval", index=index, budget=20, epsilon=0.0, **ZONES), cache, query())
    zone = {0, 1, *range((LENGTH - 10) // PAGE, LENGTH // PAGE + 1)}
    for pages in selection.pages[0].tolist():
        chosen = {page for page in pages if page >= 0}
        assert zone <= chosen
        assert len(chosen) == len(zone) + 5
    assert float(selection.density(step).max()) < 0.25


def test_the_best_pages_are_chosen(cache: PagedCache) -> None:
    q = query(3.0)
    selection, _ = choose(make("retrieval", index="flat", budget=12, epsilon=0.0, **ZONES), cache, q)
    group = shares(q).view(KV_HEADS, -1, shares(q).shape[-1]).mean(1)
    zone = {0, 1, *range((LENGTH - 10) // PAGE, LENGTH // PAGE + 1)}
    for head, pages in enumerate(selection.pages[0].tolist()):
        between = [page for page in range(group.shape[1]) if page not in zone]
        best = sorted(between, key=lambda page: -float(group[head, page]))[:3]
        assert {page for page in pages if page >= 0} == zone | set(best)


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.3])
def test_epsilon_reads_as_little_as_keeps_enough(cache: PagedCache, epsilon: float) -> None:
    q = query(3.0)
    selection, _ = choose(make("retrieval", index="flat", budget=10**6, epsilon=epsilon, **ZONES), cache, q)
    group = shares(q).view(KV_HEADS, -1, shares(q).shape[-1]).mean(1)
    for head, pages in enumerate(selection.pages[0].tolist()):
        chosen = [page for page in pages if page >= 0]
        left = 1 - float(group[head, chosen].sum())
        zone = {0, 1, *range((LENGTH - 10) // PAGE, LENGTH // PAGE + 1)}
        assert left <= epsilon + 1e-6
        least = min(float(group[head, page]) for page in chosen if page not in zone)
        assert left + least > epsilon, "one page fewer would have been too few"


@pytest.mark.parametrize(("index", "error"), [("flat", 1e-5), ("codes", 0.1)])
def test_coverage_is_the_share_that_is_read(cache: PagedCache, index: str, error: float) -> None:
    q = query(2.0)
    selection, _ = choose(make("retrieval", index=index, budget=32, **ZONES), cache, q)
    assert selection.evidence.coverage is not None
    true = shares(q)
    for head in range(HEADS):
        chosen = [page for page in selection.pages[0, head // 2].tolist() if page >= 0]
        assert float(selection.evidence.coverage[0, head]) == pytest.approx(float(true[head, chosen].sum()), abs=error)


@pytest.mark.parametrize("name", ["quest", "retrieval"])
def test_bounds_and_means_report_no_coverage(cache: PagedCache, name: str) -> None:
    strategy = make(name, budget=16, **({"index": "summary"} if name == "retrieval" else {"dense_layers": 0}))
    assert choose(strategy, cache, query())[0].evidence.coverage is None


def run(strategy: Strategy, cache: PagedCache, q: Tensor) -> tuple[Tensor, Telemetry]:
    step = cache.decode([Span(0, LENGTH - 1, 1)])
    telemetry = Telemetry(cache.spec, step)
    k, v = data(LENGTH)
    return bind(strategy, cache, step, telemetry)(0, q, k[-1:], v[-1:]), telemetry


@pytest.mark.parametrize("height", [1.0, 4.0])
def test_the_bound_is_never_less_than_what_was_dropped(cache: PagedCache, height: float) -> None:
    q = query(height)
    strategy = make("retrieval", budget=16, certify=True, **ZONES)
    selection, _ = choose(strategy, cache, q)
    true = shares(q)
    chosen = [[page for page in pages if page >= 0] for pages in selection.pages[0].tolist()]
    dropped = [1 - float(true[head, chosen[head // 2]].sum()) for head in range(HEADS)]
    _, telemetry = run(strategy, cache, q)
    (covered,) = telemetry.coverage(telemetry.reads())
    assert covered.dropped_bound is not None
    assert sum(dropped) / HEADS - 1e-5 <= covered.dropped_bound < 1
    assert covered.estimated_share == 0


def test_without_a_certificate_the_dropped_mass_is_unknown(cache: PagedCache) -> None:
    _, telemetry = run(make("retrieval", budget=16, **ZONES), cache, query())
    (covered,) = telemetry.coverage(telemetry.reads())
    assert covered.dropped_bound is None
    _, telemetry = run(make("retrieval", budget=10**6, epsilon=0.0, **ZONES), cache, query())
    (covered,) = telemetry.coverage(telemetry.reads())
    assert covered.dropped_bound == 0


def test_topk_reads_the_pages_of_the_best_keys(cache: PagedCache) -> None:
    q = query(2.0)
    selection, _ = choose(make("topk", sink=8, window=10, top_k=5), cache, q)
    keys = data(LENGTH)[0].double().repeat_interleave(HEADS // KV_HEADS, 1)
    scores = torch.einsum("hd,jhd->hj", q[0].double(), keys)
    zone = {0, 1, *range((LENGTH - 10) // PAGE, LENGTH // PAGE + 1)}
    for head, pages in enumerate(selection.pages[0].tolist()):
        best = (scores[head, 8 : LENGTH - 10].topk(5).indices + 8) // PAGE
        assert {page for page in pages if page >= 0} == zone | set(best.tolist())


def test_first_layers_may_read_everything(cache: PagedCache) -> None:
    selection, _ = choose(make("retrieval", budget=4, dense_layers=1), cache, query())
    assert selection.complete
