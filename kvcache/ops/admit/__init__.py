"""Admission of a selection's pages to a bounded pool: pages to fetch, and slots that they take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import op


class Residents(NamedTuple):
    """Tables of one layer's pool: a frame has a slot of its own for each KV head."""

    where: Tensor
    """[Hkv, N] int32, store frame -> slot; -1: not resident. Slots from C on are of open pages, and never taken."""
    owner: Tensor
    """[Hkv, C] int32, slot -> store frame; -1: empty. C is at least 1."""
    used: Tensor
    """[Hkv, C] int32, when the slot was last read; -1: never since it became empty."""


class Admitted(NamedTuple):
    """Pages to fetch, and the slots of all listed pages."""

    loads: Tensor
    """[Hkv, W] int32, store frames, ascending, -1 pads the end; W = min(C, pages listed for a head)."""
    slots: Tensor
    """[Hkv, W] int32, the slot of each."""
    found: Tensor
    """[Hkv, 3] int64: numbers of resident pages, of those of them that had been prefetched, and of missing pages."""
    table: Tensor
    """[R, Hkv, F] int32, page -> slot of the listed pages; elsewhere any slot or frame number that there is."""


@op(native="keysift.kvcache.ops.admit.native:admit", triton="keysift.kvcache.ops.admit.triton:admit")
def admit(frames: Tensor, pages: Tensor, residents: Residents, *, now: int, before: int) -> Admitted:
    """Give every listed page a slot, in place: those that have one keep it, the others take those read longest ago.

    Slots last read at `before` or later are not taken; pages that find none are left out. Misses take slots in order:
    the lowest frame that of the oldest read, of equal ones the lowest slot. Nothing waits for the device. Off
    the CPU the work grows with N.

    Args:
        frames: [R, Hkv, F] int32, page -> store frame of each row's sequence.
        pages: [R, H, P] int32 with H in (Hkv, Hq), -1 pads the end.
        residents: of one layer.
        now: even for a read. Odd: a prefetch, which leaves resident pages as they are.
        before: see above; at most `now`.
    """
    where, owner, used = residents
    kv_heads, (count, capacity) = where.shape[0], (where.shape[1], owner.shape[1])
    wanted = _wanted(frames, pages, count, kv_heads)
    there = wanted & (where >= 0) & (where < capacity)
    last = used.gather(1, where.clamp(0, capacity - 1).long())  # [Hkv, N], when each frame's slot was read
    early = (there & (last % 2 == 1)).sum(1)
    if now % 2 == 0:
        _put(used, where.masked_fill(~there, capacity), torch.full_like(where, now))
    missing = wanted & (where < 0)
    width = min(capacity, frames.shape[0] * pages.shape[1] // kv_heads * pages.shape[2])
    rank = torch.where(missing, missing.cumsum(1) - 1, width).clamp(max=width)
    loads = torch.full((kv_heads, width + 1), -1, dtype=torch.int32, device=where.device)
    every = torch.arange(count, dtype=torch.int32, device=where.device).expand(kv_heads, -1)
    loads = loads.scatter_(1, rank, every)[:, :width].clone()
    oldest = used.sort(dim=1, stable=True)
    taken = (loads >= 0) & (oldest.values[:, :width] < before)
    loads.masked_fill_(~taken, -1)
    slots = torch.where(taken, oldest.indices[:, :width].int(), -1)
    _replace(residents, loads, slots, now)
    heads = torch.arange(kv_heads, device=where.device)[:, None]
    table = where[heads, frames.expand(pages.shape[0], kv_heads, -1).long()].clamp_(min=0)
    return Admitted(loads, slots, torch.stack([there.sum(1), early, missing.sum(1)], 1), table)


def _wanted(frames: Tensor, pages: Tensor, count: int, kv_heads: int) -> Tensor:
    """[Hkv, N] bool, store frames of the listed pages."""
    rows = pages.shape[0]
    lists = torch.unflatten(pages, 1, (kv_heads, -1)).flatten(2).long()  # [R, Hkv, G * P]
    named = frames.expand(rows, kv_heads, -1).long().gather(2, lists.clamp(min=0)).masked_fill(lists < 0, count)
    wanted = torch.zeros(kv_heads, count + 1, dtype=torch.bool, device=pages.device)
    return wanted.scatter_(1, named.transpose(0, 1).flatten(1), True)[:, :count]


def _replace(residents: Residents, loads: Tensor, slots: Tensor, now: int) -> None:
    """Give `slots` to the frames `loads`, and evict those that held them."""
    where, owner, used = residents
    count, capacity = where.shape[1], owner.shape[1]
    index = slots.masked_fill(slots < 0, capacity)
    out = owner.gather(1, slots.clamp(min=0).long()).masked_fill_(slots < 0, -1)
    _put(where, out.masked_fill(out < 0, count), torch.full_like(out, -1))
    _put(where, loads.masked_fill(loads < 0, count), slots)
    _put(owner, index, loads)
    _put(used, index, torch.full_like(loads, now))


def _put(table: Tensor, index: Tensor, values: Tensor) -> None:
    """table [Hkv, n] at index [Hkv, *] = values, but where the index is n."""
    wide = torch.nn.functional.pad(table, (0, 1))
    table.copy_(wide.scatter_(1, index.long(), values)[:, :-1])
