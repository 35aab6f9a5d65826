"""Full pages of an offloaded cache: keys and values in a backing store, descriptions on the compute device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..descriptions import Descriptions
from ..spec import CacheSpec
from .base import Traffic
from .store import BackingStore


class FullPages:
    """Stores and describes each page once, when it becomes full; it never changes after that."""

    def __init__(self, spec: CacheSpec, num_frames: int, store: BackingStore, device: torch.device) -> None:
        self.store = store
        self._descriptions = Descriptions(spec, num_frames, device)
        self.summaries, self.codes = self._descriptions.summaries, self._descriptions.codes
        self._page_bytes = spec.num_kv_heads * spec.read_bytes
        self._written = 0

    def write(self, layer: int, frames: Sequence[int], index: Tensor, pages: Tensor) -> None:
        """Store and describe pages [n, Hkv, 2, S, D] of these frames, which index [n] holds on the device."""
        if frames:
            self.store.write(layer, frames, pages)
            self._descriptions.fill_from(layer, pages, index)
            self._written += len(frames)

    @property
    def traffic(self) -> Traffic:
        """Bytes written."""
        return Traffic(written=self._written * self._page_bytes)
