"""Tier for contexts that exceed the memory of the compute device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..selection import Selection
from ..spec import CacheSpec
from ..step import Phase, Step
from .base import Frames, Traffic, own_page
from .full_pages import FullPages
from .pool import PoolSize
from .pool_reader import PoolReader
from .prefetch import Prefetcher
from .stage_reader import StageReader
from .store import BackingStore


class OffloadTier:
    """All full pages in a backing store; those that are read come to the compute device, to a pool or to a stage.

    - A generated token's pages are fetched into a bounded pool and stay there until others need their slots.
    - A prompt streams through the stage, one layer at a time.
    - A page is written to the store when it becomes full. It then never changes, so evicting it copies nothing.

    The place that a page is read from changes no bit of the result, unless a read exceeds the stage and is done in
    parts. On a GPU nothing blocks the host but the list of pages that it copies for a read through the stage: see
    `StageReader.selected_frames`.
    """

    steady: ClassVar[bool] = False

    def __init__(
        self, spec: CacheSpec, num_frames: int, store: BackingStore, size: PoolSize, device: torch.device
    ) -> None:
        self.spec, self.size, self.prefetch_pages = spec, size, size.prefetch_pages
        self.pages = FullPages(spec, num_frames, store, device)
        self.summaries, self.codes = self.pages.summaries, self.pages.codes
        self._pool_reader = PoolReader(spec, num_frames, size.slots, size.tails, self.pages, device)
        self._stage_reader = StageReader(spec, num_frames, size.staged, self.pages, self._pool_reader.pool, device)
        # Of the reader, to which a running prefetch refers, rather than of the tier: the store outlives the copy.
        self.close = weakref.finalize(self._pool_reader, _close, self._pool_reader.prefetcher, store)

    def claim(self, frames: Sequence[int]) -> None:
        self.pages.store.claim(frames)

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        self._stage_reader.begin()
        self._pool_reader.begin(layer, step)
        (self._stage_reader if step.phase is Phase.PREFILL else self._pool_reader).write(layer, k, v, step)

    def resident(self, layer: int, selection: Selection, step: Step) -> Frames:
        reader = self._pool_reader if self._pool_reader.fits(layer, selection, step) else self._stage_reader
        return reader.read(layer, selection, step)

    def own(self, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        if step.phase is Phase.DECODE:
            return self._pool_reader.own(layer, step)
        return own_page(self._stage_reader.read(layer, Selection.own(step, self.spec.num_kv_heads), step), step)

    def parts(self, layer: int, selection: Selection, step: Step) -> Iterator[tuple[Selection, Frames]]:
        if self._pool_reader.fits(layer, selection, step):
            yield selection, self._pool_reader.read(layer, selection, step)
        else:
            yield from self._stage_reader.parts(layer, selection, step)

    def prefetch(self, layer: int, pages: Tensor, step: Step) -> None:
        self._pool_reader.prefetch(layer, pages, step)

    def holds(self, pages: int) -> bool:
        return pages <= self.size.staged

    @property
    def traffic(self) -> Traffic:
        return self._pool_reader.traffic + self._stage_reader.traffic + self.pages.traffic


def _close(prefetcher: Prefetcher, store: BackingStore) -> None:
    prefetcher.close()
    store.close()
