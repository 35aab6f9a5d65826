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
    """The most memory in use since the start: the devices' in sum on CUDA, else that of the process.

    `scope` tells what it is the peak of: `cell`, since the start; `process`, ever, where the system cannot begin anew.
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
    """Whether Linux has forgotten the process' peak: 5 is its word for that."""
    release_heap()  # what was freed before is no part of what comes
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
