"""Recording of work as a CUDA graph, and detection of work that waits for the device."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
Record = Callable[[Callable[[], T]], tuple[T, Callable[[], None]]]
"""Runs some work. Returns its result and a function that runs the same kernels again over the same memory."""


class WaitsForDevice(RuntimeError):
    """The work waits for the device, so it cannot be recorded; nothing was recorded."""


class CudaRecorder:
    """Records work as CUDA graphs of one device. They share one memory pool: no two of them run at once.

    A recording that fails may leave memory of its pool with the allocator until the process ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs = weakref.WeakSet[torch.cuda.CUDAGraph]()
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # libraries keep a workspace for each

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Run the work twice outside of the graph, which compiles kernels and allocates workspaces, then record it.

        Raises:
            WaitsForDevice: the work cannot be recorded. Detected before: after a wait inside of a recording torch's
                allocator would continue as if the recording had not ended.
            RuntimeError: recording failed for another reason, or the work ran on another stream than the recorded one.
        """
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                try:
                    work()
                    check_waits(work)
                finally:  # started kernels may still read memory that the caller frees
                    current.wait_stream(self._stream)
            return self._capture(work)

    def _capture(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        if not self._graphs:  # a pool is freed with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            warnings.catch_warnings(),
        ):  # a failure leaves its stream
            warnings.filterwarnings("error", message=".*graph is empty.*")
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        self._graphs.add(graph)
        return result, graph.replay


ALLOWED_FILE = "masking_utils.py"
"""transformers waits there to test for packed positions, but not while a graph is recorded."""
WAIT_WARNING = "called a synchronizing CUDA operation"


def check_waits(work: Callable[[], object]) -> None:
    """Run the work. Raises `WaitsForDevice` naming the lines at which it waited for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # torch warns about the mode itself too
        try:
            torch.cuda.set_sync_debug_mode("warn")
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found = [(Path(each.filename).name, each.lineno) for each in caught if WAIT_WARNING in str(each.message)]
    if places := sorted({f"{name}:{line}" for name, line in found if name != ALLOWED_FILE}):
        raise WaitsForDevice(f"the host waits for the device in {', '.join(places)}")
