"""NOSA's locality bound in the engine: tokens independent of what else runs, and the overlap that requests report."""

from __future__ import annotations

import pytest

from keysift.engine import Engine, Request, Sparsity
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens

SMALL = ("dense_below=0", "sink=16", "window=32", "budget=64", "queried=48", "m_max=1", "epsilon=0.05")
REFUSED = pytest.mark.parametrize("refused", ["drop", "mean"])


def request(name: str, prompt: tuple[int, ...], new: int, *more: str) -> Request:
    return Request(name, prompt, greedy(new), strategy="nosa", strategy_args=(*SMALL, *more))


def generated(engine: Engine, *requests: Request) -> list[list[int]]:
    for each in requests:
        engine.add(each)
    outputs = drain(engine)
    return [said(outputs, each.request_id) for each in requests]


@REFUSED
def test_tokens_are_the_same_alone_in_a_batch_and_after_a_prefix_hit(make: Make, refused: str) -> None:
    first, second, option = tokens(180), (*tokens(180)[:140], *tokens(60, 1)), f"refused={refused}"
    (alone,) = generated(make(), request("b", second, 40, option))
    engine = make()
    batch = request("a", first, 50, option), request("b", second, 40, option), request("c", first, 9, option)
    assert generated(engine, *batch)[1] == alone
    assert engine.scheduler.preemptions == 0
    assert generated(engine, request("b", second, 40, option))[0] == alone, "with its own pages cached"
    assert engine.cache.recent.bytes == 0


def test_tokens_differ_from_those_of_dense(make: Make) -> None:
    """Otherwise the other tests would prove little."""
    engine = make()
    engine.add(request("sparse", tokens(180), 40))
    engine.add(Request("dense", tokens(180), greedy(40), strategy="dense"))
    outputs = drain(engine)
    assert said(outputs, "sparse") != said(outputs, "dense")


@pytest.mark.parametrize("more", [("budget=32",), ("budget=32", "dense_below=160")], ids=str)
def test_tokens_are_the_same_after_a_preemption(make: Make, more: tuple[str, ...]) -> None:
    prompts = [tokens(120, seed) for seed in range(3)]
    alone = [generated(make(), request(str(i), prompt, 70, *more))[0] for i, prompt in enumerate(prompts)]
    cramped = make(kv_memory=make().cache.spec.page_bytes * 26)
    assert generated(cramped, *(request(str(i), prompt, 70, *more) for i, prompt in enumerate(prompts))) == alone
    assert cramped.scheduler.preemptions > 0


def test_tokens_that_read_everything_are_decoded_again_after_a_preemption(make: Make) -> None:
    """A prompt chunk, which recomputes them under other strategies, would leave no decode history to the next token."""
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


def test_tokens_are_the_same_after_a_step_that_fails_and_runs_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step fails after the first layer, which has updated its decode history by then."""
    (undisturbed,) = generated(make(), request("a", tokens(150), 30))
    engine = make()
    engine.add(request("a", tokens(150), 30))
    write, calls = engine.cache.tier.write, 0

    def failing(layer: int, *rest: object) -> None:
        nonlocal calls
        calls += layer == 1
        if layer == 1 and calls % 4 == 0:
            raise OSError("temporary")
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


def test_a_budget_for_every_page_equals_dense(make: Make) -> None:
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


def test_overlap_with_the_previous_token_is_reported(make: Make) -> None:
    """A token reads at least eight pages; with `m_max=0` none is new but its own page, every sixteen tokens."""
    fixed = sparsity(make, "m_max=0", "epsilon=1")
    assert fixed.kv_overlap is not None
    assert 1 - 1 / 8 / 12 < fixed.kv_overlap < 1
    assert fixed.bound_exceeded == 0
    moving = sparsity(make, "m_max=2", "epsilon=1")
    assert moving.kv_overlap is not None
    assert 1 - 3 / 7 < moving.kv_overlap < fixed.kv_overlap
    assert moving.bound_exceeded == 0


def test_the_share_of_exceeded_bounds_is_reported(make: Make) -> None:
    assert 0.1 < sparsity(make, "m_max=0", "epsilon=0.05").bound_exceeded < 1
    everything = sparsity(make, "budget=100000", "m_max=0")
    assert (everything.kv_overlap is not None, everything.bound_exceeded) == (True, 0)


def test_strategies_that_compare_nothing_report_no_overlap(make: Make) -> None:
    engine = make()
    engine.add(Request("a", tokens(100), greedy(9), strategy="retrieval", strategy_args=("dense_below=0",)))
    found = finish_of(drain(engine), "a").sparsity
    assert (found.kv_overlap, found.bound_exceeded) == (None, 0)


def test_kept_estimated_and_dropped_shares_are_distinct(make: Make) -> None:
    dropped = sparsity(make, "m_max=0", "epsilon=1", "refused=drop")
    assert dropped.estimated == 0
    averaged = sparsity(make, "m_max=0", "epsilon=1")
    assert averaged.coverage is not None
    assert 0.01 < averaged.estimated < 1 - averaged.coverage - 0.01, "pages that were not queried are dropped"
