"""Random schedules of the real engine over a made-up model: no page lost, no answer changed, nobody waits for ever."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from random import Random

import pytest

from keysift.attention import registry
from keysift.engine import Finish, FinishReason, Output, Request, SamplingParams, TokenOutput, metrics
from keysift.engine.job import Job
from keysift.engine.scheduling import failures
from keysift.engine.scheduling.batch import Batch
from keysift.engine.scheduling.sequence import Sequence as Live
from keysift.kvcache import OffloadError
from tests.attack.audit import audit, audit_end
from tests.attack.fake import CHUNK, FIRST, MAX_LEN, SPEC, FakeEngine, Stumbling, alone
from tests.attack.plans import BASES, Fault, Plan, Wish, plan_of, request_of

SCHEDULES = int(os.environ.get("KEYSIFT_ATTACK_SCHEDULES", "300"))
SHARD = 100
"""Schedules of one test."""
INJECTED = "injected"


@cache
def preparing(reproducible: bool, prefix_cache: bool) -> FakeEngine:
    """An engine with room for everything, which prepares requests for others."""
    return FakeEngine(MAX_LEN, reproducible=reproducible, prefix_cache=prefix_cache)


@pytest.fixture(scope="module", autouse=True)
def _stumbling() -> Iterator[None]:
    """A strategy that fails on demand, and neither logs nor metrics, which would take much of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BUILT_IN, "stumbling", "tests.attack.fake:Stumbling")
        patch.setattr(failures.logger, "disabled", True)
        for observe in ("observe_status", "observe_finish"):
            patch.setattr(metrics, observe, lambda *_: None)
        yield


