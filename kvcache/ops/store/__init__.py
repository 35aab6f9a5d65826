"""Write new keys and values into their slots."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import op


@op(triton="keysift.kvcache.ops.store.triton:store")
def store(cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Copy token t's key and value to slot ``slots[t]`` = frame * S + offset, in place.

    Args:
        cache_k: [N, Hkv, S, D]; cache_v likewise.
        k: [T, Hkv, D], any strides with a contiguous last axis; v likewise.
        slots: [T] int64, all different.
    """
    frame, offset = slots // cache_k.shape[2], slots % cache_k.shape[2]
    cache_k[frame, :, offset] = k
    cache_v[frame, :, offset] = v
