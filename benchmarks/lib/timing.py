"""Timing: medians of undisturbed runs, and metadata of the machine."""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
QUIET = 0.95
"""Least share of the cores' time that a run must have had; below it, something else was running."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the median of runs, and the CPU share of the least quiet run that counts."""

    seconds: float
    share: float

    @property
    def quiet(self) -> bool:
        return self.share >= QUIET


def measure(
    work: Callable[[], object],
    *,
    before: Callable[[], object] | None = None,
    runs: int = 5,
    least: float = 0.1,
    attempts: int = 40,
) -> Timing:
    """Time `work`, repeated within a run until it lasts `least` seconds; a disturbed run is done again.

    When `attempts` runs gave too few quiet ones, the quietest are taken, and the timing is not `quiet`.

    Args:
        before: called before each call and not timed, with all threads; its share of the cores decides whether a run
            was quiet, for work that does not keep all threads busy itself.
    """
    run = _run if before is None else functools.partial(_run_after, before)
    work()
    calls = max(1, round(least / max(run(work, 1)[0], 1e-9)))
    timings: list[tuple[float, float]] = []
    while len(timings) < attempts and sum(share >= QUIET for _, share in timings) < runs:
        timings.append(run(work, calls))
    best = sorted(timings, key=lambda timing: -timing[1])[:runs]
    quiet = [timing for timing in timings if timing[1] >= QUIET][:runs]
    chosen = quiet if len(quiet) == runs else best
    return Timing(statistics.median(seconds for seconds, _ in chosen), min(share for _, share in chosen))


def _run(work: Callable[[], object], calls: int) -> tuple[float, float]:
    """Seconds of a call, and the share of the cores' time that this process had."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / calls, cpu / (wall * torch.get_num_threads())


def _run_after(before: Callable[[], object], work: Callable[[], object], calls: int) -> tuple[float, float]:
    """Seconds of a call, and the share of the cores' time that this process had for `before`."""
    seconds, shares = [], []
    for _ in range(calls):
        shares.append(_run(before, 1)[1])
        seconds.append(_run(work, 1)[0])
    return statistics.fmean(seconds), statistics.fmean(shares)


def machine() -> dict[str, object]:
    """Date, processor, threads and versions, to print with every table."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def keeping(rows: Iterable[Row], into: list[Row]) -> Iterator[Row]:
    """The rows, each also appended to a list."""
    for row in rows:
        into.append(row)
        yield row


def show(about: dict[str, object], rows: Iterable[Row], *, as_json: bool) -> None:
    """Print the machine, then each row as soon as it is measured; or all of it as one JSON object."""
    if as_json:
        print(json.dumps({"machine": about, "rows": list(rows)}))
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    for i, row in enumerate(rows):
        if i == 0:
            print(" | ".join(f"{name:>12}" for name in row))
        print(" | ".join(f"{f'{x:.3f}' if isinstance(x, float) else x!s:>12}" for x in row.values()), flush=True)
