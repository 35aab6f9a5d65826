"""What the Triton twins share: the shape of a program's work and what the device grants it."""
# mypy: allow-untyped-calls

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret


class Tile(NamedTuple):
    """Shape of a program's work and what it asks of a multiprocessor."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


@functools.cache
def shared_memory_of(device: torch.device) -> int:
    """Bytes that one block may use; the interpreter takes the tiles of the middle tier."""
    if device.type == "cpu":
        return 101_376
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])
