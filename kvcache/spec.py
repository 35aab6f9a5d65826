"""What a layer's keys and values look like."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SUMMARIES = 4
"""Vectors that summarise a page: mean key, least key, greatest key, mean value."""


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Shape of the cache, and the two facts of the model that reading it needs: scale and windows."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    """Factor of the scores; None: ``head_dim ** -0.5``."""
    windows: tuple[int, ...] = ()
    """Tokens that each layer's queries see, themselves included; 0: all. Empty: no layer has a window."""

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys, values and summaries of all layers."""
        vectors = 2 * self.page_size + SUMMARIES
        return self.num_layers * self.num_kv_heads * vectors * self.head_dim * self.dtype.itemsize

    @property
    def read_bytes(self) -> int:
        """Bytes that reading one page of one layer and head moves: its keys and values."""
        return 2 * self.page_size * self.head_dim * self.dtype.itemsize

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
