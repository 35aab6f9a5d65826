"""Shared parts of the Triton twins: where they run, and the shape and resources of a program."""
# mypy: allow-untyped-calls

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
NO_SPILLS = {"maxnreg": 128}
"""For NVIDIA: without a bound Triton 3.7's ptxas spills a few registers that it has, to fit more programs at once."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Config(NamedTuple):
    """Constants and compile options that a launch chooses for its sizes."""

    constants: dict[str, int]
    options: dict[str, int]

    @property
    def all(self) -> dict[str, int]:
        return self.constants | self.options


class Tile(NamedTuple):
    """Packed queries and keys of a program, and the resources that it takes of a multiprocessor."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def runs_here(tensor: Tensor) -> bool:
    """True if kernels can read the tensor: on a GPU, or anywhere under the interpreter."""
    return tensor.is_cuda or INTERPRETED


def channels(dim: int) -> int:
    """BLOCK_D for `dim` channels: at least what a matrix unit multiplies at once."""
    return max(16, triton.next_power_of_2(dim))  # type: ignore[no-any-return]


def stages_of(shared_memory: int) -> int:
    """Pipeline stages for a block's bytes of shared memory: Hopper and Blackwell, Ampere and Ada, AMD's 64 KiB."""
    return 3 if shared_memory > 200_000 else 2 if shared_memory > 65_536 else 1


@functools.cache
def shared_memory_of(device: torch.device) -> int:
    """Bytes that one block may use; the interpreter takes the tiles of the middle tier."""
    if device.type == "cpu":
        return 101_376
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])
