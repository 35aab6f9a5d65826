"""The native twin of `keysift.kvcache.home_file.read_pieces`: many short reads without the interpreter between them."""

from __future__ import annotations

import ctypes
import os

from torch import Tensor

from keysift.kvcache.home_file import Place

from .library import ReadCall, kernels


def read_pieces(pool: Tensor, fd: int, place: Place, loads: Tensor, slots: Tensor) -> None:
    """See the reference."""
    call = ReadCall(pool.data_ptr(), loads.data_ptr(), slots.data_ptr(), *loads.shape, fd, *place)
    if error := kernels.keysift_read_pieces(ctypes.byref(call), 0, 1):
        raise OSError(error, os.strerror(error))
