"""The CPU twin of `admit`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native.calls import AdmitCall
from ...native.library import kernels
from ..dispatch import UnsupportedCall
from . import Admitted, Residents


def admit(frames: Tensor, pages: Tensor, residents: Residents, *, now: int, before: int) -> Admitted:
    """See the reference; `UnsupportedCall` off the CPU, for integers of another width, odd strides and shapes."""
    (kv_heads, count), capacity = residents.where.shape, residents.owner.shape[1]
    rows, lists, listed = pages.shape
    tensors = frames, pages, *residents
    if not (
        all(tensor.is_cpu and tensor.dtype == torch.int32 for tensor in tensors)
        and all(table.is_contiguous() for table in residents)
        and frames.shape[:2] == (rows, kv_heads)
        and lists % kv_heads == 0
    ):
        raise UnsupportedCall
    width = min(capacity, rows * lists // kv_heads * listed)
    loads, slots = torch.full((2, kv_heads, width), -1, dtype=torch.int32)
    found = torch.zeros((kv_heads, 3), dtype=torch.int64)
    table = torch.zeros((rows, kv_heads, frames.shape[2]), dtype=torch.int32)
    call = AdmitCall.pack(
        **residents._asdict(),
        frames=frames,
        pages=pages,
        loads=loads,
        slots=slots,
        found=found,
        table=table,
        count=count,
        capacity=capacity,
        rows=rows,
        kv_heads=kv_heads,
        lists=lists,
        pages_per_list=listed,
        width=width,
        max_pages=frames.shape[2],
        now=now,
        before=before,
    )
    kernels.keysift_admit(call, 0, 1)
    return Admitted(loads, slots, found, table)
