"""Runs of a batch of requests, with the time of every step and token."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from keysift.attention import Stretch

from ...engine import Engine
from ...errors import KeysiftError
from ...request import Finish, FinishReason, Output, PrefillProgress, Request, TokenOutput
from .clock import Clock


@dataclass(frozen=True, slots=True)
class Stepped:
    """One step of the engine."""

    phase: Stretch
    seconds: float
    cpu_seconds: float
    """CPU time of all threads of this process."""
    outputs: list[Output]


@dataclass(frozen=True, slots=True)
class Run:
    """A batch of requests that were added at the same time, from which seconds count."""

    steps: list[Stepped]
    duration: float
    times: list[list[float]]
    """Arrival time of each request's tokens."""
    finishes: list[Finish]

    @property
    def ttfts(self) -> list[float]:
        return [times[0] for times in self.times]

    @property
    def itls(self) -> list[list[float]]:
        """Gaps between each request's tokens."""
        return [[later - earlier for earlier, later in pairwise(times)] for times in self.times]

    @property
    def tpots(self) -> list[float]:
        """Time per output token of each request: (end - first token) / (tokens - 1)."""
        return [(times[-1] - times[0]) / (len(times) - 1) for times in self.times]

    @property
    def e2els(self) -> list[float]:
        return [times[-1] for times in self.times]

    def seconds(self, phase: Stretch) -> list[float]:
        """Duration of each step of a phase."""
        return [step.seconds for step in self.steps if step.phase == phase]


@dataclass(slots=True)
class _Collected:
    """Token times and finishes by request id."""

    times: dict[str, list[float]] = field(default_factory=dict)
    finishes: dict[str, Finish] = field(default_factory=dict)

    def take(self, outputs: list[Output], now: float) -> None:
        for output in outputs:
            if isinstance(output, TokenOutput):
                self.times.setdefault(output.request_id, []).extend([now] * len(output.token_ids))
            elif isinstance(output, Finish):
                self.finishes[output.request_id] = output


def run(engine: Engine, requests: list[Request], clock: Clock | None = None) -> Run:
    """Run requests to their ends, on an engine without others; a clock, if given, measures the parts of their time.

    Raises `KeysiftError` if one of them does not reach its length; none of them is left in the engine.
    """
    collected, start, steps = _Collected(), time.perf_counter(), list[Stepped]()
    for request in requests:
        engine.add(request)
    try:
        for step in stepping(engine, clock):
            collected.take(step.outputs, time.perf_counter() - start)
            steps.append(step)
    finally:
        clear(engine, requests)
    duration, names = time.perf_counter() - start, [request.request_id for request in requests]
    for finish in (finishes := [collected.finishes[name] for name in names]):
        if finish.reason is not FinishReason.LENGTH:
            raise KeysiftError(finish.error or f"ended by {finish.reason.value} before its length")
    return Run(steps, duration, [collected.times[name] for name in names], finishes)


def stepping(engine: Engine, clock: Clock | None = None) -> Iterator[Stepped]:
    """Steps of the engine until it has no work."""
    while engine.has_work:
        yield _step(engine, clock)


def _step(engine: Engine, clock: Clock | None) -> Stepped:
    cpu, wall = time.process_time(), time.perf_counter()
    if clock is None:
        outputs = engine.step()
    else:
        with clock.step():
            outputs = engine.step()
    seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
    phase = phase_of(outputs)
    if clock is not None:
        clock.book(phase)
    return Stepped(phase, seconds, cpu, outputs)


def phase_of(outputs: list[Output]) -> Stretch:
    """Phase of a step: every chunk of a prompt reports its progress."""
    return "prefill" if any(isinstance(output, PrefillProgress) for output in outputs) else "decode"


def clear(engine: Engine, requests: list[Request]) -> None:
    """Abort those requests that still run."""
    for request in requests:
        engine.abort(request.request_id)
    while engine.has_work:
        engine.step()
