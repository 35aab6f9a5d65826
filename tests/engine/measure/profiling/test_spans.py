"""Where the time of a step goes: every second of it to exactly one part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NoReturn

import pytest

from keysift.attention import PARTS, untraced
from keysift.engine import Request
from keysift.engine.measure.profiling.clock import Clock
from keysift.engine.measure.profiling.drive import run
from keysift.kvcache import Frames, Selection, Step
from tests.engine.driver import Make, drain, greedy, said, tokens
from tests.engine.test_offload import ARGS, NOSA, PAIR, offloaded


class Ticks:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_inner_span_is_not_the_outer_ones() -> None:
    ticks, settled = Ticks(), []
    clock = Clock(lambda: settled.append(ticks.now), ticks)
    with clock.step():
        ticks.now += 1  # the scheduler
        with clock("decode"):
            ticks.now += 2
            with clock("linear"):
                ticks.now += 4
                with clock("attention", 0):
                    ticks.now += 8
                    with clock("transfer", 0):
                        ticks.now += 16
                    ticks.now += 32
                ticks.now += 64
            ticks.now += 128
        ticks.now += 256
    clock.book("decode")
    expected = {"other": 1 + 2 + 128 + 256, "linear": 4 + 64, "attention": 8 + 32, "transfer": 16}
    assert clock.shares()["decode"] == {part: expected.get(part, 0) for part in PARTS}
    assert set(clock.shares()["prefill"].values()) == {0}
    assert settled[-1] == ticks.now
    assert len(settled) == 2 + 2 * 4, "an accelerator is waited for at every border"


def test_shares_are_of_all_prompt_steps_and_of_one_token() -> None:
    ticks = Ticks()
    clock = Clock(now=ticks)
    for phase, seconds in (("prefill", 3), ("prefill", 5), ("decode", 1), ("decode", 2)):
        with clock.step(), clock("linear"):
            ticks.now += seconds
        clock.book(phase)  # type: ignore[arg-type]
    shares = clock.shares()
    assert (shares["prefill"]["linear"], shares["decode"]["linear"]) == (8, 1.5)


def test_a_span_that_fails_gives_the_time_back() -> None:
    ticks = Ticks()
    clock = Clock(now=ticks)
    with clock.step():
        with pytest.raises(ValueError, match="broken"), clock("linear"), clock("attention"):
            raise ValueError("broken")
        ticks.now += 1
    clock.book("prefill")
    assert clock.shares()["prefill"]["other"] == 1


@pytest.mark.parametrize(("strategy", "args"), [("dense", ()), (PAIR, ARGS), ("dense+nosa", NOSA)])
def test_the_parts_of_a_run_are_its_time_and_change_no_token(strategy: str, args: tuple[str, ...], make: Make) -> None:
    engine = make(strategy=strategy, strategy_args=args, prefix_cache=False)
    request = Request("one", tokens(400), greedy(12))
    engine.add(request)
    plain = said(drain(engine), "one")
    clock = Clock()
    with engine.watched(clock):
        done = run(engine, [request], clock)
    assert said([output for step in done.steps for output in step.outputs], "one") == plain
    for phase, each in (("prefill", 1), ("decode", 11)):
        seconds, spent = done.seconds(phase), clock.shares()[phase]  # type: ignore[arg-type,index]
        assert sum(seconds) / 2 < each * sum(spent.values()) <= sum(seconds), "the clock stands within the stop watch"
        assert all(spent[part] > 0 for part in PARTS)
    assert len(done.seconds("prefill")) == 7
    assert len(done.seconds("decode")) == 11


def test_spans_are_heard_only_while_somebody_listens(make: Make) -> None:
    engine, heard = make(), []
    tier = engine.cache.tier

    @contextmanager
    def hear(name: str, layer: int | None = None) -> Iterator[None]:
        heard.append((name, layer))
        yield

    def once() -> list[int]:
        engine.add(Request("one", tokens(30), greedy(2), bypass_prefix_cache=True))
        return said(drain(engine), "one")

    with engine.watched(hear):
        listened = once()
    count = len(heard)
    assert once() == listened
    assert len(heard) == count
    assert (engine.cache.tier, engine.runner.spans) == (tier, untraced)
    layers = [(name, layer) for layer in (0, 1) for name in ("index", "selection", "attention", "transfer", "other")]
    steps = [[(phase, None), ("linear", None), *layers, ("sampling", None)] for phase in ("prefill", "decode")]
    assert [span for span, _ in groupby(heard)] == [*steps[0], *steps[1]]


def test_a_step_that_fails_leaves_nobody_listening(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    tier = engine.cache.tier

    def fail(*arguments: object) -> NoReturn:
        raise RuntimeError("broken")

    engine.add(Request("one", tokens(30), greedy(2)))
    with monkeypatch.context() as patch:
        patch.setattr(tier, "parts", fail)
        with pytest.raises(RuntimeError, match="broken"), engine.watched(Clock()):
            engine.step()
    assert (engine.cache.tier, engine.runner.spans) == (tier, untraced)


def test_a_span_that_nobody_hears_costs_next_to_nothing() -> None:
    """At most two microseconds of processor time; a layer has four and takes hundreds of microseconds."""
    begun = time.process_time()
    for _ in range(10_000):
        with untraced("attention", 3):
            pass
    assert time.process_time() - begun < 0.02


def test_an_offloaded_cache_shows_its_transfers(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers that each wait for 2 ms before anything is computed."""
    engine, clock = offloaded(make, tmp_path, 0.5), Clock()
    tier = engine.cache.tier
    bring = tier.parts

    def slowly(layer: int, selection: Selection, step: Step) -> Iterator[tuple[Selection, Frames]]:
        time.sleep(0.002)
        yield from bring(layer, selection, step)

    monkeypatch.setattr(tier, "parts", slowly)
    with engine.watched(clock):
        done = run(engine, [Request("one", tokens(400), greedy(8))], clock)
    assert done.finishes[0].sparsity.kv_bytes_moved > 0
    assert clock.shares()["prefill"]["transfer"] >= 7 * 0.004
    assert clock.shares()["decode"]["transfer"] >= 0.004
