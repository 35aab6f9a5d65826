"""Copies beside the computation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch


class Prefetcher(Protocol):
    """Runs copies one after the other, while the caller computes."""

    def submit(self, layer: int, copy: Callable[[], None]) -> None:
        """Begin a copy for this layer; one at a time."""

    def wait(self, layer: int) -> None:
        """The layer's copy is done: what is computed from now on sees it. Raises what it raised."""

    def close(self) -> None:
        """Begin nothing more; what has begun is done."""


class Thread:
    """For homes that are read by calls, which let go of the interpreter and mostly wait for a disk."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "keysift-prefetch")
        self._copies: dict[int, Future[None]] = {}

    def submit(self, layer: int, copy: Callable[[], None]) -> None:
        self._copies[layer] = self._worker.submit(copy)

    def wait(self, layer: int) -> None:
        if (running := self._copies.pop(layer, None)) is not None:
            running.result()

    def close(self) -> None:
        """Perhaps on the worker itself, which may be the last to know whom it copies for: it must not be joined."""
        self._worker.shutdown(wait=False)
        for copy in self._copies.values():
            if not copy.cancel():
                copy.exception()


class Stream:
    """For a GPU that reads pinned memory itself: a stream of its own, and events for those who wait.

    Whoever submits a copy keeps the tensors that it reads until it has waited.
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
    """What runs copies beside the computation on this device."""
    return Stream(device) if device.type == "cuda" else Thread()
