"""Whether the machine was ours during a run."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil

from keysift.attention.native.cores import num_threads

from .drive import Run

QUIET = 0.95
"""Least share of its threads' time that a run must have had, and of the cores' time that nobody else may have had."""


class Watch:
    """Started before a run; asked after it."""

    def __init__(self) -> None:
        self._busy, self._own, self._wall = _busy(), _own(), time.perf_counter()

    def others(self) -> float:
        """Share of the machine's cores that other processes have had since the start."""
        cores = (time.perf_counter() - self._wall) * (psutil.cpu_count() or 1)
        return max(0.0, (_busy() - self._busy - (_own() - self._own)) / cores)


def _busy() -> float:
    """CPU seconds that all processes of the machine have used."""
    spent = psutil.cpu_times()
    return float(spent.user + spent.nice + spent.system)


def _own() -> float:
    """Those of this process and of the ranks of its team, which are its children."""
    spent = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            times = child.cpu_times()
            spent += float(times.user + times.system)
    return spent


def cpu_share(run: Run) -> float:
    """CPU time of this process against wall time x threads, over the steps of the prompts."""
    prefill = [step for step in run.steps if step.phase == "prefill"]
    wall = sum(step.seconds for step in prefill)
    return sum(step.cpu_seconds for step in prefill) / (wall * num_threads())


def disturbed(share: float, others: float, *, on_cpu: bool) -> bool:
    """The share of the threads' time tells nothing where an accelerator computes."""
    return others > 1 - QUIET or (on_cpu and share < QUIET)
