"""Read single heads of pages from a file into a pool."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import op


class Place(NamedTuple):
    """Place of one layer's pages in a file of extents."""

    extent: int
    """Pages of an extent."""
    extent_bytes: int
    layer_offset: int
    """Bytes of an extent before this layer's."""
    piece_bytes: int
    """Bytes of one head of a page."""

    def of(self, frame: int, head: int, kv_heads: int) -> int:
        page = frame % self.extent * kv_heads + head
        return frame // self.extent * self.extent_bytes + self.layer_offset + page * self.piece_bytes


def transfer(call: Callable[[int, memoryview, int], int], fd: int, memory: memoryview, offset: int) -> None:
    """Read or write all of `memory` at a file's offset, in as many calls as it takes."""
    while memory:
        if not (moved := call(fd, memory, offset)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        memory, offset = memory[moved:], offset + moved


def bytes_of(pages: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(pages.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]  # numpy says no buffer


def pread(fd: int, memory: memoryview, offset: int) -> int:
    """Bytes read into `memory`."""
    return os.preadv(fd, [memory], offset)


@op(native="keysift.kvcache.ops.read_pieces.native:read_pieces")
def read_pieces(pool: Tensor, fd: int, place: Place, loads: Tensor, slots: Tensor) -> None:
    """As `keysift.kvcache.ops.fetch`, from a file, for a contiguous pool. Raises `OSError`."""
    memory, kv_heads, size = bytes_of(pool), pool.shape[1], place.piece_bytes
    for head, (frames, targets) in enumerate(zip(loads.tolist(), slots.tolist(), strict=True)):
        for frame, slot in zip(frames, targets, strict=True):
            if frame >= 0:
                start = (slot * kv_heads + head) * size
                transfer(pread, fd, memory[start : start + size], place.of(frame, head, kv_heads))
