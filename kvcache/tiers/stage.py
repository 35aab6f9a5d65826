"""Staging buffer for the pages of one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import CacheSpec
from ..step import Step


class Stage:
    """Pages of one layer in one step, side by side: what a prompt reads, and reads that exceed the pool.

    All layers share it, as only one computes at a time: one layer of a context is a fraction of what the pool saves.
    """

    def __init__(self, spec: CacheSpec, num_frames: int, size: int, device: torch.device) -> None:
        self.size = size
        piece = (spec.num_kv_heads, 2, spec.page_size, spec.head_dim)
        self.pages = torch.empty(size, *piece, dtype=spec.dtype, device=device)
        """[size, Hkv, 2, S, D]"""
        self._where = torch.full((num_frames,), -1, dtype=torch.int32, device=device)
        self._staged: set[int] = set()
        self._of: tuple[int, Step] | None = None

    def __len__(self) -> int:
        """Pages that are staged."""
        return len(self._staged)

    def enter(self, layer: int, step: Step) -> None:
        """Begin to stage pages of this layer and step; pages of another one are forgotten."""
        if self._of is None or self._of[0] != layer or self._of[1] is not step:
            self._of = layer, step
            self.clear()

    def leave(self) -> None:
        """Forget all pages at the next `enter`."""
        self._of = None

    def clear(self) -> None:
        """Forget all pages."""
        self._staged.clear()
        self._where.fill_(-1)

    def missing(self, frames: Sequence[int]) -> list[int]:
        """Those of the frames whose pages are not staged, in their order."""
        return [frame for frame in frames if frame not in self._staged]

    def place(self, frames: Sequence[int], index: Tensor) -> Tensor | None:
        """Room [n, Hkv, 2, S, D] for the pages of missing frames, in their order; None if there is too little.

        index [n]: the same frames on the device.
        """
        start, stop = len(self), len(self) + len(frames)
        if stop > self.size:
            return None
        self._staged.update(frames)
        self._where[index.long()] = torch.arange(start, stop, dtype=torch.int32, device=index.device)
        return self.pages[start:stop]

    def table(self, frames: Tensor) -> Tensor:
        """[R, Hkv, F] int32, places of the pages of frames [R, Hkv, F]; 0 for those that are not staged."""
        return self._where[frames[:, :1].long()].clamp_(min=0).expand(frames.shape)
