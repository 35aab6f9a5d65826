"""Summaries of pages that have just become full."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import op


@op(
    native="keysift.kvcache.ops.summarize.native:summarize",
    triton="keysift.kvcache.ops.summarize.triton:summarize",
)
def summarize(summaries: Tensor, cache_k: Tensor, cache_v: Tensor, frames: Tensor) -> None:
    """Write mean, minimum and maximum of the keys and the mean value of each listed frame, in place.

    Args:
        summaries: [N, Hkv, 4, D]: mean key, least key, greatest key (per channel), mean value.
        cache_k: [N, Hkv, S, D]; cache_v likewise. Means accumulate in fp32.
        frames: [F] int64, full frames.
    """
    keys, values = cache_k[frames], cache_v[frames]  # [F, Hkv, S, D]
    summaries[frames] = torch.stack(
        [
            keys.mean(2, dtype=torch.float32).to(keys.dtype),
            keys.amin(2),
            keys.amax(2),
            values.mean(2, dtype=torch.float32).to(keys.dtype),
        ],
        dim=2,
    )
