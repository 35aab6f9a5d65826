"""Tokens that read what the last one read, but for a little: the same whatever else runs, and told as it is."""

from __future__ import annotations

import pytest

from keysift.engine import Engine, Request, Sparsity
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens

SMALL = ("dense_below=0", "sink=16", "window=32", "budget=64", "queried=48", "m_max=1", "epsilon=0.05")
REFUSED = pytest.mark.parametrize("refused", ["drop", "mean"])


def request(name: str, prompt: tuple[int, ...], new: int, *more: str) -> Request:
    return Request(name, prompt, greedy(new), strategy="nosa", strategy_args=(*SMALL, *more))


def spoken(engine: Engine, *requests: Request) -> list[list[int]]:
    for each in requests:
        engine.add(each)
    outputs = drain(engine)
    return [said(outputs, each.request_id) for each in requests]


@REFUSED
def test_a_request_says_the_same_alone_in_company_and_behind_a_prefix(make: Make, refused: str) -> None:
    first, second, option = tokens(180), (*tokens(180)[:140], *tokens(60, 1)), f"refused={refused}"
    (alone,) = spoken(make(), request("b", second, 40, option))
    engine = make()
    company = request("a", first, 50, option), request("b", second, 40, option), request("c", first, 9, option)
    assert spoken(engine, *company)[1] == alone
    assert engine.scheduler.preemptions == 0
    assert spoken(engine, request("b", second, 40, option))[0] == alone, "its own pages are there now"
    assert engine.cache.recent.bytes == 0


def test_it_is_not_what_dense_says(make: Make) -> None:
    """Else the others would prove little."""
    engine = make()
    engine.add(request("sparse", tokens(180), 40))
    engine.add(Request("dense", tokens(180), greedy(40), strategy="dense"))
    outputs = drain(engine)
    assert said(outputs, "sparse") != said(outputs, "dense")


@pytest.mark.parametrize("more", [("budget=32",), ("budget=32", "dense_below=160")], ids=str)
def test_a_request_that_was_preempted_says_the_same(make: Make, more: tuple[str, ...]) -> None:
    prompts = [tokens(120, seed) for seed in range(3)]
    alone = [spoken(make(), request(str(i), prompt, 70, *more))[0] for i, prompt in enumerate(prompts)]
    cramped = make(kv_memory=make().cache.spec.page_bytes * 26)
    assert spoken(cramped, *(request(str(i), prompt, 70, *more) for i, prompt in enumerate(prompts))) == alone
    assert cramped.scheduler.preemptions > 0


def test_a_preempted_token_that_read_everything_is_decoded_again(make: Make) -> None:
    """In a chunk, as it would be where tokens remember nothing, the next one would not find what it left."""
    engine = make(kv_memory=make().cache.spec.page_bytes * 26)
    for seed in range(3):
        engine.add(request(str(seed), tokens(120, seed), 40, "budget=1000"))
    while not engine.scheduler.preemptions:
        engine.step()
    (waiting,) = engine.scheduler.waiting
    assert waiting.num_generated > 5
    assert all(reads.density == 1 for reads in waiting.reads.values())
    assert waiting.in_chunks == waiting.prompt_len
    assert len(waiting.page_keys()) == waiting.prompt_len // 16


def test_a_step_that_fails_and_runs_again_says_the_same(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails behind the first layer, which has chosen by then and remembers it."""
    (undisturbed,) = spoken(make(), request("a", tokens(150), 30))
    engine = make()
    engine.add(request("a", tokens(150), 30))
    write, calls = engine.cache.tier.write, 0

    def failing(layer: int, *rest: object) -> None:
        nonlocal calls
        calls += layer == 1
        if layer == 1 and calls % 4 == 0:
            raise OSError("gone for a moment")
        write(layer, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.cache.tier, "write", failing)
    outputs = []
    while engine.has_work:
        batch = engine.scheduler.next_batch()
        assert batch is not None
        states = [engine._job_of(sequence).sampler for sequence in batch.sampled]
        try:
            result = engine.runner.run(batch, states)
        except OSError:
            result = engine.runner.run(batch, states)
        outputs += engine._commit(batch, result)
    assert calls > 40
    assert said(outputs, "a") == undisturbed


def test_a_budget_of_everything_says_what_dense_says(make: Make) -> None:
    engine = make()
    engine.add(request("all", tokens(150), 40, "budget=100000"))
    engine.add(Request("dense", tokens(150), greedy(40), strategy="dense"))
    outputs = drain(engine)
    assert said(outputs, "all") == said(outputs, "dense")
    assert finish_of(outputs, "all").sparsity.decode_density == 1


def sparsity(make: Make, *more: str) -> Sparsity:
    engine = make()
    engine.add(request("a", tokens(300), 40, *more))
    return finish_of(drain(engine), "a").sparsity


def test_how_little_changes_is_told(make: Make) -> None:
    """Zones and budget: at least eight pages of a token; nothing comes in but its own page every sixteen tokens."""
    still = sparsity(make, "m_max=0", "epsilon=1")
    assert still.kv_overlap is not None
    assert 1 - 1 / 8 / 12 < still.kv_overlap < 1
    assert still.bound_exceeded == 0
    moving = sparsity(make, "m_max=2", "epsilon=1")
    assert moving.kv_overlap is not None
    assert 1 - 3 / 7 < moving.kv_overlap < still.kv_overlap
    assert moving.bound_exceeded == 0


def test_how_often_the_valve_opens_is_told(make: Make) -> None:
    assert 0.1 < sparsity(make, "m_max=0", "epsilon=0.05").bound_exceeded < 1
    everything = sparsity(make, "budget=100000", "m_max=0")
    assert (everything.kv_overlap is not None, everything.bound_exceeded) == (True, 0)


def test_who_compares_nothing_tells_nothing(make: Make) -> None:
    engine = make()
    engine.add(Request("a", tokens(100), greedy(9), strategy="retrieval", strategy_args=("dense_below=0",)))
    found = finish_of(drain(engine), "a").sparsity
    assert (found.kv_overlap, found.bound_exceeded) == (None, 0)


def test_read_estimated_and_dropped_are_told_apart(make: Make) -> None:
    dropping = sparsity(make, "m_max=0", "epsilon=1", "refused=drop")
    assert dropping.estimated == 0
    meaning = sparsity(make, "m_max=0", "epsilon=1")
    assert meaning.coverage is not None
    assert 0.01 < meaning.estimated < 1 - meaning.coverage - 0.01, "some pages were not even asked for"
    whole = sparsity(make, "m_max=0", "epsilon=1", "tail=mean")
    assert whole.coverage is not None
    assert whole.estimated == pytest.approx(1 - whole.coverage, abs=1e-6)
