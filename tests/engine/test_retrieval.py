"""Retrieval in the engine: the same tokens whatever else runs, and true reports of what was read."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from keysift.attention.strategies import retrieval
from keysift.engine import Engine, Request, SamplingParams, Sparsity, TokenOutput, Unsupported
from keysift.kvcache.index import Graph, Ivf
from keysift.kvcache.index.graph import build
from keysift.kvcache.indexes import SPARE
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens

SMALL = ("dense_below=0", "sink=16", "window=32", "budget=32", "epsilon=0")
INDEXES = ("flat", "codes", "ivf", "graph", "summary", "bound")
SEARCHES = {"graph": ("wait=true", "beam=4", "top_k=4"), "ivf": ("nprobe=2",)}


@pytest.fixture(autouse=True)
def _small_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments and graphs that short prompts fill several of."""
    monkeypatch.setattr(retrieval, "Ivf", partial(Ivf, segment=64, tokens_per_list=8))
    monkeypatch.setattr(retrieval, "Graph", partial(Graph, degree=6, queries=24, lag=32))
    monkeypatch.setattr(build, "LEAST_POINTS", 4)  # else walks begin at most keys


def request(name: str, prompt: tuple[int, ...], new: int, index: str, *more: str, **fields: Any) -> Request:
    arguments = (*SMALL, f"index={index}", *(more or SEARCHES.get(index, ())))
    return Request(name, prompt, greedy(new), strategy="retrieval", strategy_args=arguments, **fields)


def spoken(engine: Engine, *requests: Request) -> list[list[int]]:
    for each in requests:
        engine.add(each)
    outputs = drain(engine)
    return [said(outputs, each.request_id) for each in requests]


@pytest.mark.parametrize("index", INDEXES)
def test_a_request_says_the_same_alone_in_company_and_after_a_prefix_hit(make: Make, index: str) -> None:
    first, second = tokens(180), (*tokens(180)[:140], *tokens(60, 1))
    (alone,) = spoken(make(), request("b", second, 12, index))
    engine = make()
    together = spoken(
        engine, request("a", first, 20, index), request("b", second, 12, index), request("c", first, 9, index)
    )
    assert together[1] == alone
    assert engine.scheduler.preemptions == 0
    assert spoken(engine, request("b", second, 12, index))[0] == alone, "its own pages are there now"


@pytest.mark.parametrize("index", INDEXES)
def test_a_request_that_was_preempted_says_the_same(make: Make, index: str) -> None:
    prompts = [tokens(150, seed) for seed in range(3)]
    alone = [spoken(make(), request(str(i), prompt, 24, index))[0] for i, prompt in enumerate(prompts)]
    cramped = make(kv_memory=make().cache.spec.page_bytes * 32, index_memory=2**22)
    assert spoken(cramped, *(request(str(i), prompt, 24, index) for i, prompt in enumerate(prompts))) == alone
    assert cramped.scheduler.preemptions > 0


def test_a_budget_of_everything_says_what_dense_says(make: Make) -> None:
    engine = make()
    engine.add(request("all", tokens(150), 20, "codes", "budget=100000"))
    engine.add(Request("dense", tokens(150), greedy(20), strategy="dense"))
    outputs = drain(engine)
    assert said(outputs, "all") == said(outputs, "dense")


def sparsity(make: Make, *more: str) -> Sparsity:
    engine = make()
    engine.add(request("a", tokens(300), 20, "codes", *more))
    return finish_of(drain(engine), "a").sparsity


def test_what_was_read_and_kept_is_reported(make: Make) -> None:
    found = sparsity(make)
    assert found.prefill_density == 1
    assert 0.2 < found.decode_density < 0.35
    assert found.coverage is not None
    assert 0 < found.coverage < 1
    assert (found.estimated, found.dropped_bound) == (0, None)


def test_the_most_that_was_dropped_is_reported(make: Make) -> None:
    found = sparsity(make, "certify=true")
    assert found.dropped_bound is not None
    assert found.coverage is not None
    assert 1 - found.coverage - 0.1 < found.dropped_bound < 1


def log_probabilities(engine: Engine, *requests: Request) -> list[list[float]]:
    """Those of each request's tokens."""
    for each in requests:
        engine.add(replace(each, params=each.params.model_copy(update={"logprobs": 1})))
    outputs = drain(engine)
    found: dict[str, list[float]] = {each.request_id: [] for each in requests}
    for output in outputs:
        if isinstance(output, TokenOutput):
            found[output.request_id] += [of_token[0].logprob for of_token in output.logprobs]
    return list(found.values())


