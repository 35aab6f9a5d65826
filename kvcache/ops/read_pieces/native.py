"""The native twin of `read_pieces`: many short reads without the interpreter between them."""

from __future__ import annotations

import ctypes
import os

from torch import Tensor

from ...native.library import ReadCall, kernels
from . import Place


def read_pieces(pool: Tensor, fd: int, place: Place, loads: Tensor, slots: Tensor) -> None:
    """See the reference."""
    call = ReadCall(pool.data_ptr(), loads.data_ptr(), slots.data_ptr(), *loads.shape, fd, *place)
    kernels.keysift_read_pieces(ctypes.byref(call), 0, 1)
    if call.error:
        raise OSError(call.error, os.strerror(call.error))
