"""Recording work as a CUDA graph, and finding work that waits for the device and cannot be recorded."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
Record = Callable[[Callable[[], T]], tuple[T, Callable[[], None]]]
"""Runs some work; what it gave, and how to have the same kernels run again over the same memory."""


class WaitsForDevice(RuntimeError):
    """Work waits for the device somewhere, so that it cannot be recorded; nothing was."""


class CudaRecorder:
    """Records work as CUDA graphs of one device, which share one pool of memory: no two of them run at once.

    A recording that fails may leave memory of its pool with the allocator until the process ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs = weakref.WeakSet[torch.cuda.CUDAGraph]()
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # libraries keep room for each

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Runs it twice outside of the graph as well: first kernels are compiled and libraries make their room there.

        Raises:
            WaitsForDevice: the work cannot be recorded. Better found here: after a wait inside of a recording torch's
                allocator would go on as if that had not ended.
            RuntimeError: it could not be recorded for another reason, or ran elsewhere than on the recorded stream.
        """
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                try:
                    work()
                    never_waiting(work)
                finally:  # what has begun may still read memory that its caller gives up
                    current.wait_stream(self._stream)
            return self._capture(work)

    def _capture(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        if not self._graphs:  # a pool ends with the last of its graphs
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()), warnings.catch_warnings():  # a failure leaves its stream
            warnings.filterwarnings("error", message=".*graph is empty.*")
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        self._graphs.add(graph)
        return result, graph.replay


ALLOWED = "masking_utils.py"
"""transformers asks there whether positions are packed, which waits; it does not while a graph is recorded."""
WAITED = "called a synchronizing CUDA operation"


def never_waiting(work: Callable[[], object]) -> None:
    """Raises `WaitsForDevice` once the work is done, naming the places at which it has waited for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # the mode itself is worth a warning to torch
        try:
            torch.cuda.set_sync_debug_mode("warn")
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found = [(Path(each.filename).name, each.lineno) for each in caught if WAITED in str(each.message)]
    if places := sorted({f"{name}:{line}" for name, line in found if name != ALLOWED}):
        raise WaitsForDevice(f"the host waits for the device in {', '.join(places)}")
