"""Laws of every registered strategy. A new strategy adds one row to `tests/strategies.py`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keysift.attention import Dense, Split, Strategy, Telemetry, bind, known, make
from keysift.kvcache import CacheSpec, PagedCache, Phase, Selection, Span, Step
from tests.strategies import IDS, ROWS, Row

PAGE, ROW, HEADS, KV_HEADS, DIM = 4, 8, 4, 2, 16


def test_every_strategy_has_its_row() -> None:
    without = set(known()) - {row.name for row in ROWS}
    assert not without, f"no law runs on {', '.join(sorted(without))}: add a row to rows() in tests/strategies.py"


def cache_of(layers: int = 1, **spec: object) -> PagedCache:
    shape = CacheSpec(num_layers=layers, num_kv_heads=KV_HEADS, head_dim=DIM, page_size=PAGE, **spec)  # type: ignore[arg-type]
    cache = PagedCache(shape, 64, max_sequences=4, max_len=200)
    for tensor in (cache.tier.k, cache.tier.v):  # type: ignore[attr-defined]
        tensor.fill_(float("nan"))
    return cache


def qkv(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, HEADS, DIM, generator=generator)
    k, v = torch.randn(2, tokens, KV_HEADS, DIM, generator=generator)
    return q, k, v


def oracle(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """Causal softmax attention in float64, from its formula."""
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    ages = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (ages < 0) | (ages >= window if window else False)
    weights = (torch.einsum("qhd,khd->hqk", q.double(), k) * DIM**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def run(strategy: Strategy, cache: PagedCache, lengths: list[int], decode: int, data: tuple[Tensor, ...]) -> Tensor:
    """Attention of one layer over a prompt in chunks, then token by token: [T, Hq, D]."""
    sequence = cache.open()
    cache.reserve(sequence, sum(lengths) + decode)
    start, outs = 0, []
    for length in lengths + [1] * decode:
        span = Span(sequence, start, length)
        step = cache.decode([span]) if len(outs) >= len(lengths) else cache.prefill(span, ROW)
        here = slice(start, start + length)
        outs.append(bind(strategy, cache, step)(0, *(tensor[here] for tensor in data)))
        start += length
    return torch.cat(outs)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
@pytest.mark.parametrize("lengths", [[1], [7], [8], [9], [32, 8, 21], [64, 33]], ids=str)
def test_a_budget_of_everything_is_dense(row: Row, lengths: list[int]) -> None:
    data = qkv(sum(lengths) + 5)
    out = run(make(row.name, **row.full), cache_of(**row.spec), lengths, 5, data)
    torch.testing.assert_close(out.double(), oracle(*data), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.per_query_head], ids=str)
def test_a_budget_of_everything_has_the_bits_of_dense(row: Row) -> None:
    data = qkv(70)
    assert torch.equal(
        run(make(row.name, **row.full), cache_of(**row.spec), [32, 33], 5, data),
        run(make("dense"), cache_of(**row.spec), [32, 33], 5, data),
    )


@pytest.mark.parametrize("row", ROWS, ids=IDS)
@settings(deadline=None, max_examples=20)
@given(start=st.integers(0, 15), length=st.integers(1, 40), phase=st.sampled_from(Phase))
def test_selections_are_ascending_causal_and_hold_their_own_pages(
    row: Row, start: int, length: int, phase: Phase
) -> None:
    cache = cache_of(**row.spec)
    sequence = cache.open()
    cache.reserve(sequence, 200)
    start *= ROW
    step = cache.prefill(Span(sequence, start, length), ROW)
    if phase is Phase.DECODE:
        step = cache.decode([Span(sequence, start + length, 1)])
    selection = choose(make(row.name, **row.sparse), cache, step)
    for index, last in enumerate(step.last_pages.tolist()):
        for pages in selection.pages[index].tolist():
            chosen = [page for page in pages if page >= 0]
            assert pages == chosen + [-1] * (len(pages) - len(chosen))
            assert chosen == sorted(set(chosen))
            assert set(range(int(step.starts[index]) // PAGE, last + 1)) <= set(chosen)
            assert chosen[-1] <= last


def choose(strategy: Strategy, cache: PagedCache, step: Step) -> Selection:
    """The selection of this step of the only sequence, after its earlier tokens were appended."""
    (span,) = step.spans
    q, k, v = qkv(len(step.positions))
    if span.start:
        _, *before = qkv(span.start, seed=1)
        cache.append(0, *before, cache.prefill(Span(span.sequence, 0, span.start), ROW))
    cache.append(0, k, v, step)
    context = cache.context(0, step, strategy.index_spec())
    return strategy.prefill(q, context) if step.phase is Phase.PREFILL else strategy.decode(q, context)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_sequence_decodes_alike_alone_and_in_a_batch(row: Row) -> None:
    strategy = make(row.name, **row.sparse)
    prompts = [qkv(41, 1), qkv(17, 2), qkv(64, 3)]
    alone = [run(strategy, cache_of(**row.spec), [len(data[0]) - 1], 1, data)[-1] for data in prompts]
    cache = cache_of(**row.spec)
    sequences = [cache.open() for _ in prompts]
    for sequence, data in zip(sequences, prompts, strict=True):
        cache.reserve(sequence, len(data[0]))
        step = cache.prefill(Span(sequence, 0, len(data[0]) - 1), ROW)
        bind(strategy, cache, step)(0, *(tensor[:-1] for tensor in data))
    spans = [Span(sequence, len(data[0]) - 1, 1) for sequence, data in zip(sequences, prompts, strict=True)]
    last = [torch.stack([data[part][-1] for data in prompts]) for part in range(3)]
    assert torch.equal(bind(strategy, cache, cache.decode(spans))(0, *last), torch.stack(alone))


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_twice_is_the_same_bits(row: Row) -> None:
    data, strategy = qkv(61), make(row.name, **row.sparse)
    first, second = (run(strategy, cache_of(**row.spec), [48, 8], 5, data) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_layers_with_a_window_read_exactly_that_window(row: Row) -> None:
    data = qkv(45)
    out = run(make(row.name, **row.sparse), cache_of(windows=(10,), **row.spec), [40], 5, data)
    torch.testing.assert_close(out.double(), oracle(*data, window=10), rtol=1e-5, atol=1e-5)


def test_streaming_reads_what_arithmetic_says() -> None:
    cache = cache_of(layers=3)
    sequence = cache.open()
    cache.reserve(sequence, 129)
    strategy, data = make("streaming", sink=4, window=8), qkv(128)
    step = cache.prefill(Span(sequence, 0, 128), ROW)
    telemetry = Telemetry(cache.spec, step)
    attend = bind(strategy, cache, step, telemetry)
    for layer in range(3):
        attend(layer, *data)
    row_pages = ROW // PAGE
    chosen = pages = 0
    for row in range(128 // ROW):
        first_window = max(row * ROW - 8 + 1, 0) // PAGE
        before = len({page for page in {0, *range(first_window, row * row_pages)} if page < row * row_pages})
        chosen += before * PAGE * ROW + ROW * (ROW + 1) // 2
        pages += before + row_pages
    (reads,) = telemetry.reads()
    assert reads.density == chosen / (128 * 129 // 2)
    assert reads.bytes == pages * cache.spec.read_bytes * KV_HEADS * 3
    torch.testing.assert_close(telemetry.density(), torch.full((3, KV_HEADS), reads.density))


def test_short_contexts_fall_back_to_dense_part_by_part() -> None:
    strategy = make("dense+streaming", **{"streaming.dense_below": 100})
    assert strategy.at(Phase.DECODE, 100, 1) == make("dense")
    assert strategy.at(Phase.DECODE, 101, 1) == make("streaming", dense_below=100)
    assert strategy.at(Phase.PREFILL, 50, 50) == make("dense")


def test_the_parts_of_a_pair_are_those_that_run() -> None:
    """Sift chooses for prompts only: as the part for tokens it is dense, which is no fallback."""
    strategy = Split(prompt=Dense(), token=make("sift"))
    assert strategy.part(Phase.DECODE) == strategy.at(Phase.DECODE, 5, 1) == make("dense")
    assert make("sift+dense").part(Phase.PREFILL) == make("sift")


def test_dense_does_not_fall_back_to_dense() -> None:
    strategy = make("dense", dense_below=100)
    for phase, context in ((Phase.PREFILL, 50), (Phase.DECODE, 50), (Phase.PREFILL, 500)):
        assert strategy.at(phase, context, 1) == strategy.part(phase) == make("dense")


@pytest.mark.parametrize(("queries", "context"), [(1024, 2304), (512, 4608), (2048, 1152)])
def test_prompts_are_sparse_from_a_context_by_chunk(queries: int, context: int) -> None:
    """By default: 1536**2 / queries."""
    strategy = make("sift")
    assert strategy.at(Phase.PREFILL, context, queries) == make("dense")
    assert strategy.at(Phase.PREFILL, context + 1, queries) == strategy


def test_a_prompt_chunk_is_sparse_by_its_work() -> None:
    strategy = make("streaming", dense_below=100)
    assert strategy.at(Phase.PREFILL, 100, 100) == make("dense")
    assert strategy.at(Phase.PREFILL, 101, 101) == strategy
    assert strategy.at(Phase.PREFILL, 5000, 2) == make("dense"), "a short chunk after a prefix"
    assert strategy.at(Phase.PREFILL, 5001, 2) == strategy, "a longer prefix"


@pytest.mark.parametrize("window", [10**6, 2**31 - 1])
def test_a_window_beyond_every_position_reads_everything(window: int) -> None:
    data = qkv(70)
    out = run(make("streaming", window=window), cache_of(), [64], 6, data)
    torch.testing.assert_close(out.double(), oracle(*data), rtol=1e-5, atol=1e-5)


def test_a_model_that_has_nothing_but_windows_reports_no_reads() -> None:
    cache = cache_of(windows=(10,))
    sequences = [cache.open(), cache.open()]
    for sequence in sequences:
        cache.reserve(sequence, 1)
    step = cache.decode([Span(sequence, 0, 1) for sequence in sequences])
    telemetry = Telemetry(cache.spec, step)
    bind(make("dense"), cache, step, telemetry)(0, *qkv(2))
    assert [reads.density for reads in telemetry.reads()] == [1.0, 1.0]
