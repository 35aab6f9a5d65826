"""What a layer's keys and values look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

WORD_BITS = 32
"""Codes are packed into int32."""
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
    code_bits: Literal[2, 4] | None = 2
    """Bits that a code spends on each channel of a key, at least; None: keys have no codes."""

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys, values, summaries and codes of all layers."""
        vectors = (2 * self.page_size + SUMMARIES) * self.head_dim * self.dtype.itemsize
        codes = self.page_size * self.code_words * WORD_BITS // 8 + (2 * self.head_dim + 8 if self.code_bits else 0)
        return self.num_layers * self.num_kv_heads * (vectors + codes)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one page's keys and values alone, of all layers."""
        return self.num_layers * self.num_kv_heads * self.read_bytes

    @property
    def code_words(self) -> int:
        """Words of a key's code; what is left over of the last one is wasted."""
        return -(-self.head_dim * (self.code_bits or 0) // WORD_BITS)

    @property
    def read_bytes(self) -> int:
        """Bytes that reading one page of one layer and head moves: its keys and values."""
        return 2 * self.page_size * self.head_dim * self.dtype.itemsize

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
