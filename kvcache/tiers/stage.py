"""PaddedShape for the pages of one layer at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import CacheSpec
from ..step import Step


class Stage:
    """Pages of one layer in one step, side by side: what a prompt reads, and whatever is more than the pool takes.

    All layers share it, as only one computes at a time: a layer of a context is a fraction of what the pool spares.
    """

    def __init__(self, spec: CacheSpec, num_frames: int, size: int, device: torch.device) -> None:
        self.size = size
        piece = (spec.num_kv_heads, 2, spec.page_size, spec.head_dim)
        self.pages = torch.empty(size, *piece, dtype=spec.dtype, device=device)
        """[size, Hkv, 2, S, D]"""
        self._where = torch.full((num_frames,), -1, dtype=torch.int32, device=device)
        self._count = 0
        self._of: tuple[int, Step] | None = None

    def enter(self, layer: int, step: Step) -> None:
        """From now on it is this layer's; what another one left is gone."""
        if self._of is None or self._of[0] != layer or self._of[1] is not step:
            self._of = layer, step
            self.clear()

    def leave(self) -> None:
        """Whoever enters next finds nothing."""
        self._of = None

    def clear(self) -> None:
        self._count = 0
        self._where.fill_(-1)

    def missing(self, frames: Tensor) -> Tensor:
        """Those of the home frames [n] that are not here."""
        return frames[self._where[frames.long()] < 0]

    def place(self, frames: Tensor) -> Tensor | None:
        """PaddedShape [n, Hkv, 2, S, D] for frames [n] that are not here, in their order; None: there is not enough."""
        start, stop = self._count, self._count + len(frames)
        if stop > self.size:
            return None
        self._where[frames.long()] = torch.arange(start, stop, dtype=torch.int32, device=frames.device)
        self._count = stop
        return self.pages[start:stop]

    def table(self, frames: Tensor) -> Tensor:
        """[R, Hkv, F] int32, where the pages of home frames [R, Hkv, F] are; 0 for those that are not here."""
        return self._where[frames[:, :1].long()].clamp_(min=0).expand(frames.shape)
