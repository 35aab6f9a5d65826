"""The CPU twin of `keysift.attention.ops.column_scores`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from keysift.kvcache.native.cores import num_threads
from keysift.kvcache.native.library import DTYPES, ScoresCall, kernels, level

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
    """See the reference; `NotImplemented` off the CPU, for unequal dtypes and for head dims that do not fit."""
    if not _supports(q, k, frames, positions, queries_per_probe):
        return NotImplemented  # type: ignore[no-any-return]
    positions = positions.contiguous()
    shape = (frames.shape[0], q.shape[1], frames.shape[2])
    mass, peak = torch.zeros(shape), torch.zeros(shape)
    diagonal = torch.zeros(shape) if bands else None
    call = ScoresCall(
        *(tensor.data_ptr() for tensor in (q, k, frames, positions, mass, peak)),
        None if diagonal is None else diagonal.data_ptr(),
        *(tensor.stride()[:axes] for tensor, axes in ((q, 2), (k, 3), (frames, 3))),
        frames.shape[0],
        queries_per_probe,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        k.shape[2],
        frames.shape[2],
        DTYPES[q.dtype],
        scale,
    )
    kernels.keysift_column_scores(ctypes.byref(call), level(), num_threads())
    return ColumnScores(mass, peak, diagonal)


def _supports(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor, queries_per_probe: int) -> bool:
    return (
        all(tensor.device.type == "cpu" for tensor in (q, k, frames, positions))
        and all(tensor.dtype == q.dtype and tensor.stride(-1) == 1 for tensor in (q, k))
        and all(tensor.dtype == torch.int32 for tensor in (frames, positions))
        and q.dtype in DTYPES
        and q.shape[2] % 8 == 0
        and 0 < q.shape[2] <= 256
        and q.shape[0] == positions.shape[0] == frames.shape[0] * queries_per_probe
    )
