"""The Triton twin of `admit`."""
# mypy: allow-untyped-calls

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..dispatch import UnsupportedCall
from ..triton import Config, runs_here
from . import Admitted, Residents
from .kernels import find_kernel, locate_kernel, mark_kernel, replace_kernel

BLOCK = 1024
"""Store frames, or listed pages, of one program."""


def admit(frames: Tensor, pages: Tensor, residents: Residents, *, now: int, before: int) -> Admitted:
    """See the reference; `UnsupportedCall` for tables that are not contiguous.

    Four launches, a sort of the slots and three fills, for some ninety operations of the reference.
    """
    (kv_heads, count), (rows, lists, listed) = residents.where.shape, pages.shape
    if not runs_here(pages) or not all(table.is_contiguous() for table in residents):
        raise UnsupportedCall
    made = _empty(residents, (rows, lists, listed), frames.shape[2])
    named = torch.zeros(kv_heads, count, dtype=torch.int8, device=pages.device)
    frames = frames.expand(rows, kv_heads, -1)
    selection = (pages.contiguous(), frames)
    sizes = (pages.numel(), lists * listed, count)
    heads = (kv_heads, lists, *frames.stride())
    grid = (triton.cdiv(pages.numel(), BLOCK),)
    with torch.cuda.device_of(pages):
        if pages.numel():
            mark_kernel[grid](*selection, named, *sizes, *heads, BLOCK=BLOCK)
        _replace(residents, named, made, now, before)
        if pages.numel():
            locate_kernel[grid](*selection, residents.where, made.table, *sizes, frames.shape[2], *heads, BLOCK=BLOCK)
    return made


def config(blocks: int) -> Config:
    """One block of frames of so many."""
    return Config({"BLOCK": BLOCK, "BLOCK_B": triton.next_power_of_2(blocks)}, {})


def _replace(residents: Residents, named: Tensor, made: Admitted, now: int, before: int) -> None:
    """Give slots to the missing ones of the marked frames."""
    (where, owner, used), (kv_heads, count) = residents, named.shape
    capacity, blocks = owner.shape[1], triton.cdiv(count, BLOCK)
    counts = torch.empty(kv_heads, blocks, 3, dtype=torch.int32, device=where.device)
    find_kernel[(kv_heads * blocks,)](where, used, named, counts, count, capacity, blocks, now, BLOCK=BLOCK)
    ages, order = used.sort(dim=1, stable=True)
    replace_kernel[(kv_heads * blocks,)](
        *(where, owner, used, named, counts, ages, order, made.loads, made.slots, made.found),
        *(count, capacity, blocks, made.loads.shape[1], now, before),
        **config(blocks).all,
    )


def _empty(residents: Residents, listed: tuple[int, int, int], max_pages: int) -> Admitted:
    kv_heads, device = residents.where.shape[0], residents.where.device
    rows, lists, pages = listed
    width = min(residents.owner.shape[1], rows * lists // kv_heads * pages)
    loads, slots = torch.full((2, kv_heads, width), -1, dtype=torch.int32, device=device)
    return Admitted(
        loads=loads,
        slots=slots,
        found=torch.empty(kv_heads, 3, dtype=torch.int64, device=device),
        table=torch.zeros(rows, kv_heads, max_pages, dtype=torch.int32, device=device),
    )
