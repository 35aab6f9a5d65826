"""Copy single heads of pages from host memory into a pool."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import op


@op(triton="keysift.kvcache.ops.fetch.triton:fetch")
def fetch(pool: Tensor, extents: Sequence[Tensor], layer: int, loads: Tensor, slots: Tensor) -> None:
    """pool[slots[h, i], h] = head h of the page in store frame ``loads[h, i]``, in place; nothing for -1.

    Args:
        pool: [C, Hkv, 2, S, D], keys and values of one layer; contiguous.
        extents: the store, cut into [L, E, Hkv, 2, S, D] each; frame n is page ``n % E`` of extent ``n // E``. Pinned
            where the pool is on a GPU, which reads them over the bus, as much as is needed and no more.
        loads: [Hkv, W] int32
        slots: [Hkv, W] int32
    """
    size = extents[0].shape[1]
    heads, places = (loads >= 0).nonzero(as_tuple=True)
    frames = loads[heads, places].tolist()
    for head, frame, slot in zip(heads.tolist(), frames, slots[heads, places].tolist(), strict=True):
        pool[slot, head] = extents[frame // size][layer, frame % size, head]
