"""Descriptions of full pages, by frame: summaries and codes, which a search reads instead of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.encode import Codes, encode
from .ops.summarize import summarize
from .spec import SUMMARIES, CacheSpec


class Descriptions:
    """Summaries and codes of all frames, on the compute device in every tier, so that selecting pages moves none."""

    def __init__(self, spec: CacheSpec, num_frames: int, device: torch.device) -> None:
        shape = (spec.num_layers, num_frames, spec.num_kv_heads)
        dim = spec.head_dim if spec.code_bits else 0
        self._summaries = torch.empty(*shape, SUMMARIES, spec.head_dim, dtype=spec.dtype, device=device)
        self._codes = Codes(
            torch.empty(*shape, spec.code_words, spec.page_size, dtype=torch.int32, device=device),
            torch.empty(*shape, 2, dim, dtype=torch.int8, device=device),
            torch.empty(*shape, 2, dtype=torch.float32, device=device),
        )

    def summaries(self, layer: int) -> Tensor:
        """[N, Hkv, 4, D]: see `Tier.summaries`."""
        return self._summaries[layer]

    def codes(self, layer: int) -> Codes:
        """See `Tier.codes`."""
        return Codes(*(part[layer] for part in self._codes))

    def fill(self, layer: int, k: Tensor, v: Tensor, frames: Tensor) -> None:
        """Describe frames [n] int64 of k and v [N, Hkv, S, D]."""
        _describe(k, v, frames, self.summaries(layer), self.codes(layer))

    def fill_from(self, layer: int, pages: Tensor, frames: Tensor) -> None:
        """Describe pages [n, Hkv, 2, S, D] as those of frames [n] int64."""
        (k, v), count = pages.unbind(2), len(frames)
        summaries = self.summaries(layer).new_empty(count, *self._summaries.shape[2:])
        codes = Codes(*(part.new_empty(count, *part.shape[1:]) for part in self.codes(layer)))
        _describe(k, v, torch.arange(count, device=pages.device), summaries, codes)
        for table, part in zip((self.summaries(layer), *self.codes(layer)), (summaries, *codes), strict=True):
            table.index_copy_(0, frames, part)


def _describe(k: Tensor, v: Tensor, frames: Tensor, summaries: Tensor, codes: Codes) -> None:
    summarize(summaries, k, v, frames)
    if codes.levels.numel():
        encode(k, summaries, frames, codes)
