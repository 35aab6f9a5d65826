"""Load of other processes on the machine during a run."""

from __future__ import annotations

import math
import time
from contextlib import suppress

import psutil

from keysift.kvcache.native.cores import num_threads, usable

from ...memory.budget import CGROUP
from .drive import Run

QUIET = 0.95
"""Least share of its threads' time that an undisturbed run has; other processes have at most the rest of the cores."""


class Watch:
    """CPU time of other processes since construction."""

    def __init__(self) -> None:
        self._busy, self._own, self._wall = _busy(), _own(), time.perf_counter()

    def others(self) -> float:
        """Share of the usable cores' time that other processes have had."""
        ours = (time.perf_counter() - self._wall) * min(len(usable()), _quota())
        return max(0.0, (_busy() - self._busy - (_own() - self._own)) / ours)


def _quota() -> float:
    """Cores that the control group of this process may use; infinite without a limit."""
    try:
        limit, period = (CGROUP / "cpu.max").read_text().split()
    except OSError:
        return math.inf
    return math.inf if limit == "max" else int(limit) / int(period)


def _busy() -> float:
    """CPU seconds of all processes on the usable cores; under a quota, of those that share it, on any core."""
    if _quota() < len(cores := usable()):
        lines = (CGROUP / "cpu.stat").read_text().splitlines()
        return 1e-6 * int(next(line for line in lines if line.startswith("usage_usec")).split()[1])
    times = psutil.cpu_times(percpu=True)
    return float(sum(spent.user + spent.nice + spent.system for core, spent in enumerate(times) if core in cores))


def _own() -> float:
    """CPU seconds of this process and of its children, which are ranks of its group."""
    spent = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # the child has ended
            times = child.cpu_times()
            spent += float(times.user + times.system)
    return spent


def cpu_share(run: Run) -> float:
    """CPU time of this process divided by wall time x threads, over the prefill steps."""
    prefill = [step for step in run.steps if step.phase == "prefill"]
    wall = sum(step.seconds for step in prefill)
    return sum(step.cpu_seconds for step in prefill) / (wall * num_threads())


def disturbed(share: float, others: float, *, on_cpu: bool) -> bool:
    """True if other processes had too much of the machine; the share of threads counts on a CPU only."""
    return others > 1 - QUIET or (on_cpu and share < QUIET)
