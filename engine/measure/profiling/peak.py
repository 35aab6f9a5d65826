"""Peak memory of one cell."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from ...model.cpu.heap import release_heap

PROCESS = Path("/proc/self")


class PeakMemory:
    """Peak memory since construction: the sum over CUDA devices, otherwise resident memory of the process.

    `scope` is `cell`, or `process` on systems that cannot reset the peak of a process.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._gpus = [device for device in devices if device.type == "cuda"]
        self.scope = "cell"
        for device in self._gpus:
            torch.cuda.reset_peak_memory_stats(device)
        if not self._gpus and not _reset():
            self.scope = "process"

    def bytes(self) -> int:
        if self._gpus:
            return sum(torch.cuda.max_memory_allocated(device) for device in self._gpus)
        return _high_water() if self.scope == "cell" else _ever()


def _reset() -> bool:
    """Reset the peak of this process (Linux: write 5 to clear_refs); returns True if that worked."""
    release_heap()  # memory freed before must not count
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")
        return (PROCESS / "status").exists()
    return False


def _high_water() -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return _ever()


def _ever() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
