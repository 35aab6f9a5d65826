"""Shapes and dtypes of one layer's benchmarks."""

from __future__ import annotations

import torch

SHAPES = {"9/3 d64": (9, 3, 64), "32/8 d128": (32, 8, 128)}
"""Query heads, key/value heads, head dim: of the embedded model, and of the usual model of 8 billion weights."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COLD_BYTES = 96 << 20
"""Bytes that exceed every CPU cache: three times the L3 cache of the machines used."""
