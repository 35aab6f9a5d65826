"""NOSA's bound on selections from token to token, against the method written out token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from keysift.attention import Strategy, Telemetry, bind, make
from keysift.kvcache import CacheSpec, Context, PagedCache, Selection, Span

from .ops.steady_problems import Case, one_list

PAGE, HEADS, KV_HEADS, DIM, PROMPT, TOKENS = 4, 4, 2, 16, 150, 40
SINK, WINDOW = 4, 6
SMALL: dict[str, object] = {"sink": SINK, "window": WINDOW, "budget": 40, "queried": 24, "index": "flat"}
Tokens = tuple[Tensor, Tensor, Tensor]


def cache_of(sequences: int = 1, layers: int = 1, **spec: object) -> PagedCache:
    shape = CacheSpec(num_layers=layers, num_kv_heads=KV_HEADS, head_dim=DIM, page_size=PAGE, **spec)  # type: ignore[arg-type]
    return PagedCache(shape, 60 * sequences, max_sequences=sequences, max_len=240)


def drifting(seed: int = 0, tokens: int = PROMPT + TOKENS) -> Tokens:
    """Queries [T, Hq, D] that turn slowly, as those of a text do, and random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(tokens, HEADS, DIM, generator=generator)
    q = torch.zeros_like(steps)
    for token in range(tokens):
        q[token] = q[max(token - 1, 0)] * 0.9 + steps[token]
    k, v = torch.randn(2, tokens, KV_HEADS, DIM, generator=generator)
    return q, k, v


@dataclass(slots=True)
class Watch:
    """Records the selections of a strategy, one by one."""

    inner: Strategy
    seen: list[Selection] = field(default_factory=list)

    def decode(self, q: Tensor, context: Context) -> Selection:
        self.seen.append(self.inner.decode(q, context))
        return self.seen[-1]

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def opened(cache: PagedCache, data: Tokens, layers: int = 1) -> int:
    """A sequence whose prompt is cached."""
    cache.reserve(sequence := cache.open(), len(data[0]))
    step = cache.prefill(Span(sequence, 0, PROMPT), 8)
    for layer in range(layers):
        bind(make("dense"), cache, step)(layer, *(part[:PROMPT] for part in data))
    return sequence


def decoded(strategy: Strategy, cache: PagedCache, data: Tokens) -> Iterator[tuple[Selection, Tensor, Telemetry]]:
    """Token by token: selection, output [1, Hq, D], telemetry."""
    sequence, watch = opened(cache, data), Watch(strategy)
    for position in range(PROMPT, len(data[0])):
        step = cache.decode([Span(sequence, position, 1)])
        telemetry = Telemetry(cache.spec, step)
        out = bind(watch, cache, step, telemetry)(0, *(part[position : position + 1] for part in data))  # type: ignore[arg-type]
        yield watch.seen[-1], out, telemetry


def pages_of(selection: Selection, pages: Tensor | None = None) -> list[set[int]]:
    """The pages of each list of the first row, as sets."""
    lists = (selection.pages if pages is None else pages)[0].tolist()
    return [{page for page in row if page >= 0} for row in lists]


