"""A home on disk: contexts larger than memory."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import HomeError
from .home import EXTENT, runs
from .ops.dispatch import op
from .spec import CacheSpec

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FileHome:
    """One nameless file in a folder: nobody can delete or cut it, and it is gone with the process, however that ends.

    It is read and written by calls rather than mapped: a full or failing disk is then an error of one request, where a
    map would end the process with SIGBUS; and what the system keeps of it in its page cache is the system's to take
    back, and no part of this process. Blocks are reserved extent by extent before anything is written.
    """

    def __init__(self, spec: CacheSpec, folder: Path) -> None:
        self._folder = folder
        self._piece_bytes = spec.read_bytes
        self._page_bytes = spec.num_kv_heads * spec.read_bytes
        self._extent_bytes = spec.num_layers * EXTENT * self._page_bytes
        self._claimed: set[int] = set()
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="keysift-", buffering=0)  # noqa: SIM115
            self._fd = self._file.fileno()
            self.close = weakref.finalize(self, self._file.close)
            # What lies beside a page is no guess at what is read next, and whole runs are asked for as such.
            getattr(os, "posix_fadvise", lambda *_: None)(self._fd, 0, 0, getattr(os, "POSIX_FADV_RANDOM", 0))
        except OSError as error:
            raise self._failed("opened", error) from error

    def claim(self, frames: Iterable[int]) -> None:
        for extent in sorted({frame // EXTENT for frame in frames} - self._claimed):
            try:
                os.posix_fallocate(self._fd, extent * self._extent_bytes, self._extent_bytes)
            except OSError as error:
                raise self._failed(f"extended by {self._extent_bytes} bytes", error) from error
            self._claimed.add(extent)

    def write(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        for start, stop in runs(frames):
            self._move("written", os.pwrite, self._offset(layer, frames[start]), pages[start:stop])

    def read(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        for start, stop in runs(frames):
            self._move("read", _pread, self._offset(layer, frames[start]), pages[start:stop])

    def fetch(self, layer: int, pool: Tensor, loads: Tensor, slots: Tensor) -> None:
        heads, places = (loads >= 0).nonzero(as_tuple=True)
        frames, kv_heads = loads[heads, places].long(), pool.shape[1]
        offsets = self._offsets(layer, frames) + heads * self._piece_bytes
        targets = (slots[heads, places].long() * kv_heads + heads) * self._piece_bytes
        try:
            read_pieces(pool, self._fd, offsets, targets, self._piece_bytes)
        except OSError as error:
            raise self._failed("read", error) from error

    def _offset(self, layer: int, frame: int) -> int:
        return frame // EXTENT * self._extent_bytes + (layer * EXTENT + frame % EXTENT) * self._page_bytes

    def _offsets(self, layer: int, frames: Tensor) -> Tensor:
        return frames // EXTENT * self._extent_bytes + (layer * EXTENT + frames % EXTENT) * self._page_bytes

    def _move(self, what: str, call: Callable[[int, memoryview, int], int], offset: int, pages: Tensor) -> None:
        """All bytes of contiguous pages, in as many calls as it takes."""
        rest = bytes_of(pages)
        try:
            while rest:
                if not (moved := call(self._fd, rest, offset)):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                rest, offset = rest[moved:], offset + moved
        except OSError as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: OSError) -> HomeError:
        free = shutil.disk_usage(self._folder).free if self._folder.is_dir() else 0
        problem = f"kv_home: the file in {self._folder} could not be {what}: {error.strerror} ({free} bytes free there)"
        return HomeError(problem, exhausted=error.errno in NO_ROOM)


def bytes_of(pages: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(pages.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]  # numpy says no buffer


@op(native="keysift.attention.native.read_pieces:read_pieces")
def read_pieces(memory: Tensor, fd: int, offsets: Tensor, targets: Tensor, size: int) -> None:
    """Read `size` bytes of a file from each of `offsets` [n] int64 to bytes `targets` [n] int64 of contiguous memory.

    Raises `OSError`.
    """
    whole = bytes_of(memory)
    for offset, target in zip(offsets.tolist(), targets.tolist(), strict=True):
        if _pread(fd, whole[target : target + size], offset) != size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def _pread(fd: int, memory: memoryview, offset: int) -> int:
    return os.preadv(fd, [memory], offset)