@pytest.mark.parametrize("index", ["graph", "ivf"])
@pytest.mark.parametrize("offload", [False, True])
def test_an_answer_is_as_likely_cold_as_after_a_hit_and_after_a_preemption(
    make: Make, tmp_path: Path, index: str, offload: bool
) -> None:
    """The prompt of 500 tokens fills several segments, and graphs of 32 tokens more each."""
    document = tokens(480)
    question = request("a", (*document, *tokens(20, 1)), 40, index)
    home: dict[str, Any] = {"kv_offload": str(tmp_path), "kv_memory": 2**21} if offload else {}
    (cold,) = log_probabilities(make(), question)
    (bypassed,) = log_probabilities(make(prefix_cache=False, **home), question)
    assert bypassed == pytest.approx(cold, abs=1e-5)
    engine = make(**home)
    log_probabilities(engine, request("b", (*document, *tokens(9, 2)), 5, index))
    (hit,) = log_probabilities(engine, question)
    assert hit == pytest.approx(cold, abs=1e-5)
    engine.add(question)
    assert finish_of(drain(engine), "a").usage.cached_tokens >= 448
    (again,) = log_probabilities(engine, question)
    assert again == pytest.approx(cold, abs=1e-5)


def test_a_prompt_computed_without_a_graph_in_mind_is_computed_again_for_one(make: Make) -> None:
    """Once: then its pages have the queries that train graphs, and serve all."""
    question = request("a", tokens(500), 20, "graph")
    (cold,) = log_probabilities(make(), question)
    engine = make()
    cached = []
    for index in ("codes", "codes", "graph", "graph", "codes"):
        engine.add(request("a", tokens(500), 20, index))
        cached.append(finish_of(drain(engine), "a").usage.cached_tokens)
    assert [count > 0 for count in cached] == [False, True, False, True, True]
    assert log_probabilities(engine, question) == [pytest.approx(cold, abs=1e-5)]


def test_graphs_that_differ_otherwise_share_the_queries_that_train_them(make: Make) -> None:
    engine = make()
    spoken(engine, request("a", tokens(500), 4, "graph", "wait=true"))
    for more in (("wait=true", "sink=32"), ("wait=false",)):
        engine.add(request("a", tokens(500), 4, "graph", *more))
        assert finish_of(drain(engine), "a").usage.cached_tokens > 0
    assert len(engine.cache.indexes._entries()) == 3
    for nprobe in range(SPARE):
        spoken(engine, request("b", tokens(30), 2, "ivf", f"nprobe={nprobe + 1}"))
    assert engine.cache.indexes.bytes == 0, "all graphs went, and their queries"


@pytest.mark.parametrize("index", ["graph", "ivf"])
def test_an_answer_is_as_likely_after_a_preemption(make: Make, index: str) -> None:
    prompts = [tokens(300, seed) for seed in range(3)]
    requests = [request(str(i), prompt, 40, index) for i, prompt in enumerate(prompts)]
    alone = [log_probabilities(make(), each)[0] for each in requests]
    for cached in (True, False):
        page = make().cache.spec.page_bytes
        cramped = make(kv_memory=page * 62, index_memory=2**22, prefix_cache=cached)
        for found, wanted in zip(log_probabilities(cramped, *requests), alone, strict=True):
            assert found == pytest.approx(wanted, abs=1e-5)
        assert cramped.scheduler.preemptions > 0


def test_a_waiting_request_has_nothing_built_and_many_settings_share_it(make: Make) -> None:
    engine = make(max_num_seqs=1, max_queue=8)
    for nprobe in range(1, 8):
        engine.add(request(str(nprobe), tokens(150), 2, "ivf", f"nprobe={nprobe}"))
    engine.check(request("asked", tokens(60), 2, "graph"))
    indexes = engine.cache.indexes
    assert len(indexes) == 0
    engine.step()
    assert len(indexes) == 1
    drain(engine)
    assert len(indexes) == SPARE
    (entries,) = indexes._entries()
    assert entries.bytes == indexes.bytes == 2 * indexes.bytes // len(entries)  # type: ignore[arg-type]
    spoken(engine, request("again", tokens(150), 2, "ivf", "nprobe=99"))
    assert indexes._entries() == [entries]
    for top_k in range(2 * SPARE):
        spoken(engine, request(f"other {top_k}", tokens(150), 2, "graph", "wait=true", f"top_k={top_k + 1}"))
    assert len(indexes) == SPARE
    assert entries not in indexes._entries()
    assert entries.bytes == 0


def test_an_index_sees_the_sequences_that_name_it_alone(make: Make) -> None:
    engine = make()
    ours, theirs = request("ours", tokens(150), 30, "ivf"), Request("theirs", tokens(200, 1), greedy(30))
    spoken(engine, ours)
    before = engine.cache.indexes.bytes
    spoken(engine, theirs, replace(ours, request_id="ours again"))
    assert engine.cache.indexes.bytes == before
    spoken(engine, replace(ours, request_id="long", prompt=tokens(200, 2)))
    assert engine.cache.indexes.bytes > before


def test_a_request_too_short_to_be_sparse_has_no_index(make: Make) -> None:
    engine = make()
    arguments = ("index=ivf", "dense_below=400")
    engine.add(Request("short", tokens(300), greedy(4), strategy="retrieval", strategy_args=arguments))
    drain(engine)
    assert len(engine.cache.indexes) == 0


def test_an_index_that_the_cache_does_not_keep_is_refused(make: Make) -> None:
    engine = make(code_bits=0, strategy="dense")
    with pytest.raises(Unsupported, match=r"retrieval: codes: the cache keeps none \(code_bits\)"):
        engine.add(Request("a", tokens(40), SamplingParams(max_new_tokens=1), strategy="retrieval"))
    assert not engine.has_work
