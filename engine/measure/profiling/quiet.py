"""Whether the machine was ours during a run."""

from __future__ import annotations

import math
import time
from contextlib import suppress

import psutil

from keysift.kvcache.native.cores import num_threads, usable

from ...memory.budget import CGROUP
from .drive import Run

QUIET = 0.95
"""Least share of its threads' time that a run must have had, and of the cores' time that nobody else may have had."""


class Watch:
    """Started before a run; asked after it."""

    def __init__(self) -> None:
        self._busy, self._own, self._wall = _busy(), _own(), time.perf_counter()

    def others(self) -> float:
        """Share that other processes have had since the start of the cores that this one may use."""
        ours = (time.perf_counter() - self._wall) * min(len(usable()), _quota())
        return max(0.0, (_busy() - self._busy - (_own() - self._own)) / ours)


def _quota() -> float:
    """As many cores' time the control group of this process may use; infinite where it has no limit."""
    try:
        limit, period = (CGROUP / "cpu.max").read_text().split()
    except OSError:
        return math.inf
    return math.inf if limit == "max" else int(limit) / int(period)


def _busy() -> float:
    """CPU seconds that all processes have used on these cores; under a quota those that share it, wherever they ran."""
    if _quota() < len(cores := usable()):
        lines = (CGROUP / "cpu.stat").read_text().splitlines()
        return 1e-6 * int(next(line for line in lines if line.startswith("usage_usec")).split()[1])
    times = psutil.cpu_times(percpu=True)
    return float(sum(spent.user + spent.nice + spent.system for core, spent in enumerate(times) if core in cores))


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
