"""Backing store on disk, for contexts larger than memory."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from ..errors import OffloadError
from ..ops.read_pieces import Place, bytes_of, pread, read_pieces, transfer
from ..spec import CacheSpec
from .store import EXTENT, runs

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors for lack of room."""
NO_SUCH_CALL = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of systems that cannot reserve blocks in such a file."""


class FileStore:
    """One unnamed file in a folder: it cannot be deleted or cut by name, and goes with the process, however that ends.

    It is read and written by calls rather than mapped: a full or failing disk is then an error of one request, while a
    map would end the process with SIGBUS; and the part of it in the system's page cache can be reclaimed by the system
    and does not count as memory of this process. Blocks are reserved extent by extent before anything is written, if
    the system can; else a full disk shows when a page is written.
    """

    def __init__(self, spec: CacheSpec, folder: Path) -> None:
        self._folder = folder
        self._kv_heads, self._piece_bytes = spec.num_kv_heads, spec.read_bytes
        self._page_bytes = spec.num_kv_heads * spec.read_bytes
        self._extent_bytes = spec.num_layers * EXTENT * self._page_bytes
        self._claimed: set[int] = set()
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="keysift-", buffering=0)  # noqa: SIM115
            self._fd = self._file.fileno()
            self.close = weakref.finalize(self, self._file.close)
        except OSError as error:
            raise self._failed("opened", error) from error
        # No readahead: the neighbours of a page are seldom read next, and long runs are read in one call.
        with suppress(AttributeError, OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def fileno(self) -> int:
        """File descriptor, for calls such as `os.posix_fadvise`."""
        return self._fd

    def claim(self, frames: Iterable[int]) -> None:
        for extent in sorted({frame // EXTENT for frame in frames} - self._claimed):
            try:
                reserve(self._fd, extent * self._extent_bytes, self._extent_bytes)
            except OSError as error:
                raise self._failed(f"extended by {self._extent_bytes} bytes", error) from error
            self._claimed.add(extent)

    def write(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        for start, stop in runs(frames):
            self._move("written", os.pwrite, self._offset(layer, frames[start]), pages[start:stop])

    def read(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        for start, stop in runs(frames):
            self._move("read", pread, self._offset(layer, frames[start]), pages[start:stop])

    def fetch(self, layer: int, pool: Tensor, loads: Tensor, slots: Tensor) -> None:
        try:
            read_pieces(pool, self._fd, self._place(layer), loads, slots)
        except OSError as error:
            raise self._failed("read", error) from error

    def _place(self, layer: int) -> Place:
        return Place(EXTENT, self._extent_bytes, layer * EXTENT * self._page_bytes, self._piece_bytes)

    def _offset(self, layer: int, frame: int) -> int:
        return self._place(layer).of(frame, 0, self._kv_heads)

    def _move(self, what: str, call: Callable[[int, memoryview, int], int], offset: int, pages: Tensor) -> None:
        try:
            transfer(call, self._fd, bytes_of(pages), offset)
        except OSError as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: OSError) -> OffloadError:
        """Error of a request, without the file's place, which is in its note, for the log."""
        free = 0
        with suppress(OSError):
            free = shutil.disk_usage(self._folder).free
        problem = f"kv_offload: the file of pages could not be {what}: {error.strerror} ({free} bytes free there)"
        failed = OffloadError(problem, exhausted=error.errno in NO_ROOM)
        failed.add_note(f"the file is in {self._folder}")
        return failed


def reserve(fd: int, offset: int, size: int) -> None:
    """Reserve blocks for a range of a file; on a system that cannot, only extend the file."""
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            return os.posix_fallocate(fd, offset, size)
    except OSError as error:
        if error.errno not in NO_SUCH_CALL:
            raise
    return os.ftruncate(fd, max(os.fstat(fd).st_size, offset + size))
