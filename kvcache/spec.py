"""Shape of a layer's keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

WORD_BITS = 32
"""Bits of the int32 words that codes are packed into."""
SUMMARIES = 4
"""Vectors that summarise a page: mean key, least key, greatest key, mean value."""


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Shape of the cache, and the scale and windows of the model, which reading it takes."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    """Factor of the scores; None: ``content_dim ** -0.5``."""
    windows: tuple[int, ...] = ()
    """Tokens that each layer's queries see, themselves included; 0: all. Empty: no layer has a window."""
    code_bits: Literal[2, 4] | None = 2
    """Least number of bits of a code for each channel of a key; None: keys have no codes."""
    bias_channels: int = 0
    """Last channels of every head that hold no content but a learned bias of the key: see `content_dim`."""

    @property
    def content_dim(self) -> int:
        """Channels of a head that are the model's own.

        The product of a query's and a key's channels after them is a bias that the model adds to the score: whole
        products include it, and content alone is in the first channels.
        """
        return self.head_dim - self.bias_channels

    @property
    def softmax_scale(self) -> float:
        """Factor of the scores."""
        return self.content_dim**-0.5 if self.scale is None else self.scale

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
        """Words of a key's code, the last of which may have bits to spare."""
        return -(-self.head_dim * (self.code_bits or 0) // WORD_BITS)

    @property
    def read_bytes(self) -> int:
        """Bytes of one page's keys and values, of one layer and head."""
        return 2 * self.page_size * self.head_dim * self.dtype.itemsize

    def window(self, layer: int) -> int:
        """Tokens that the layer's queries see; 0: all."""
        return self.windows[layer] if self.windows else 0

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page_size)
