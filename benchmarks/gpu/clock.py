"""Timing by events on a GPU and by `measure` on a CPU; bandwidth of memory copies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from keysift.engine.execution.recorder import CudaRecorder

from ..lib.timing import measure

Work = Callable[[], object]
WARM = 3
"""Calls before the clock counts: they compile kernels and fill the allocator's pools."""
LEAST, MOST = 0.05, 200
"""Seconds that a run should last, and the most calls that it takes for that."""


@dataclass(frozen=True)
class Clock:
    """Medians of `runs` runs on one device."""

    device: torch.device
    runs: int
    brief: bool = False
    """Works with little memory, and takes any run."""

    def seconds(self, work: Work, *, cold: bool = False) -> float:
        """Seconds of one call; `cold`: caches are evicted before each call, which is not timed."""
        if self.device.type != "cuda":
            patience = {"least": 0.0, "attempts": self.runs} if self.brief else {"least": LEAST}
            return measure(work, before=self._evict if cold else None, runs=self.runs, **patience).seconds  # type: ignore[arg-type]
        for _ in range(WARM):
            work()
        once = self._run(work, 1, cold)
        calls = min(max(1, round(LEAST / once)), MOST)
        return statistics.median(self._run(work, calls, cold) for _ in range(self.runs))

    def captured(self, work: Work, *, cold: bool = False) -> float:
        """Seconds of one call that is recorded in a CUDA graph and replayed, without host time."""
        _, replay = CudaRecorder(self.device)(work)
        return self.seconds(replay, cold=cold)

    def single(self, work: Work) -> float:
        """Seconds of a single call that cannot be repeated."""
        self._evict()
        if self.device.type == "cuda":
            return self._run(work, 1, False)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def copy_rate(self) -> float:
        """GB/s of a copy within the device's memory, those read and those written."""
        source = torch.zeros(self._copied // 4, device=self.device)
        target = torch.empty_like(source)
        return gb_per_s(2 * self._copied, self.seconds(lambda: target.copy_(source)))

    def host_rate(self) -> float:
        """GB/s of a copy from pinned host memory to the device; on a CPU from memory to memory."""
        source = torch.zeros(self._copied // 8, pin_memory=self.device.type == "cuda")
        target = torch.empty_like(source, device=self.device)
        return gb_per_s(self._copied // 2, self.seconds(lambda: target.copy_(source, non_blocking=True)))

    @property
    def _copied(self) -> int:
        return 1 << 22 if self.brief else 1 << 30

    def _run(self, work: Work, calls: int, cold: bool) -> float:
        """Seconds of a call by events: around all calls, or, with cold caches, around each."""
        pairs = [(_event(), _event()) for _ in range(calls if cold else 1)]
        torch.cuda.synchronize(self.device)
        for start, end in pairs:
            if cold:
                self._evict()
            start.record()
            for _ in range(1 if cold else calls):
                work()
            end.record()
        torch.cuda.synchronize(self.device)
        each: list[float] = [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return statistics.median(each) / (1 if cold else calls)

    def _evict(self) -> object:
        return self._filler.zero_()

    @cached_property
    def _filler(self) -> Tensor:
        """More than the device's caches hold."""
        size = 1 << 20 if self.brief else 256 << 20
        if self.device.type == "cuda":
            size = max(size, 2 * torch.cuda.get_device_properties(self.device).L2_cache_size)
        return torch.empty(size // 4, device=self.device)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def gb_per_s(size: float, seconds: float) -> float:
    """Bandwidth in GB (10^9 bytes) per second."""
    return size / seconds / 1e9


def tflop_per_s(pairs: float, dim: int, seconds: float) -> float:
    """Rate of attention over (query, key) pairs of all query heads, with two products of `dim` for each pair."""
    return 4.0 * pairs * dim / seconds / 1e12


def causal_pairs(tokens: int) -> int:
    """Pairs of a query and a key that causality allows a prompt."""
    return tokens * (tokens + 1) // 2
