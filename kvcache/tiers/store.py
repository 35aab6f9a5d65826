"""Backing stores: memory of all full pages when only some of them fit the compute device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import OffloadError
from ..ops.fetch import fetch
from ..spec import CacheSpec

EXTENT = 64
"""Pages that a store grows by, side by side in each layer, so that prompts are written and read in long runs."""


class BackingStore(Protocol):
    """Store of full pages by frame and layer: keys and values of all heads, [Hkv, 2, S, D].

    Every method may raise `OffloadError`.
    """

    def claim(self, frames: Iterable[int]) -> None:
        """Make room for these frames, so that a later write of them cannot fail for lack of it."""

    def write(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        """Write pages [n, Hkv, 2, S, D], contiguous, which may change once this returns."""

    def read(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        """Read frames into pages [n, Hkv, 2, S, D], contiguous."""

    def fetch(self, layer: int, pool: Tensor, loads: Tensor, slots: Tensor) -> None:
        """Read single heads: see `keysift.kvcache.ops.fetch`."""

    def close(self) -> None:
        """Free all memory and files."""


class HostStore:
    """Backing store in host memory, pinned if the pool is on a GPU.

    It is allocated extent by extent, as pages are claimed: one large pinned allocation would block the driver for
    minutes, and most requests are short.
    """

    def __init__(self, spec: CacheSpec, device: torch.device) -> None:
        self._shape = (spec.num_layers, EXTENT, spec.num_kv_heads, 2, spec.page_size, spec.head_dim)
        self._dtype = spec.dtype
        self._pinned = device.type == "cuda"
        self._extents: list[Tensor] = []

    def claim(self, frames: Iterable[int]) -> None:
        for _ in range(len(self._extents), max(frames, default=-1) // EXTENT + 1):
            try:
                self._extents.append(torch.empty(self._shape, dtype=self._dtype, pin_memory=self._pinned))
            except (RuntimeError, MemoryError) as error:
                raise OffloadError(
                    f"kv_offload: no memory for another {EXTENT} pages ({error})", exhausted=True
                ) from error

    def write(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        for start, stop in runs(frames):
            self._of(layer, frames[start], stop - start).copy_(pages[start:stop], non_blocking=True)

    def read(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        for start, stop in runs(frames):
            pages[start:stop].copy_(self._of(layer, frames[start], stop - start), non_blocking=True)

    def fetch(self, layer: int, pool: Tensor, loads: Tensor, slots: Tensor) -> None:
        fetch(pool, self._extents, layer, loads, slots)

    def close(self) -> None:
        self._extents.clear()

    def _of(self, layer: int, frame: int, count: int) -> Tensor:
        return self._extents[frame // EXTENT][layer, frame % EXTENT : frame % EXTENT + count]


def runs(frames: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and stop in the list of each run of frames that are side by side in one extent."""
    start = 0
    for i in range(1, len(frames) + 1):
        if i == len(frames) or frames[i] != frames[i - 1] + 1 or frames[i] % EXTENT == 0:
            yield start, i
            start = i
