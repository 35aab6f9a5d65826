"""Tier of caches that fit the memory of the compute device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..descriptions import Descriptions
from ..ops.store import store
from ..selection import Selection
from ..spec import CacheSpec
from ..step import Step
from .base import Frames, InPlaceTier, own_page


class DeviceTier(InPlaceTier):
    """All pages on the compute device."""

    def __init__(self, spec: CacheSpec, num_frames: int, device: torch.device) -> None:
        shape = (spec.num_layers, num_frames, spec.num_kv_heads, spec.page_size, spec.head_dim)
        self.k = torch.empty(shape, dtype=spec.dtype, device=device)
        self.v = torch.empty_like(self.k)
        self._descriptions = Descriptions(spec, num_frames, device)
        self.summaries, self.codes = self._descriptions.summaries, self._descriptions.codes

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        store(self.k[layer], self.v[layer], k, v, step.slots)
        if step.filled.shape[0]:
            self._descriptions.fill(layer, self.k[layer], self.v[layer], step.filled)

    def resident(self, layer: int, selection: Selection, step: Step) -> Frames:
        return Frames(self.k[layer], self.v[layer], step.table)

    def own(self, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        return own_page(Frames(self.k[layer], self.v[layer], step.table), step)

    def parts(self, layer: int, selection: Selection, step: Step) -> Iterator[tuple[Selection, Frames]]:
        yield selection, self.resident(layer, selection, step)