def true_shares(data: Tokens, position: int) -> Tensor:
    """[Hq, F] fp64, each page's share of one token's attention."""
    q, k = data[0][position].double(), data[1][: position + 1].double().repeat_interleave(HEADS // KV_HEADS, 1)
    weights = (torch.einsum("hd,jhd->hj", q, k) * DIM**-0.5).softmax(-1)
    return torch.nn.functional.pad(weights, (0, -(position + 1) % PAGE)).view(HEADS, -1, PAGE).sum(-1)


@pytest.mark.parametrize(
    "options",
    [
        {"m_max": 1, "epsilon": 1.0},
        {"m_max": 1, "epsilon": 0.1},
        {"m_max": -1, "epsilon": 1.0},
        {"m_max": 3, "epsilon": 1.0, "delta": -math.inf, "beta": 0.5},
        {"m_max": 0, "epsilon": 0.05, "queried": 8},
    ],
    ids=str,
)
def test_every_token_follows_the_description(options: dict[str, object]) -> None:
    """Written out in fp64 from the first token to the last, its own sets and averages carried along."""
    strategy, data = make("nosa", **SMALL | options), drifting()
    sizes = {name: getattr(strategy, name) // PAGE for name in ("budget", "queried")}
    rest = {"most": strategy.m_max, "keep": strategy.beta, "epsilon": strategy.epsilon}  # type: ignore[attr-defined]
    case = Case((), 0, sinks=SINK // PAGE, factor=math.exp(strategy.delta), **sizes, **rest)  # type: ignore[attr-defined]
    before: list[set[int] | None] = [None] * KV_HEADS
    averages: list[list[float]] = [[]] * KV_HEADS
    exceeded = changed = 0
    for position, (selection, _, _) in enumerate(decoded(strategy, cache_of(), data), PROMPT):
        score = true_shares(data, position).view(KV_HEADS, -1, position // PAGE + 1).mean(1).tolist()
        assert selection.estimated is not None
        estimated = pages_of(selection, selection.estimated)
        for head, chosen in enumerate(pages_of(selection)):
            average = averages[head] + [0.0] * (len(score[head]) - len(averages[head]))
            want = one_list(case, score[head], (position - WINDOW + 1) // PAGE, before[head], average)
            assert chosen == want.chosen
            assert estimated[head] == want.refused
            assert selection.evidence.bound_exceeded is not None
            assert bool(selection.evidence.bound_exceeded[0, head]) == want.bound_exceeded
            changed += before[head] is not None and not chosen <= (before[head] or set())
            before[head], averages[head] = want.chosen, want.averages
            exceeded += want.bound_exceeded
    assert changed > 5, "or nothing was tested"
    assert (exceeded > 0) == (options["epsilon"] != 1.0)


@pytest.mark.parametrize("index", ["flat", "codes", "summary", "bound"])
@pytest.mark.parametrize("most", [0, 1, 2])
def test_no_more_changes_than_is_allowed(index: str, most: int) -> None:
    strategy = make("nosa", **SMALL | {"index": index, "m_max": most, "delta": -math.inf, "epsilon": 0.3})
    before: list[set[int]] = []
    reached = 0
    for selection, _, _ in decoded(strategy, cache_of(), drifting()):
        assert selection.evidence.overlap is not None
        assert selection.evidence.bound_exceeded is not None
        chosen = pages_of(selection)
        for head in range(KV_HEADS if before else 0):
            overlap = len(chosen[head] & before[head]) / len(chosen[head])
            assert float(selection.evidence.overlap[0, head]) == pytest.approx(overlap)
            if not selection.evidence.bound_exceeded[0, head]:
                assert overlap >= 1 - (most + 1) / len(chosen[head]) - 1e-9
                reached += len(chosen[head] - before[head]) == most + 1
        if not before:
            assert bool(selection.evidence.overlap.isnan().all())
            assert not bool(selection.evidence.bound_exceeded.any())
        before = chosen
    assert reached > 0, "the bound is that tight"


@pytest.mark.parametrize("index", ["flat", "codes"])
def test_without_bound_and_comparison_it_reads_the_heaviest_pages(index: str) -> None:
    free = make("nosa", **SMALL | {"index": index, "m_max": -1, "delta": -math.inf, "queried": 1000})
    zones = {"sink": SINK, "window": WINDOW, "budget": 40}
    top = make("retrieval", index=index, epsilon=0.0, **zones)
    data = drifting()
    for (selection, out, _), (other, expected, _) in zip(
        decoded(free, cache_of(), data), decoded(top, cache_of(), data), strict=True
    ):
        assert torch.equal(selection.pages, other.pages)
        torch.testing.assert_close(out, expected)


def test_a_sequence_reads_alike_alone_and_in_company() -> None:
    strategy, every = make("nosa", **SMALL | {"m_max": 1}), [drifting(seed) for seed in range(3)]
    alone = [[(pages_of(s), out) for s, out, _ in decoded(strategy, cache_of(), data)] for data in every]
    cache, watch = cache_of(3), Watch(strategy)
    sequences = [opened(cache, data) for data in every]
    for position in range(PROMPT, PROMPT + TOKENS):
        here = [i for i in range(3) if position < PROMPT + TOKENS - 9 * i]  # they leave one by one
        step = cache.decode([Span(sequences[i], position, 1) for i in here])
        given = [torch.stack([every[i][part][position] for i in here]) for part in range(3)]
        out = bind(watch, cache, step)(0, *given)  # type: ignore[arg-type]
        for row, i in enumerate(here):
            pages, expected = alone[i][position - PROMPT]
            assert pages_of(Selection(watch.seen[-1].pages[row : row + 1])) == pages
            assert torch.equal(out[row : row + 1], expected)


def test_a_step_that_runs_again_reads_the_same() -> None:
    strategy, data, cache = make("nosa", **SMALL | {"m_max": 1}), drifting(), cache_of()
    sequence, watch = opened(cache, data), Watch(strategy)
    for position in range(PROMPT, PROMPT + TOKENS):
        step = cache.decode([Span(sequence, position, 1)])
        attend = bind(watch, cache, step)  # type: ignore[arg-type]
        outs = [attend(0, *(part[position : position + 1] for part in data)) for _ in range(1 + position % 3)]
        assert all(torch.equal(out, outs[0]) for out in outs)
        assert all(torch.equal(seen.pages, watch.seen[-1].pages) for seen in watch.seen[-len(outs) :])


def test_layers_that_do_not_choose_remember_nothing() -> None:
    cache, data = cache_of(layers=3, windows=(0, 10, 0)), drifting()
    sequence = opened(cache, data, layers=3)
    step = cache.decode([Span(sequence, PROMPT, 1)])
    attend = bind(make("nosa", **SMALL | {"dense_layers": 1}), cache, step)
    for layer in range(3):
        attend(layer, *(part[PROMPT : PROMPT + 1] for part in data))
    assert set(cache.recent._layers) == {2}


def test_a_sequence_that_was_rolled_back_begins_anew() -> None:
    strategy, data, cache = make("nosa", **SMALL | {"m_max": 0, "epsilon": 1.0}), drifting(), cache_of()
    first, *_, last = (pages_of(selection) for selection, _, _ in decoded(strategy, cache, data))
    cache.rollback(0, PROMPT)
    cache.reserve(0, len(data[0]))
    step = cache.decode([Span(0, PROMPT, 1)])
    watch = Watch(strategy)
    bind(watch, cache, step)(0, *(part[PROMPT : PROMPT + 1] for part in data))  # type: ignore[arg-type]
    assert pages_of(watch.seen[0]) == first
    assert first != last


def parts(selection: Selection, head: int, position: int) -> tuple[set[int], set[int], set[int]]:
    """Pages that are read, pages estimated by their means, and the others."""
    chosen = pages_of(selection)[head]
    means = set() if selection.estimated is None else pages_of(selection, selection.estimated)[head]
    return chosen, means, set(range(position // PAGE + 1)) - chosen - means


@pytest.mark.parametrize("refused", ["mean", "drop"])
def test_refused_pages_stand_in_by_their_means_and_others_are_dropped(refused: str) -> None:
    """Against the formula in fp64: a page that stands in is S tokens with its mean key and mean value."""
    strategy, data = make("nosa", **SMALL | {"m_max": 0, "epsilon": 1.0, "refused": refused}), drifting()
    found = list(decoded(strategy, cache_of(), data))
    k, v = (part.double() for part in data[1:])
    for position in (PROMPT, PROMPT + 7, PROMPT + TOKENS - 1):
        selection, out, telemetry = found[position - PROMPT]
        shares = torch.zeros(HEADS, 2, dtype=torch.float64)
        for head in range(HEADS):
            chosen, means, dropped = parts(selection, head // 2, position)
            assert bool(means) == (refused == "mean" and position > PROMPT)
            assert not chosen & means
            assert dropped
            q, keys, values, weight = data[0][position, head].double(), [], [], []
            for page in sorted(chosen | means):
                here = slice(page * PAGE, min((page + 1) * PAGE, position + 1))
                mean = page in means
                keys += [k[here, head // 2].mean(0, keepdim=True) if mean else k[here, head // 2]]
                values += [v[here, head // 2].mean(0, keepdim=True) if mean else v[here, head // 2]]
                weight += [torch.full((len(keys[-1]),), math.log(PAGE) if mean else 0.0, dtype=torch.float64)]
            weights = torch.cat(weight)
            scores = torch.cat(keys) @ q * DIM**-0.5 + weights
            expected = scores.softmax(-1) @ torch.cat(values)
            torch.testing.assert_close(out[0, head].double(), expected, rtol=1e-4, atol=1e-4)
            shares[head, 0] = true_shares(data, position)[head, sorted(chosen)].sum()
            ratio = scores[weights > 0].exp().sum() / scores[weights == 0].exp().sum()
            shares[head, 1] = torch.minimum(shares[head, 0] * ratio, 1 - shares[head, 0])
        (covered,) = telemetry.coverage(telemetry.reads())
        assert covered.mean == pytest.approx(float(shares[:, 0].mean()), abs=1e-4)
        assert covered.estimated_share == pytest.approx(float(shares[:, 1].mean()), abs=1e-4)


def test_an_index_of_bounds_reports_no_coverage() -> None:
    strategy = make("nosa", **SMALL | {"index": "bound", "m_max": 0, "epsilon": 1.0})
    *_, (selection, _, telemetry) = decoded(strategy, cache_of(), drifting())
    (covered,) = telemetry.coverage(telemetry.reads())
    assert selection.evidence.coverage is None
    assert covered.mean is None
    assert covered.estimated_share == 0


@pytest.mark.parametrize("refused", ["mean", "drop"])
def test_the_bound_is_of_what_was_dropped(refused: str) -> None:
    options = {"m_max": 0, "epsilon": 1.0, "refused": refused, "certify": True}
    data = drifting()
    for position, (selection, _, telemetry) in enumerate(
        decoded(make("nosa", **SMALL | options), cache_of(), data), PROMPT
    ):
        (covered,) = telemetry.coverage(telemetry.reads())
        assert covered.dropped_bound is not None
        dropped = [sorted(parts(selection, head // 2, position)[2]) for head in range(HEADS)]
        true = [float(true_shares(data, position)[head, pages].sum()) for head, pages in enumerate(dropped)]
        if refused == "drop":
            assert sum(true) / HEADS - 1e-5 <= covered.dropped_bound < 1
        assert selection.evidence.dropped_bound is not None
        keys = data[1][: position + 1].double().repeat_interleave(HEADS // KV_HEADS, 1)
        scores = torch.einsum("hd,jhd->hj", data[0][position].double(), keys) * DIM**-0.5
        for head, pages in enumerate(dropped):
            inside = [token for page in pages for token in range(page * PAGE, page * PAGE + PAGE)]
            assert float(selection.evidence.dropped_bound[0, head]) >= float(scores[head, inside].logsumexp(-1)) - 1e-4


@pytest.mark.parametrize("options", [{"m_max": "-1"}, {"delta": "-inf"}, {"delta": "0"}, {"m_max": 0}], ids=str)
def test_options_may_come_as_text(options: dict[str, object]) -> None:
    (name, value), strategy = next(iter(options.items())), make("nosa", **options)
    assert getattr(strategy, name) == float(str(value))


@pytest.mark.parametrize("options", [{"m_max": -2}, {"delta": math.nan}, {"delta": 11.0}, {"beta": 1.1}], ids=str)
def test_options_have_bounds(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make("nosa", **options)


def test_a_trained_model_chooses_as_it_was_trained_to() -> None:
    """It reads 64 blocks of 64 tokens: all of these, and more than the options ask for."""
    biased: dict[str, object] = {"bias_channels": 8, "scale": DIM**-0.5}
    data, pages = drifting(), {}
    for name, options in (("nosa-trained", {}), ("nosa", SMALL), ("nosa", {**SMALL, "trained": False})):
        cache = cache_of(**biased)
        sequence = opened(cache, data)
        watch = Watch(make(name, dense_below=0, **options))
        step = cache.decode([Span(sequence, PROMPT, 1)])
        bind(watch, cache, step)(0, *(part[PROMPT : PROMPT + 1] for part in data))  # type: ignore[arg-type]
        pages[name, bool(options.get("trained", True))] = watch.seen[0].counts().max()
    assert pages["nosa", True] == pages["nosa-trained", True] == PROMPT // PAGE + 1
    assert pages["nosa", False] < PROMPT // PAGE / 2
