"""Bounded pool of an offloaded cache: slots for recently read pages, and the open page of each sequence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.admit import Admitted, Residents
from ..spec import CacheSpec


@dataclass(frozen=True, slots=True)
class PoolSize:
    """Upper bounds on the pages that an offloaded cache keeps on the compute device."""

    slots: int
    """Of each layer and KV head, for what generated tokens read."""
    staged: int
    """Of one layer, for prompts and for reads that exceed the slots."""
    tails: int
    """Open pages of each layer: sequences that may hold pages."""
    prefetch_pages: int = 0
    """Of the slots of each layer and head, those that a token may fill with pages prefetched for the next one."""

    def bytes(self, spec: CacheSpec) -> int:
        """Bytes of keys and values that it takes."""
        return (spec.num_layers * (self.slots + self.tails) + self.staged) * spec.num_kv_heads * spec.read_bytes


class Pool:
    """`slots` frames of each layer and KV head for recently read pages, and a tail for each sequence.

    A sequence's last page is in its tail until it is full and the next one begins. Tails are the same frame for all
    heads and are never evicted.
    """

    def __init__(self, spec: CacheSpec, num_frames: int, slots: int, tails: int, device: torch.device) -> None:
        self.capacity = slots
        piece = (spec.num_kv_heads, 2, spec.page_size, spec.head_dim)
        self.pages = torch.empty(spec.num_layers, slots + tails, *piece, dtype=spec.dtype, device=device)
        """[L, C + tails, Hkv, 2, S, D]"""
        heads = (spec.num_layers, spec.num_kv_heads)
        self._where = torch.full((*heads, num_frames), -1, dtype=torch.int32, device=device)
        self._owner = torch.full((*heads, slots), -1, dtype=torch.int32, device=device)
        self._used = torch.full((*heads, slots), -1, dtype=torch.int32, device=device)
        self._tails: defaultdict[int, dict[int, int]] = defaultdict(dict)  # layer -> sequence -> open frame
        self._open: defaultdict[int, dict[int, int]] = defaultdict(dict)  # layer -> open frame -> sequence

    def residents(self, layer: int) -> Residents:
        """The layer's tables of pages in slots."""
        return Residents(self._where[layer], self._owner[layer], self._used[layer])

    def opened(self, layer: int, sequence: int) -> int | None:
        """The frame whose page is in the sequence's tail."""
        return self._tails[layer].get(sequence)

    def tail(self, layer: int, frame: int) -> Tensor | None:
        """[Hkv, 2, S, D], the page of an open frame; None if the frame is not open."""
        sequence = self._open[layer].get(frame)
        return None if sequence is None else self.pages[layer, self.capacity + sequence]

    def undo(self, layer: int, admitted: Admitted) -> None:
        """Forget pages that were admitted and not fetched. Waits for the device."""
        where, owner, used = self.residents(layer)
        heads, places = (admitted.loads >= 0).nonzero(as_tuple=True)
        frames, slots = admitted.loads[heads, places].long(), admitted.slots[heads, places].long()
        where[heads, frames] = owner[heads, slots] = used[heads, slots] = -1

    def restart(self) -> None:
        """Restart the clock: resident pages count as read at time 0."""
        self._used.clamp_(max=0)

    def open(self, layer: int, sequence: int, frame: int) -> Tensor:
        """Make the frame's page the sequence's open one; returns its tail [Hkv, 2, S, D], which may hold anything."""
        if (before := self._tails[layer].get(sequence)) is not None:
            self.close(layer, before)
        self.close(layer, frame)
        self._tails[layer][sequence], self._open[layer][frame] = frame, sequence
        self._where[layer, :, frame] = self.capacity + sequence
        return self.pages[layer, self.capacity + sequence]

    def close(self, layer: int, frame: int) -> None:
        """`drop` one frame."""
        self.drop(layer, [frame], slice(frame, frame + 1))

    def drop(self, layer: int, frames: Sequence[int], index: Tensor | slice) -> None:
        """Forget these frames, whose pages are about to change or to be read from the backing store.

        `index` selects the same frames on the device: a slice, or [n] int64.
        """
        for frame in frames:
            if (sequence := self._open[layer].pop(frame, None)) is not None:
                del self._tails[layer][sequence]
        where, owner, used = self.residents(layer)
        slots = where[:, index].long()  # [Hkv, n]
        slots = slots.masked_fill_((slots < 0) | (slots >= self.capacity), self.capacity)
        for table in (owner, used):
            wide = torch.nn.functional.pad(table, (0, 1))
            table.copy_(wide.scatter_(1, slots, -1)[:, :-1])
        where[:, index] = -1
