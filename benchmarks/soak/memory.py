"""Memory, threads and files of a process over time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory, threads and files of a process at a moment, in seconds from the start of the load; sizes in MiB."""

    at: float
    rss: float
    anonymous: float
    """Part of `rss` that no file backs; 0 where the system does not tell."""
    threads: int
    files: int


def sample(pid: int, at: float) -> Sample:
    """Raises `psutil.NoSuchProcess` once the process has ended."""
    process = psutil.Process(pid)
    with process.oneshot():
        rss = process.memory_info().rss / MIB
        return Sample(at, rss, _anonymous(pid), process.num_threads(), process.num_fds())


def _anonymous(pid: int) -> float:
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)
