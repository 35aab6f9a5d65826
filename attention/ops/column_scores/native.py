"""The CPU twin of `column_scores`."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.kvcache.native.calls import DTYPES, ScoresCall
from keysift.kvcache.native.cores import num_threads
from keysift.kvcache.native.library import kernels, level
from keysift.kvcache.ops.dispatch import UnsupportedCall

from . import ColumnScores


def column_scores(
    q: Tensor,
    k: Tensor,
    frames: Tensor,
    positions: Tensor,
    *,
    queries_per_probe: int,
    scale: float,
    bands: bool = False,
) -> ColumnScores:
    """See the reference; `UnsupportedCall` off the CPU, for unequal dtypes and for head dims that do not fit."""
    if not _supports(q, k, frames, positions, queries_per_probe):
        raise UnsupportedCall
    (_, heads, dim), (_, kv_heads, page_size, _), (probes, _, pages) = q.shape, k.shape, frames.shape
    positions = positions.contiguous()
    shape = (probes, heads, pages)
    mass, peak = torch.zeros(shape), torch.zeros(shape)
    diagonal = torch.zeros(shape) if bands else None
    call = ScoresCall.pack(
        q=q,
        k=k,
        frames=frames,
        positions=positions,
        mass=mass,
        peak=peak,
        bands=diagonal,
        probes=probes,
        queries_per_probe=queries_per_probe,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_size=page_size,
        pages=pages,
        type=DTYPES[q.dtype],
        scale=scale,
    )
    kernels.keysift_column_scores(call, level(), num_threads())
    return ColumnScores(mass, peak, diagonal)


def _supports(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor, queries_per_probe: int) -> bool:
    return (
        all(tensor.is_cpu for tensor in (q, k, frames, positions))
        and all(tensor.dtype == q.dtype and tensor.stride(-1) == 1 for tensor in (q, k))
        and all(tensor.dtype == torch.int32 for tensor in (frames, positions))
        and q.dtype in DTYPES
        and q.shape[2] % 8 == 0
        and 0 < q.shape[2] <= 256
        and q.shape[0] == positions.shape[0] == frames.shape[0] * queries_per_probe
    )
