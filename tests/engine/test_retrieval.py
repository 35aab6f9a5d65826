"""Retrieval in the engine: the same tokens whatever else runs, and true reports of what was read."""

from __future__ import annotations

import pytest

from keysift.engine import Engine, Request, SamplingParams, Sparsity, Unsupported
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens

SMALL = ("dense_below=0", "sink=16", "window=32", "budget=32", "epsilon=0")
INDEXES = ("flat", "codes", "ivf", "graph", "summary", "bound")


def request(name: str, prompt: tuple[int, ...], new: int, index: str, *more: str) -> Request:
    settled = ("wait=true",) if index == "graph" else ()
    arguments = (*SMALL, f"index={index}", *settled, *more)
    return Request(name, prompt, greedy(new), strategy="retrieval", strategy_args=arguments)


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
    cramped = make(kv_memory=make().cache.spec.page_bytes * 32)
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


def test_indexes_that_requests_asked_for_go_with_them(make: Make) -> None:
    engine = make()
    default = set(engine.cache._indexes)
    for nprobe in (1, 2, 3):
        engine.add(request(str(nprobe), tokens(60), 2, "ivf", f"nprobe={nprobe}"))
    assert len(engine.cache._indexes) == len(default) + 3
    engine.abort("1")
    drain(engine)
    assert set(engine.cache._indexes) == default
    engine.check(request("asked", tokens(60), 2, "ivf"))
    assert set(engine.cache._indexes) == default


def test_an_index_that_the_cache_does_not_keep_is_refused(make: Make) -> None:
    engine = make(code_bits=0, strategy="dense")
    with pytest.raises(Unsupported, match=r"retrieval: codes: the cache keeps none \(code_bits\)"):
        engine.add(Request("a", tokens(40), SamplingParams(max_new_tokens=1), strategy="retrieval"))
    assert not engine.has_work
