"""The engine over a tiny random model: outputs, their order, and strategies."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from keysift.engine import (
    Finish,
    FinishReason,
    PrefillProgress,
    PromptInfo,
    Request,
    SamplingParams,
    TokenOutput,
)
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("chunk", [64, 128])
def test_greedy_equals_transformers_alone_and_ragged(make: Make, expected: Callable, chunk: int, backend: str) -> None:
    engine = make(prefill_chunk=chunk, backend=backend)
    lengths = [1, 15, 16, 17, 63, 64, 65, 200]
    for index, length in enumerate(lengths):
        engine.add(Request(str(index), tokens(length, index), greedy(5 + index)))
    outputs = drain(engine)
    for index, length in enumerate(lengths):
        assert said(outputs, str(index)) == expected(list(tokens(length, index)), 5 + index)


def test_preemption_changes_nothing_but_time(make: Make, expected: Callable) -> None:
    page = make().status.page_bytes
    engine = make(kv_memory=14 * page, prefix_cache=False)
    for index in range(3):
        engine.add(Request(str(index), tokens(60, index), greedy(40)))
    outputs = drain(engine)
    assert engine.scheduler.preemptions > 0
    for index in range(3):
        assert said(outputs, str(index)) == expected(list(tokens(60, index)), 40)


def test_outputs_tell_the_story_in_order(make: Make) -> None:
    engine = make()
    engine.add(Request("a", tokens(150), greedy(3)))
    outputs = drain(engine)
    kinds = [type(output) for output in outputs]
    assert kinds == [PromptInfo, *[PrefillProgress] * 3, *[TokenOutput] * 3, Finish]
    assert [output.processed for output in outputs if isinstance(output, PrefillProgress)] == [64, 128, 150]
    finish = finish_of(outputs, "a")
    assert finish.reason is FinishReason.LENGTH
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (150, 3)
    assert finish.timings.ttft_ms >= finish.timings.prefill_ms > 0
    assert finish.sparsity.prefill_density == finish.sparsity.decode_density == finish.sparsity.coverage == 1.0


def test_streaming_reads_less_and_reports_it(make: Make) -> None:
    engine = make()
    engine.add(Request("a", tokens(400), greedy(3), strategy="streaming", strategy_args=("sink=16", "window=64")))
    sparsity = finish_of(drain(engine), "a").sparsity
    assert sparsity.strategy == "streaming"
    assert 0.15 < sparsity.prefill_density < 0.6
    assert 0.15 < sparsity.decode_density < 0.3
    assert sparsity.coverage is None


def test_a_dense_fallback_is_reported(make: Make) -> None:
    engine = make(strategy="streaming", strategy_args=("dense_below=100",))
    for length in (50, 200):
        engine.add(Request(str(length), tokens(length), greedy(1)))
    outputs = drain(engine)
    assert finish_of(outputs, "50").sparsity.dense_fallback
    assert not finish_of(outputs, "200").sparsity.dense_fallback


@pytest.mark.parametrize("after", [0, 1, 3])
def test_abort_frees_pages_at_once(make: Make, after: int) -> None:
    engine = make()
    engine.add(Request("a", tokens(150), greedy(50)))
    for _ in range(after):
        engine.step()
    assert engine.abort("a")
    assert engine.status.pages_free == engine.status.pages_total
    assert not engine.abort("a")
    assert finish_of(drain(engine), "a").reason is FinishReason.CANCELLED


def test_stop_ids_and_stop_strings_end_the_text(make: Make) -> None:
    engine = make()
    engine.add(Request("free", tokens(40), greedy(12)))
    free = drain(engine)
    words = said(free, "free")
    text = "".join(output.text for output in free if isinstance(output, TokenOutput))
    engine.add(Request("id", tokens(40), greedy(12, stop_token_ids=(words[4],))))
    outputs = drain(engine)
    first = words.index(words[4])
    assert said(outputs, "id") == words[: first + 1]
    assert finish_of(outputs, "id").matched_stop == words[4]
    stop = text[3:5]
    engine.add(Request("string", tokens(40), greedy(12, stop_strings=(stop,))))
    outputs = drain(engine)
    assert "".join(output.text for output in outputs if isinstance(output, TokenOutput)) == text[: text.index(stop)]
    assert finish_of(outputs, "string").matched_stop == stop


def test_a_completion_ends_at_the_models_length(make: Make) -> None:
    engine = make(max_model_len=100)
    engine.add(Request("a", tokens(95), greedy(50)))
    finish = finish_of(drain(engine), "a")
    assert (finish.reason, finish.usage.completion_tokens) == (FinishReason.LENGTH, 5)


def test_sampling_does_not_depend_on_the_company(make: Make) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_new_tokens=20, ignore_eos=True)
    engine = make()
    engine.add(Request("alone", tokens(30), params))
    alone = said(drain(engine), "alone")
    for index in range(5):
        engine.add(Request(str(index), tokens(20 + index, index), greedy(9, temperature=1.3)))
    engine.add(Request("together", tokens(30), params))
    assert said(drain(engine), "together") == alone


WINDOW = ("streaming.sink=0", "streaming.window=16")
SIFT = ("sink=0", "local=16", "last_rows_dense=0", "threshold=0.3", "coverage=0")
FLEX = ("sink=0", "local=16", "last_rows_dense=0", "gamma=0.2", "min_budget=0", "block_size=16")


@pytest.mark.parametrize("prefix_cache", [False, True], ids=["without prefixes", "with prefixes"])
@pytest.mark.parametrize(
    ("strategy", "args"),
    [
        ("streaming", WINDOW),
        ("dense+streaming", WINDOW),
        ("streaming+dense", WINDOW),
        ("sift", (*SIFT, "dense_below=60")),
        ("sift", (*SIFT, "dense_below=0")),
        ("flexprefill", (*FLEX, "dense_below=60")),
        ("flexprefill", (*FLEX, "dense_below=0")),
    ],
)
def test_sparse_strategies_give_the_same_tokens_with_preemption(
    make: Make, strategy: str, args: tuple[str, ...], prefix_cache: bool
) -> None:
    """With `dense_below=60` the prompt is dense; a chunk of all tokens after a preemption would not be."""
    fields = {"strategy": strategy, "strategy_args": args, "queries_per_row": 16, "prefix_cache": prefix_cache}
    roomy = make(**fields)
    cramped = make(**fields, kv_memory=14 * roomy.status.page_bytes)
    answers = []
    for engine in (roomy, cramped):
        for index in range(3):
            engine.add(Request(str(index), tokens(60, index), greedy(60)))
        outputs = drain(engine)
        answers.append([said(outputs, str(index)) for index in range(3)])
    assert cramped.scheduler.preemptions > 0
    assert answers[0] == answers[1]


@pytest.mark.parametrize("generated", [1, 2, 5])
@pytest.mark.parametrize(
    ("strategy", "args"),
    [
        ("dense+streaming", ("streaming.sink=0", "streaming.window=16")),
        ("dense+streaming", ("streaming.sink=0", "streaming.window=16", "streaming.dense_below=164")),
        ("dense+nosa", ("sink=16", "window=16", "budget=16", "queried=16", "dense_below=0")),
    ],
    ids=["at once", "after some tokens", "with a history"],
)
def test_a_token_that_was_never_decoded_is_decoded_after_a_preemption(
    make: Make, strategy: str, args: tuple[str, ...], generated: int
) -> None:
    """The tokens before it read everything; that does not mean that it does."""
    request = Request("a", tokens(160), greedy(12), strategy=strategy, strategy_args=args)
    engine = make()
    engine.add(request)
    (wanted, outputs) = (said(drain(engine), "a"), [])
    engine = make(prefix_cache=False)
    engine.add(request)
    while len(said(outputs, "a")) < generated:
        outputs += engine.step()
    engine.scheduler._preempt(engine.scheduler.running[0])
    assert said([*outputs, *drain(engine)], "a") == wanted


def test_every_request_is_announced_once_and_reported_to_its_end(make: Make) -> None:
    page = make().status.page_bytes
    engine = make(kv_memory=16 * page, prefix_cache=False)
    for index in range(4):
        engine.add(Request(str(index), tokens(70 + index, index), greedy(30)))
    outputs = drain(engine)
    assert engine.scheduler.preemptions > 0
    for index in range(4):
        mine = [output for output in outputs if output.request_id == str(index)]
        reports = [output.processed for output in mine if isinstance(output, PrefillProgress)]
        assert [type(output) for output in mine].count(PromptInfo) == 1
        assert isinstance(mine[0], PromptInfo)
        assert reports == sorted(set(reports))
        assert reports[-1] == 70 + index
