"""Failures end only their own request: the others give the same tokens as without, and no page is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from keysift.attention import Strategy
from keysift.attention.strategy import Positive, option
from keysift.engine import Engine, Finish, FinishReason, Output, Request, SamplingParams
from keysift.kvcache import OffloadError, OutOfFrames, Phase, Step
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens
from tests.engine.faults import KINDS, Act, Fault, check_said, holds, install

RETRIEVAL = ("dense_below=0", "sink=16", "window=32", "budget=32", "epsilon=0")
STRATEGIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("dense", ()),
    "streaming": ("streaming", ("sink=16", "window=32", "dense_below=0")),
    **{f"retrieval by {index}": ("retrieval", (*RETRIEVAL, f"index={index}")) for index in ("codes", "ivf")},
    "retrieval by graph": ("retrieval", (*RETRIEVAL, "index=graph", "wait=true")),
}
PROMPTS = {"a": tokens(100), "victim": tokens(90, 1), "c": tokens(130, 2)}


def requests(new: int = 12, strategy: str = "dense", **sampling: float) -> list[Request]:
    name, arguments = STRATEGIES[strategy]
    params = SamplingParams(max_new_tokens=new, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    return [Request(key, prompt, params, strategy=name, strategy_args=arguments) for key, prompt in PROMPTS.items()]


def outcome(engine: Engine, wanted: list[Request]) -> list[Output]:
    for each in wanted:
        engine.add(each)
    return drain(engine)


@pytest.fixture(scope="module")
def said_without() -> dict[tuple[int, str, float], dict[str, list[int]]]:
    """Tokens of three requests without faults, by number of tokens, strategy and temperature."""
    return {}


@pytest.fixture
def clean(make: Make, said_without: dict[tuple[int, str, float], dict[str, list[int]]]) -> Callable[..., Any]:
    def undisturbed(new: int = 12, strategy: str = "dense", temperature: float = 0.0) -> dict[str, list[int]]:
        key = (new, strategy, temperature)
        if key not in said_without:
            outputs = outcome(make(), requests(new, strategy, temperature=temperature))
            said_without[key] = {name: said(outputs, name) for name in PROMPTS}
        return said_without[key]

    return undisturbed


def victims_step(engine: Engine, phase: Phase, act: Act, count: int, fail: Callable[[], None]) -> Fault:
    """Fault from the `count`-th operation on that concerns the victim in a phase."""
    seen = 0

    def fault(now: Act, layer: int, step: Step) -> None:
        nonlocal seen
        if now == act and step.phase is phase and holds(engine, step, "victim"):
            seen += 1
            if seen >= count:
                fail()

    return fault


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ["write", "resident"])
@pytest.mark.parametrize("phase", list(Phase), ids=lambda phase: phase.value)
def test_only_the_one_that_fails_ends(make: Make, clean: Callable[..., Any], phase: Phase, act: Act, kind: str) -> None:
    engine = make()
    install(engine, victims_step(engine, phase, act, 4, KINDS[kind]))
    outputs = outcome(engine, requests())
    finish = finish_of(outputs, "victim")
    assert finish.reason is FinishReason.ERROR
    assert finish.exhausted == (kind != "store broken")
    assert {"store full": "4096 bytes", "store broken": "page 7", "memory of tensors": str(2**50)}.get(
        kind, "memory"
    ) in (finish.error)
    assert said(outputs, "victim") == clean()["victim"][: finish.usage.completion_tokens]
    assert finish.usage.completion_tokens < 12
    for other in ("a", "c"):
        assert said(outputs, other) == clean()[other]
        assert (finish_of(outputs, other).reason, finish_of(outputs, other).error) == (FinishReason.LENGTH, "")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_that_is_too_much_at_once_runs_one_by_one(make: Make, clean: Callable[..., Any], strategy: str) -> None:
    temperature = 1.0 if strategy == "dense" else 0.0
    wanted = requests(20, strategy, temperature=temperature)
    engine = make()
    failed = 0

    def fault(act: Act, layer: int, step: Step) -> None:
        nonlocal failed
        if layer == 1 and len(step.spans) > 1:
            failed += 1
            KINDS["memory of tensors" if failed % 2 else "store full"]()

    install(engine, fault)
    outputs = outcome(engine, wanted)
    assert failed > 10
    for each in wanted:
        assert said(outputs, each.request_id) == clean(20, strategy, temperature)[each.request_id]
        assert finish_of(outputs, each.request_id).reason is FinishReason.LENGTH


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_requests_of_a_failed_step_give_the_same_tokens(
    make: Make, clean: Callable[..., Any], strategy: str
) -> None:
    wanted = requests(20, strategy)
    engine = make()
    install(engine, victims_step(engine, Phase.DECODE, "resident", 20, KINDS["store broken"]))
    outputs = outcome(engine, wanted)
    assert finish_of(outputs, "victim").reason is FinishReason.ERROR
    assert [said(outputs, name) for name in "ac"] == [clean(20, strategy)[name] for name in "ac"]


def test_an_engine_that_cannot_run_a_token_is_broken(make: Make) -> None:
    engine = make()

    def fault(act: Act, layer: int, step: Step) -> None:
        raise RuntimeError("shapes do not match")

    install(engine, fault)
    engine.add(requests()[0])
    with pytest.raises(RuntimeError, match="shapes do not match"):
        engine.step()
    assert finish_of(drain(engine), "a").reason is FinishReason.ERROR


@pytest.mark.parametrize(("kind", "reused"), [("store full", 0), ("store broken", 0), ("memory", 64)])
def test_pages_of_a_failed_step_are_not_reused(make: Make, clean: Callable[..., Any], kind: str, reused: int) -> None:
    """A failed store may have lost earlier pages too; running out of memory corrupts nothing."""
    (wanted,) = requests()[1:2]
    engine = make()
    install(engine, victims_step(engine, Phase.PREFILL, "write", 3, KINDS[kind]))  # of two layers: the second chunk
    assert finish_of(outcome(engine, [wanted]), "victim").reason is FinishReason.ERROR
    assert len(engine.cache.prefix) == reused // 16
    install_nothing(engine)
    outputs = outcome(engine, [wanted])
    assert said(outputs, "victim") == clean()["victim"]
    assert finish_of(outputs, "victim").usage.cached_tokens == reused


def install_nothing(engine: Engine) -> None:
    """The same tier continues without faults."""
    engine.cache.tier.fault = lambda act, layer, step: None  # type: ignore[attr-defined]


def test_pages_that_were_shared_are_withdrawn_while_others_read_them(make: Make) -> None:
    engine = make()
    install(engine, victims_step(engine, Phase.DECODE, "resident", 6, KINDS["store broken"]))
    engine.add(Request("first", tokens(100), greedy(12)))
    outputs = [*engine.step(), *engine.step()]
    outputs += outcome(engine, [Request("victim", tokens(100), greedy(12))])
    assert finish_of(outputs, "victim").usage.cached_tokens == 64
    assert finish_of(outputs, "victim").reason is FinishReason.ERROR
    assert len(said(outputs, "first")) == 12
    install_nothing(engine)
    again = outcome(engine, [Request("again", tokens(100), greedy(12))])
    assert finish_of(again, "again").usage.cached_tokens == 0
    assert said(again, "again") == said(outputs, "first")


@pytest.mark.parametrize("kind", ["store full", "memory"])
@pytest.mark.parametrize("later", [False, True], ids=["at admission", "at the next page"])
def test_a_failed_allocation_ends_its_own_request(
    make: Make, clean: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str, later: bool
) -> None:
    engine = make()
    reserve = engine.cache.reserve

    def growing(sequence: int, count: int) -> None:
        """A store that cannot grow for the victim, whose prompt has 90 tokens."""
        if (count > 96 if later else count == 91) and asks(engine, sequence, count):
            KINDS[kind]()
        reserve(sequence, count)

    monkeypatch.setattr(engine.cache, "reserve", growing)
    outputs = outcome(engine, requests(30))
    finish = finish_of(outputs, "victim")
    assert (finish.reason, finish.exhausted) == (FinishReason.ERROR, True)
    assert finish.usage.completion_tokens == (7 if later else 0)
    assert [said(outputs, name) for name in "ac"] == [clean(30)[name] for name in "ac"]


def asks(engine: Engine, sequence: int, count: int) -> bool:
    running = {each.handle: each.request.request_id for each in engine.scheduler.running}
    return running.get(sequence, "victim" if count == 91 else "") == "victim"


def test_the_last_one_waiting_can_fail(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()

    def reserve(sequence: int, count: int) -> None:
        raise OffloadError("kv_offload: full", exhausted=True)

    monkeypatch.setattr(engine.cache, "reserve", reserve)
    outputs = outcome(engine, requests())
    assert [type(output) for output in outputs] == [Finish] * 3
    assert {output.error for output in outputs if isinstance(output, Finish)} == {"kv_offload: full"}


@pytest.mark.parametrize("seed", range(2))
def test_soak(make: Make, seed: int) -> None:
    """Any operation may fail at any time, while pages are short: requests without a fault give the same tokens."""
    chance = random.Random(seed)
    wanted = [_any_request(chance, number) for number in range(14)]
    clean = outcome(make(max_num_seqs=8), wanted)
    engine = make(max_num_seqs=8, kv_memory=70 * make().status.page_bytes)
    faults = random.Random(seed + 100)

    def fault(act: Act, layer: int, step: Step) -> None:
        if faults.random() < 0.015:
            KINDS[faults.choice(list(KINDS))]()

    install(engine, fault)
    outputs = outcome(engine, wanted)
    check_said(outputs, clean, [each.request_id for each in wanted])


def _any_request(chance: random.Random, number: int) -> Request:
    name, arguments = STRATEGIES[chance.choice(list(STRATEGIES))]
    prompt = tokens(chance.randint(1, 150), chance.randint(0, 3))
    params = SamplingParams(
        max_new_tokens=chance.randint(1, 24), ignore_eos=True, temperature=chance.choice([0.0, 1.0])
    )
    return Request(str(number), prompt, params, strategy=name, strategy_args=arguments)


def test_too_few_frames_is_still_no_failure(make: Make) -> None:
    engine = make(kv_memory=14 * make().status.page_bytes, prefix_cache=False)
    outputs = outcome(engine, [Request(str(i), tokens(60, i), greedy(40)) for i in range(3)])
    assert engine.scheduler.preemptions > 0
    assert all(finish_of(outputs, str(i)).reason is FinishReason.LENGTH for i in range(3))
    with pytest.raises(OutOfFrames):
        engine.cache.allocator.take(15)


@pytest.mark.parametrize("error", [OutOfFrames("none left"), OffloadError("full", exhausted=True)], ids=repr)
def test_a_check_that_finds_no_room_leaves_no_sequence_open(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Each would take a place of those that may run, until none is left."""
    engine = make(max_num_seqs=2)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(engine.cache, "reserve", full)
    engine._check_health(ValueError("a bug of a strategy"))
    assert sorted(engine.cache._closed) == [0, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Odd(Strategy):
    """A plug-in that behaves until a context of some length."""

    window: Positive = option(4, "tokens that every query reads")

    def at(self, phase: Phase, context_len: int, queries: int) -> Strategy:
        return [] if context_len == 95 else self  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nameless(Strategy):
    """A plug-in whose name can be asked for once."""

    asked: ClassVar[list[int]] = []

    @property
    def name(self) -> str:
        self.asked.append(1)
        if len(self.asked) > 1:
            raise RuntimeError("no name")
        return "nameless"


@pytest.mark.parametrize("plugin", [Odd(), Nameless()], ids=["no strategy", "no name"])
def test_a_plug_in_that_fails_later_ends_no_other_request(
    make: Make, clean: Callable[..., Any], plugin: Strategy
) -> None:
    engine = make()
    Nameless.asked.clear()
    wanted = requests()
    engine.preparation.default = plugin
    victim = engine.prepare(Request("victim", PROMPTS["victim"], greedy(12)))
    engine.preparation.default = make().default
    for each in (wanted[0], victim, wanted[2]):
        engine.add(each)
    outputs = drain(engine)
    for other in ("a", "c"):
        assert said(outputs, other) == clean()[other]
    if isinstance(plugin, Odd):
        assert "strategy odd: at failed: TypeError" in finish_of(outputs, "victim").error
