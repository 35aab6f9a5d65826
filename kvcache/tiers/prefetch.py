"""Copies that run in parallel with the computation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch


class Prefetcher(Protocol):
    """Runs copies one after the other while the caller computes."""

    def submit(self, layer: int, copy: Callable[[], None]) -> None:
        """Begin a copy for this layer, at most one at a time."""

    def wait(self, layer: int) -> None:
        """Make later computation see the layer's copy. Raises the copy's error."""

    def close(self) -> None:
        """Finish the copies that have begun, and begin no others."""


class ThreadPrefetcher:
    """Copies on a thread, for stores that are read by calls: these release the interpreter and wait for a disk."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "keysift-prefetch")
        self._copies: dict[int, Future[None]] = {}

    def submit(self, layer: int, copy: Callable[[], None]) -> None:
        self._copies[layer] = self._worker.submit(copy)

    def wait(self, layer: int) -> None:
        if (running := self._copies.pop(layer, None)) is not None:
            running.result()

    def close(self) -> None:
        """May run on the worker itself, which can drop the last reference to the tier: it must not be joined."""
        self._worker.shutdown(wait=False)
        for copy in self._copies.values():
            if not copy.cancel():
                copy.exception()


class StreamPrefetcher:
    """Copies on a CUDA stream of their own, for a GPU that reads pinned memory itself.

    The caller of `submit` keeps the tensors that the copy reads until `wait`.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._events: dict[int, torch.cuda.Event] = {}

    def submit(self, layer: int, copy: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            copy()
            self._events[layer] = self._stream.record_event()

    def wait(self, layer: int) -> None:
        if (event := self._events.pop(layer, None)) is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(event)

    def close(self) -> None:
        self._stream.synchronize()
        self._events.clear()


def make_prefetcher(device: torch.device) -> Prefetcher:
    """The prefetcher for a pool on this device."""
    return StreamPrefetcher(device) if device.type == "cuda" else ThreadPrefetcher()
