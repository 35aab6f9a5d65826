"""Padding of prompt chunks to few lengths.

oneDNN, which multiplies in 16 bits for torch, compiles kernels for each number of rows that it meets, and keeps them:
2.6 MiB for each length with the embedded model's four shapes of weights. 300 random lengths up to 1,024 rows took
680 MiB as they are; padded 133 MiB, and 134 after 600.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from keysift.attention import Attend

from .linear import MAX_ROWS

GRAINS = {128: 8, 512: 16}
"""Up to so many rows, they are padded to a multiple of this, and beyond to one of `COARSEST`: 3 % more on average."""
COARSEST = 32
COMPILED = (torch.bfloat16, torch.float16)
"""Dtypes whose products oneDNN does; float32 goes to other code, which compiles nothing."""


def padded_length(tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows that a chunk of so many tokens runs with."""
    if device.type != "cpu" or dtype not in COMPILED or tokens <= MAX_ROWS:
        return tokens
    grain = next((grain for most, grain in GRAINS.items() if tokens <= most), COARSEST)
    return -(-tokens // grain) * grain


def pad(ids: Tensor, length: int) -> Tensor:
    """ids [T] -> [length], with zeros."""
    return functional.pad(ids, (0, length - len(ids)))


def without_padding(attend: Attend, tokens: int) -> Attend:
    """`attend` for the first rows alone; the others get zeros."""

    def attend_first(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended = attend(layer, q[:tokens], k[:tokens], v[:tokens])
        return functional.pad(attended, (0, 0, 0, 0, 0, len(q) - tokens))

    return attend_first
