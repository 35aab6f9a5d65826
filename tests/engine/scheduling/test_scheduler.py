"""The scheduler's order: turns, overtaking, ageing, preemption, and prefixes. See tests/attack for random schedules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keysift.attention import Dense, Strategy, make
from keysift.engine.request import Request, SamplingParams
from keysift.engine.scheduling.batch import Batch
from keysift.engine.scheduling.scheduler import Scheduler
from keysift.engine.scheduling.sequence import Sequence
from keysift.kvcache import CacheSpec, PagedCache, PageKeys, Phase

PAGE, ROW, CHUNK, FRAMES = 4, 8, 16, 24
SPEC = CacheSpec(num_layers=1, num_kv_heads=1, head_dim=8, page_size=PAGE)


def make_scheduler(frames: int = FRAMES, max_running: int = 4, patience: int = 256) -> Scheduler:
    cache = PagedCache(SPEC, frames, max_sequences=max_running, max_len=96)
    return Scheduler(cache, max_running=max_running, chunk=CHUNK, queries_per_row=ROW, patience=patience)


def sequence(
    name: str, prompt: int, new: int = 4, strategy: Strategy | None = None, priority: int = 0, salt: str = ""
) -> Sequence:
    tokens = tuple(7 * position % 11 for position in range(prompt))
    request = Request(name, tokens, SamplingParams(max_new_tokens=new), priority=priority)
    return Sequence(request, strategy or Dense(), new, PageKeys(salt or name, PAGE))


def run(scheduler: Scheduler, batch: Batch) -> list[Sequence]:
    """Commit made-up tokens and finish the sequences that are done."""
    for member, span in zip(batch.sequences, batch.spans, strict=True):
        scheduler.commit(member, span, 1 if member in batch.sampled else None, 0.0)
    done = [member for member in batch.sequences if member.num_generated >= member.max_new_tokens]
    for member in done:
        scheduler.finish(member)
    return done


def check(batch: Batch) -> None:
    for member, span in zip(batch.sequences, batch.spans, strict=True):
        assert member.runs(batch.phase, span.length) == batch.strategy
        assert span.start == member.computed
        assert span.stop <= len(member.tokens)
        if batch.phase is Phase.PREFILL:
            assert span.start % (ROW if member.dense else CHUNK) == 0
            assert span.length <= CHUNK
            assert len(batch.spans) == 1
        else:
            assert span.length == 1


STRATEGIES = [
    Dense(),
    make("streaming"),
    make("ashape", dense_below=0, last_rows_dense=1),
    make("ashape", dense_below=20, last_rows_dense=2),  # the third chunk of 16 is the first to be sparse
]
prompts = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 12), st.integers(0, 1), st.sampled_from(STRATEGIES)),
    min_size=1,
    max_size=9,
)


def test_decodes_and_prompt_chunks_take_turns() -> None:
    scheduler = make_scheduler()
    scheduler.add(sequence("decodes", 4, new=12))
    run(scheduler, _next(scheduler))
    scheduler.add(sequence("long", 60))
    phases = []
    for _ in range(8):
        batch = _next(scheduler)
        phases.append(batch.phase)
        run(scheduler, batch)
    assert phases == [Phase.DECODE, Phase.PREFILL] * 4


def test_a_short_prompt_overtakes_a_long_one() -> None:
    scheduler = make_scheduler()
    scheduler.add(long := sequence("long", 60))
    scheduler.add(short := sequence("short", 5))
    batch = _next(scheduler)
    assert batch.sequences == (long,)
    run(scheduler, batch)
    batch = _next(scheduler)
    assert batch.sequences == (short,)
    assert batch.sampled == (short,)


def test_the_request_that_would_run_last_gives_way_and_is_computed_again() -> None:
    scheduler = make_scheduler(frames=8)
    scheduler.add(first := sequence("first", 14, new=14))
    scheduler.add(second := sequence("second", 10, new=14))
    finished: list[Sequence] = []
    while len(finished) < 2:
        finished += run(scheduler, _next(scheduler))
    assert finished == [first, second]
    assert first.preemptions == 0
    assert second.preemptions == scheduler.preemptions > 0
    assert second.num_generated == 14


def test_a_prompt_that_waits_for_pages_starts_when_another_one_caches_its_prefix() -> None:
    """Also if no page came free: it needs fewer then."""
    scheduler = make_scheduler(frames=20)
    scheduler.add(first := sequence("first", 56, new=20, salt="same"))
    scheduler.add(second := sequence("second", 56, new=4, salt="same"))
    for _ in range(8):
        run(scheduler, _next(scheduler))
    assert first.num_generated > 0
    assert first.handle is not None
    assert second.cached == 48


def test_a_request_that_only_runs_for_long_does_not_grow_old() -> None:
    """It gives way to one of a higher priority that came later, however many steps it ran."""
    scheduler = make_scheduler(frames=12, patience=10)
    scheduler.add(low := sequence("low", 8, new=40, priority=9))
    for _ in range(16):
        run(scheduler, _next(scheduler))
    scheduler.add(high := sequence("high", 16, new=12))
    while high.num_generated < 12:
        run(scheduler, _next(scheduler))
    assert high.preemptions == 0
    assert low.preemptions > 0


def test_strategies_take_turns_however_their_order_changes() -> None:
    scheduler = make_scheduler()
    turns = [scheduler._next_strategy(order) for order in (STRATEGIES[:3], STRATEGIES[2::-1], STRATEGIES[1:3] * 2)]
    assert set(map(repr, turns)) == set(map(repr, STRATEGIES[:3]))


def test_generated_tokens_of_a_reproducible_request_are_decoded_again() -> None:
    """Chunks would round otherwise."""
    member = sequence("a", 20)
    member.append(1, 0.0)
    member.append(1, 0.0)
    assert (member.in_chunks, len(member.page_keys())) == (21, 5)
    member.reproducible = True
    assert (member.in_chunks, len(member.page_keys())) == (20, 5)


def test_one_that_fits_passes_one_that_waits_for_pages_until_that_is_old() -> None:
    scheduler = make_scheduler(frames=8, patience=12)
    scheduler.add(sequence("runs", 14, new=17))
    run(scheduler, _next(scheduler))
    scheduler.add(big := sequence("big", 28, new=2))
    passed: list[int] = []
    for number in range(40):
        scheduler.add(small := sequence(f"small {number}", 2, new=1))
        run(scheduler, _next(scheduler))
        if big.handle is not None:
            break
        passed += [number] if small.started is not None or small in scheduler.running else []
    assert big.handle is not None
    assert passed
    assert max(passed) <= 12


def test_a_prompt_that_waits_for_pages_is_looked_up_again_only_when_pages_came_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make_scheduler(frames=8)
    scheduler.add(running := sequence("runs", 14, new=8))
    run(scheduler, _next(scheduler))
    scheduler.add(big := sequence("big", 28))
    lookups: list[int] = []
    match = scheduler._cache.prefix.match
    monkeypatch.setattr(scheduler._cache.prefix, "match", lambda keys: lookups.append(len(keys)) or match(keys))
    while running.num_generated < 8:
        assert len(lookups) <= 1
        run(scheduler, _next(scheduler))
    run(scheduler, _next(scheduler))
    assert (len(lookups), big.handle is not None) == (2, True)


@settings(deadline=None, max_examples=60)
@given(prompts, st.integers(0, 40), st.integers(1, 60), st.integers(1, 12), st.sampled_from(STRATEGIES))
def test_nobody_waits_longer_than_for_the_work_before_it(
    rows: list[tuple[int, int, int, Strategy]], patience: int, prompt: int, new: int, strategy: Strategy
) -> None:
    """However many requests of a higher priority follow, without an end.

    Once it is old, a request starts within the steps that those before it need, one after the other: each step may be
    another phase's and another strategy's turn.
    """
    scheduler = make_scheduler(patience=patience)
    for index, (length, count, priority, other) in enumerate(rows):
        scheduler.add(sequence(str(index), length, count, other, priority))
    scheduler.add(last := sequence("last", prompt, new, strategy, priority=9))
    before, bound = rows[:], 0
    for step in range(100_000):
        while len(scheduler.waiting) < 3:
            before.append((1 + step % 60, 1 + step % 12, 0, STRATEGIES[step % 4]))
            length, count, _, other = before[-1]
            scheduler.add(sequence(f"more {len(before)}", length, count, other, priority=-9))
        run(scheduler, _next(scheduler))
        if step == patience:
            ahead = [*scheduler.running, *(each for each in scheduler.waiting if each.serial < last.serial)]
            work = sum(-(-each.prompt_len // CHUNK) + 2 * each.max_new_tokens for each in ahead)
            bound = step + 2 * len(STRATEGIES) * work + 2
        if last.started is not None:
            break
        assert step <= patience or step < bound
    own = -(-prompt // CHUNK) + 2 * new
    for _ in range(2 * len(STRATEGIES) * (own + work_of(scheduler))):
        if last.num_generated == new:
            return
        scheduler.add(sequence(f"more {len(before)}", 3, 2, priority=-9))
        run(scheduler, _next(scheduler))
    raise AssertionError("it never finished")


def work_of(scheduler: Scheduler) -> int:
    """Steps that the running requests may need, one after the other."""
    return sum(-(-each.prompt_len // CHUNK) + 2 * each.max_new_tokens for each in scheduler.running)


def test_a_prefix_is_shared_in_whole_rows_and_never_the_whole_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.add(first := sequence("first", 32, new=1, salt="same"))
    while first.num_generated < 1:
        run(scheduler, _next(scheduler))
    scheduler.add(again := sequence("again", 32, new=1, salt="same"))
    scheduler.add(other := sequence("other", 32, new=1, salt="different"))
    while again.num_generated < 1 or other.num_generated < 1:
        run(scheduler, _next(scheduler))
    assert (first.cached, again.cached, other.cached) == (0, 24, 0)


@pytest.mark.parametrize(
    ("first", "again", "rows", "cached"),
    [
        (60, 60, 0, 48),
        (48, 60, 0, 48),
        (48, 60, 1, 32),
        (60, 48, 0, 32),  # its last token has to run
        (60, 50, 0, 48),
        (60, 50, 1, 32),
        (60, 40, 1, 32),
        (60, 40, 2, 16),
        (60, 5, 9, 0),
    ],
)
def test_a_sparse_prompt_shares_whole_chunks_before_its_end(first: int, again: int, rows: int, cached: int) -> None:
    scheduler, sparse = make_scheduler(), make("ashape", dense_below=0, last_rows_dense=rows)
    for name, length in (("first", first), ("again", again)):
        scheduler.add(member := sequence(name, length, 4, sparse, salt="same"))
        while member.num_generated < 4:
            run(scheduler, _next(scheduler))
    assert member.cached == cached


def test_strategies_decode_in_turns() -> None:
    scheduler = make_scheduler()
    members = [sequence("a", 3, 9), sequence("b", 3, 9, make("streaming")), sequence("c", 3, 9)]
    for member in members:
        scheduler.add(member)
    while not all(member.phase is Phase.DECODE for member in members):
        run(scheduler, _next(scheduler))
    names = []
    for _ in range(4):
        batch = _next(scheduler)
        names.append("".join(member.request.request_id for member in batch.sequences))
        run(scheduler, batch)
    assert sorted(names[:2]) == ["ac", "b"]
    assert names[:2] == names[2:]


def test_strategies_decode_in_turns_while_a_prompt_is_prefilled() -> None:
    scheduler = make_scheduler()
    members = [sequence("a", 3, 40), sequence("b", 3, 40, make("streaming"))]
    for member in members:
        scheduler.add(member)
    while not all(member.phase is Phase.DECODE for member in members):
        run(scheduler, _next(scheduler))
    scheduler.add(sequence("long", 60))
    before = [member.num_generated for member in members]
    for _ in range(8):
        run(scheduler, _next(scheduler))
    assert [member.num_generated - start for member, start in zip(members, before, strict=True)] == [2, 2]


def _next(scheduler: Scheduler) -> Batch:
    batch = scheduler.next_batch()
    assert batch is not None
    check(batch)
    return batch
