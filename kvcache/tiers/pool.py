"""The bounded part of an offloaded cache: frames of each layer and KV head, and the open pages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.admit import Admitted, Residents
from ..spec import CacheSpec


class Pool:
    """`slots` frames of each layer and KV head for pages that were read lately, and a tail for each sequence.

    A sequence's last page is in its tail until it is full and the next one begins; tails are the same frame for all
    heads, and nobody's to give away.
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
        return Residents(self._where[layer], self._owner[layer], self._used[layer])

    def opened(self, layer: int, sequence: int) -> int | None:
        """The frame whose page is in the sequence's tail."""
        return self._tails[layer].get(sequence)

    def tail(self, layer: int, frame: int) -> Tensor | None:
        """[Hkv, 2, S, D], the page of an open frame."""
        sequence = self._open[layer].get(frame)
        return None if sequence is None else self.pages[layer, self.capacity + sequence]

    def undo(self, layer: int, admitted: Admitted) -> None:
        """Forget pages that were to come and did not."""
        where, owner, used = self.residents(layer)
        heads, places = (admitted.loads >= 0).nonzero(as_tuple=True)
        frames, slots = admitted.loads[heads, places].long(), admitted.slots[heads, places].long()
        where[heads, frames] = owner[heads, slots] = used[heads, slots] = -1

    def restart(self) -> None:
        """The clock begins again: whatever is here was read at one time."""
        self._used.clamp_(max=0)

    def open(self, layer: int, sequence: int, frame: int) -> Tensor:
        """Make the frame's page the sequence's open one; returns its tail [Hkv, 2, S, D], which may hold anything."""
        if (before := self._tails[layer].get(sequence)) is not None:
            self.drop(layer, [before])
        self.drop(layer, [frame])
        self._tails[layer][sequence], self._open[layer][frame] = frame, sequence
        self._where[layer, :, frame] = self.capacity + sequence
        return self.pages[layer, self.capacity + sequence]

    def drop(self, layer: int, frames: Sequence[int]) -> None:
        """Forget what is here of these frames: their pages are about to change, or to be read at home."""
        for frame in frames:
            if (sequence := self._open[layer].pop(frame, None)) is not None:
                del self._tails[layer][sequence]
        where, owner, used = self.residents(layer)
        index = torch.tensor(frames, device=where.device)
        slots = where[:, index].long()  # [Hkv, n]
        slots = slots.masked_fill_((slots < 0) | (slots >= self.capacity), self.capacity)
        for table in (owner, used):
            wide = torch.nn.functional.pad(table, (0, 1))
            table.copy_(wide.scatter_(1, slots, -1)[:, :-1])
        where[:, index] = -1