@pytest.mark.parametrize("shard", range(-(-SCHEDULES // SHARD)))
def test_random_schedules(shard: int) -> None:
    for number in range(shard * SHARD, (shard + 1) * SHARD):
        plan = plan_of(Random(number))
        if failure_in(plan) is not None:
            plan = smallest(plan)
            raise AssertionError(f"schedule {number} fails, and so does {plan}") from failure_in(plan)


def failure_in(plan: Plan) -> Exception | None:
    try:
        Schedule(plan).play()
    except Exception as error:
        return error
    return None


def smallest(plan: Plan) -> Plan:
    """A plan that fails, too, and of which no request or fault can be left out."""
    fewer = [replace(plan, wishes=plan.wishes[:i] + plan.wishes[i + 1 :]) for i in range(len(plan.wishes))]
    fewer += [replace(plan, faults=plan.faults[:i] + plan.faults[i + 1 :]) for i in range(len(plan.faults))]
    failing = next((each for each in fewer if each.wishes and failure_in(each) is not None), None)
    return plan if failing is None else smallest(failing)


@dataclass
class Fate:
    """What became of one request."""

    job: Job
    expected: list[int]
    wish: Wish
    added: int = 0
    old: int = 0
    ahead: set[str] = field(default_factory=set)
    """Requests that may run before it once it is old."""
    said: list[int] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def live(self) -> Live:
        return self.job.sequence

    @cached_property
    def work(self) -> int:
        """Steps of its own, computed once from the start."""
        return -(-(self.live.prompt_len + self.live.max_new_tokens) // CHUNK) + self.live.max_new_tokens


class Schedule:
    """One plan as it is carried out."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.fates: dict[str, Fate] = {}
        fates = self._prepare()
        longest = max(SPEC.pages_for(each.live.prompt_len + each.live.max_new_tokens) for each in fates)
        names = ("max_num_seqs", "patience", "reproducible", "prefix_cache")
        self.engine = FakeEngine(longest + plan.room, **{name: getattr(plan, name) for name in names})
        self.engine.hashing.fault = self._fault
        self.engine.tier.fault = self._claim_fault
        self._step = 0
        self._pending = fates[::-1]
        self._victim: str | None = None
        self._crowd: set[str] = set()

    def play(self) -> None:
        due = 1
        while self._pending or any(fate.finish is None for fate in self.fates.values()):
            self._step += 1
            while self._pending and self._step >= due:
                self._add()
                due = self._step + self._pending[-1].wish.gap if self._pending else 0
            self._flood()
            self._abort()
            for output in self._run():
                self._note(output)
            self._victim = None
            audit(self.engine)
            self._check_waits()
        for fate in self.fates.values():
            check_answer(fate)
        for name in self._crowd:
            self.engine.abort(name)
        self.engine.step()
        audit_end(self.engine)

    def _run(self) -> list[Output]:
        Stumbling.armed = any(fault.kind == "strategy" for fault in self._faults())
        try:
            return self.engine.step()
        finally:
            Stumbling.armed = False

    def _prepare(self) -> list[Fate]:
        """All requests with their answers; a follower's prompt begins with the prompt and the answer of another."""
        made: list[Fate] = []
        for number, wish in enumerate(self.plan.wishes):
            before = tuple(BASES[wish.base][: wish.shared])
            if 0 < wish.follows <= number:
                first = made[-wish.follows]
                before = (*first.live.request.prompt, *first.expected)
            own = (FIRST + (number * 31 + each) % 99 for each in range(wish.own))
            request = request_of(number, wish, (*before, *own)[: MAX_LEN - wish.new - 1])
            job = preparing(self.plan.reproducible, self.plan.prefix_cache).prepare(request)
            made.append(Fate(job, alone(job.sequence), wish))
        return made

    def _add(self) -> None:
        fate = self._pending.pop()
        self.engine.add(fate.job)
        fate.added = self._step
        self.fates[fate.job.request_id] = fate

    def _flood(self) -> None:
        while self.plan.flood and len(self.engine.scheduler.waiting) < 3:
            self._crowd.add(name := f"more {len(self._crowd)}")
            params = SamplingParams(max_new_tokens=1 + len(self._crowd) % 4)
            self.engine.add(Request(name, tuple(BASES[0][:7]), params, priority=-1, arrival=float(self._step + 99)))

    def _abort(self) -> None:
        for name, fate in self.fates.items():
            if fate.wish.abort and fate.finish is None and self._step == fate.added + fate.wish.abort:
                assert self.engine.abort(name)

    def _note(self, output: Output) -> None:
        if output.request_id in self._crowd:
            return
        fate = self.fates[output.request_id]
        assert fate.finish is None, "an output after the end"
        if isinstance(output, TokenOutput):
            fate.said += output.token_ids
        if isinstance(output, Finish):
            fate.finish = output
            if output.reason is FinishReason.ERROR:
                assert INJECTED in output.error or "ValueError" in output.error
                assert self._faults(), "an error that nobody injected"

    def _faults(self) -> list[Fault]:
        return [fault for fault in self.plan.faults if fault.step == self._step]

    def _claim_fault(self) -> None:
        if any(fault.kind == "claim" for fault in self._faults()):
            raise OffloadError(INJECTED, exhausted=True)

    def _fault(self, batch: Batch) -> None:
        """A step fails after half of its work; alone, only the victim fails again."""
        for fault in self._faults():
            if fault.kind in ("claim", "strategy"):
                continue
            victim = batch.sequences[fault.place % len(batch.sequences)]
            if self._victim is None:
                self._victim = victim.request.request_id if fault.kind != "together" else ""
                for live, span in zip(batch.sequences, batch.spans, strict=True):
                    self.engine.hashing.spoil(live, span.start)
                raise ValueError(INJECTED)
            if self._victim == victim.request.request_id and len(batch.sequences) == 1:
                lost = fault.kind == "lost"
                self.engine.hashing.spoil(victim, 0 if lost else batch.spans[0].start)
                raise OffloadError(INJECTED) if lost else ValueError(INJECTED)

    def _check_waits(self) -> None:
        """Once it is old, a request waits for no more than those that run, and those that came before it.

        Each of them may have to start again for each that came before it. One of them, the first in order, comes one
        step further with every turn of a phase, of the shortest prompt, and of all strategies.
        """
        turns = 2 * max(2, self.engine.config.max_num_seqs)
        for name, fate in self.fates.items():
            if fate.finish is not None:
                continue
            age = self._step - fate.added
            if age <= self.engine.config.patience:
                continue
            if not fate.ahead:
                fate.ahead = {each.request.request_id for each in self.engine.scheduler.running} | {name}
                fate.ahead -= self._crowd
                fate.old = self._step
            earlier = {
                other
                for other, each in self.fates.items()
                if each.finish is None and each.live.request.arrival <= fate.live.request.arrival
            }
            fate.ahead |= earlier
            crowd = 5 * self.engine.config.max_num_seqs  # those of the crowd that run
            most = turns * 2 * (crowd + sum(self.fates[other].work for other in fate.ahead))
            assert self._step - fate.old <= most, f"{name} waits {age} steps"


def check_answer(fate: Fate) -> None:
    finish = fate.finish
    assert finish is not None, "it never ended"
    if finish.reason in (FinishReason.LENGTH, FinishReason.STOP):
        assert fate.said == fate.expected
        return
    assert fate.said == fate.expected[: len(fate.said)]
    assert finish.reason is FinishReason.ERROR or fate.wish.abort
