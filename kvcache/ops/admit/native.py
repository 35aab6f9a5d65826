"""The CPU twin of `keysift.kvcache.ops.admit`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...native.library import AdmitCall, kernels
from . import Admitted, Residents


def admit(frames: Tensor, pages: Tensor, residents: Residents, *, now: int, before: int) -> Admitted:
    """See the reference; `NotImplemented` off the CPU and where the tables have gaps."""
    (kv_heads, count), capacity = residents.where.shape, residents.owner.shape[1]
    rows, lists, listed = pages.shape
    if not (pages.is_cpu and all(table.is_contiguous() for table in residents)):
        return NotImplemented  # type: ignore[no-any-return]
    width = min(capacity, rows * lists // kv_heads * listed)
    loads, slots = torch.full((2, kv_heads, width), -1, dtype=torch.int32)
    found = torch.zeros((kv_heads, 3), dtype=torch.int64)
    table = torch.zeros((rows, kv_heads, frames.shape[2]), dtype=torch.int32)
    call = AdmitCall(
        *(tensor.data_ptr() for tensor in (*residents, frames, pages, loads, slots, found, table)),
        frames.stride(),
        pages.stride(),
        count,
        capacity,
        rows,
        kv_heads,
        lists,
        listed,
        width,
        frames.shape[2],
        now,
        before,
    )
    kernels.keysift_admit(ctypes.byref(call), 0, 1)
    return Admitted(loads, slots, found, table)
