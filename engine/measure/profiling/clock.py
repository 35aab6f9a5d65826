"""Sums up where steps spend their time."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from keysift.attention import PARTS, Part, Stretch


def _nothing() -> None:
    pass


class Clock:
    """`Spans` that sum exclusive seconds by phase and part: what an inner span takes is not the outer one's.

    Whatever of a step no span claims is `other`, so the parts of a step sum to its time. On an accelerator `settle`
    waits for it at every border, which slows the step down: a pass under a clock tells shares, not latencies.
    """

    def __init__(self, settle: Callable[[], None] = _nothing, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[Stretch, dict[Part, float]] = {"prefill": defaultdict(float), "decode": defaultdict(float)}
        self.steps: Counter[Stretch] = Counter()
        self._settle, self._now = settle, now
        self._step: dict[Part, float] = defaultdict(float)
        self._part: Part = "other"
        self._since = 0.0

    @contextmanager
    def __call__(self, name: Part | Stretch, layer: int | None = None) -> Iterator[None]:
        before = self._turn_to("other" if name == "prefill" or name == "decode" else name)
        try:
            yield
        finally:
            self._turn_to(before)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A whole step of the engine; the phase that it turned out to be of is booked by `book`."""
        self._settle()
        self._step, self._part, self._since = defaultdict(float), "other", self._now()
        try:
            yield
        finally:
            self._turn_to("other")

    def book(self, phase: Stretch) -> None:
        """Put the last step down to this phase."""
        self.steps[phase] += 1
        for part, seconds in self._step.items():
            self.seconds[phase][part] += seconds

    def shares(self) -> dict[Stretch, dict[Part, float]]:
        """Seconds of each part: those of all prefill steps together, and those of one decode step, a mean."""
        each: dict[Stretch, int] = {"prefill": 1, "decode": max(self.steps["decode"], 1)}
        return {phase: {part: spent[part] / each[phase] for part in PARTS} for phase, spent in self.seconds.items()}

    def _turn_to(self, part: Part) -> Part:
        """From now on time is this part's; returns whose it was."""
        self._settle()
        now = self._now()
        self._step[self._part] += now - self._since
        before, self._part, self._since = self._part, part, now
        return before
