"""The native twin of `keysift.kvcache.home_file.read_pieces`: many short reads without the interpreter between them."""

from __future__ import annotations

import ctypes
import os

from torch import Tensor

from .library import ReadCall, kernels


def read_pieces(memory: Tensor, fd: int, offsets: Tensor, targets: Tensor, size: int) -> None:
    """See the reference."""
    call = ReadCall(memory.data_ptr(), offsets.data_ptr(), targets.data_ptr(), offsets.shape[0], size, fd)
    if error := kernels.keysift_read_pieces(ctypes.byref(call), 0, 1):
        raise OSError(error, os.strerror(error))
