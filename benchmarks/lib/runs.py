"""Runs of one request: token times, medians, and repetition until the rest of the machine was quiet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import psutil

from .timing import QUIET

ATTEMPTS = 6


class Run(NamedTuple):
    """Seconds from the start of a request to each of its tokens, the density of its prompt, and the tokens."""

    times: list[float]
    density: float
    tokens: list[int]


def summed(attempts: list[tuple[Run, float]]) -> dict[str, object]:
    """Medians of runs, and the largest share of the cores that other processes had."""
    return {
        "ttft_s": statistics.median(run.times[0] for run, _ in attempts),
        "tpot_ms": 1e3 * statistics.median(gap for run, _ in attempts for gap in gaps(run.times)),
        "others_share": max(share for _, share in attempts),
        "first_tokens": attempts[0][0].tokens[:8],
    }


def undisturbed(once: Callable[[], Run], cpu_seconds: Callable[[], float] = time.process_time) -> tuple[Run, float]:
    """One run while the rest of the machine was quiet, and the share of the cores that the rest had.

    The last of `ATTEMPTS` runs counts in any case.

    Args:
        cpu_seconds: CPU seconds that the run's own processes have used so far.
    """
    for _ in range(ATTEMPTS):
        busy, own, wall = busy_seconds(), cpu_seconds(), time.perf_counter()
        run = once()
        cores = (time.perf_counter() - wall) * (psutil.cpu_count() or 1)
        others = (busy_seconds() - busy - (cpu_seconds() - own)) / cores
        if others <= 1 - QUIET:
            break
    return run, others


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used."""
    spent = psutil.cpu_times()
    return float(spent.user + spent.nice + spent.system)


def gaps(times: list[float]) -> Iterator[float]:
    """Seconds between tokens that follow each other."""
    yield from (later - earlier for earlier, later in pairwise(times))
