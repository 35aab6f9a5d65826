"""Exclusive time of the parts of a step."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from keysift.attention import PARTS, Part, Stretch


def _nothing() -> None:
    pass


class Clock:
    """`Spans` that sum exclusive seconds by phase and part: the time of an inner span does not count for the outer one.

    Time outside every span is `other`, so the parts of a step sum to its time. On an accelerator `settle` waits for it
    at every border, which slows the step down: a pass under a clock measures shares, not latencies.
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
        """Time one step of the engine; `book` then assigns it to a phase."""
        self._settle()
        self._step, self._part, self._since = defaultdict(float), "other", self._now()
        try:
            yield
        finally:
            self._turn_to("other")

    def book(self, phase: Stretch) -> None:
        """Add the last step to this phase."""
        self.steps[phase] += 1
        for part, seconds in self._step.items():
            self.seconds[phase][part] += seconds

    def shares(self) -> dict[Stretch, dict[Part, float]]:
        """Seconds of each part: the sum over all prefill steps, and the mean of a decode step."""
        each: dict[Stretch, int] = {"prefill": 1, "decode": max(self.steps["decode"], 1)}
        return {phase: {part: spent[part] / each[phase] for part in PARTS} for phase, spent in self.seconds.items()}

    def _turn_to(self, part: Part) -> Part:
        """Assign time to this part from now on; returns the previous part."""
        self._settle()
        now = self._now()
        self._step[self._part] += now - self._since
        before, self._part, self._since = self._part, part, now
        return before
