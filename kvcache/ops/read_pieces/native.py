"""The native twin of `read_pieces`: many short reads without the interpreter between them."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ...native.calls import ReadCall
from ...native.library import kernels
from ..dispatch import UnsupportedCall
from . import Place


def read_pieces(pool: Tensor, fd: int, place: Place, loads: Tensor, slots: Tensor) -> None:
    """See the reference; `UnsupportedCall` off the CPU, for integers of another width and for odd strides."""
    if not all(tensor.is_cpu and tensor.is_contiguous() for tensor in (pool, loads, slots)):
        raise UnsupportedCall
    if not loads.dtype == slots.dtype == torch.int32:
        raise UnsupportedCall
    kv_heads, width = loads.shape
    call = ReadCall.pack(
        pool=pool,
        loads=loads,
        slots=slots,
        kv_heads=kv_heads,
        width=width,
        file=fd,
        **place._asdict(),
        error=0,
    )
    kernels.keysift_read_pieces(call, 0, 1)
    if call.error:
        raise OSError(call.error, os.strerror(call.error))
