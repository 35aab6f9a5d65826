"""The CPU twins of `keysift.kvcache.index.ivf.lists`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ...native.cores import num_threads
from ...native.library import DTYPES, ClusterCall, ProbeCall, kernels, level
from ..hits import Hits
from .lists import Lists


def cluster(k: Tensor, frames: Tensor, *, lists: int, iterations: int) -> list[Lists]:
    """See the reference; `NotImplemented` off the CPU and for head dims that do not fit."""
    if not _fit(k, frames):
        return NotImplemented  # type: ignore[no-any-return]
    segments, heads, pages = frames.shape
    centroids = torch.empty((segments, heads, lists, k.shape[3]), dtype=k.dtype)
    ends = torch.empty((segments, heads, lists), dtype=torch.int32)
    tokens = torch.empty((segments, heads, pages * k.shape[2]), dtype=torch.int16)
    call = ClusterCall(
        *(tensor.data_ptr() for tensor in (k, frames, centroids, ends, tokens)),
        k.stride()[:3],
        frames.stride(),
        segments,
        heads,
        k.shape[3],
        k.shape[2],
        pages,
        lists,
        iterations,
        DTYPES[k.dtype],
    )
    kernels.keysift_cluster(ctypes.byref(call), level(), num_threads())
    return [Lists(*(part[i].clone() for part in (centroids, ends, tokens))) for i in range(segments)]


def list_masses(
    q: Tensor,
    k: Tensor,
    frames: Tensor,
    positions: Tensor,
    lists: Sequence[Lists],
    which: Tensor,
    *,
    scale: float,
    segment: int,
    probes: int,
) -> Tensor:
    """See the reference; `NotImplemented` where `list_hits` is."""
    if not _supports(q, k, frames, positions, lists, which):
        return NotImplemented  # type: ignore[no-any-return]
    masses = torch.empty((q.shape[0], q.shape[1], frames.shape[2]))
    out = (None, None, None, masses.data_ptr())
    _probe(q, k, frames, positions, lists, which, out, segment, probes, 1, scale)
    return masses


def list_hits(
    q: Tensor,
    k: Tensor,
    frames: Tensor,
    positions: Tensor,
    lists: Sequence[Lists],
    which: Tensor,
    *,
    scale: float,
    segment: int,
    probes: int,
    top_k: int,
) -> Hits:
    """See the reference; `NotImplemented` off the CPU, for unequal dtypes, for head dims and lists that do not fit."""
    if not _supports(q, k, frames, positions, lists, which):
        return NotImplemented  # type: ignore[no-any-return]
    shape = (q.shape[0], q.shape[1], top_k)
    hits = Hits(torch.empty(shape, dtype=torch.int32), torch.empty(shape), torch.empty(shape[:2], dtype=torch.int32))
    out = (*(tensor.data_ptr() for tensor in hits), None)
    _probe(q, k, frames, positions, lists, which, out, segment, probes, top_k, scale)
    return hits


def _probe(
    q: Tensor,
    k: Tensor,
    frames: Tensor,
    positions: Tensor,
    lists: Sequence[Lists],
    which: Tensor,
    out: tuple[int | None, ...],
    segment: int,
    probes: int,
    top_k: int,
    scale: float,
) -> None:
    parts = [(ctypes.c_void_p * len(lists))(*(part[i].data_ptr() for part in lists)) for i in range(3)]
    call = ProbeCall(
        *(tensor.data_ptr() for tensor in (q, k, frames, positions, which)),
        *(ctypes.addressof(part) for part in parts),
        *out,
        *(tensor.stride()[:axes] for tensor, axes in ((q, 2), (k, 3), (frames, 3))),
        which.stride(0),
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        k.shape[2],
        frames.shape[2],
        which.shape[1],
        segment,
        lists[0].centroids.shape[1] if lists else 0,
        probes,
        top_k,
        DTYPES[q.dtype],
        scale,
    )
    kernels.keysift_probe(ctypes.byref(call), level(), num_threads())


def _fit(k: Tensor, frames: Tensor) -> bool:
    return (
        k.is_cpu
        and frames.is_cpu
        and frames.dtype == torch.int32
        and k.dtype in DTYPES
        and k.stride(3) == 1
        and k.shape[3] % 32 == 0
        and k.shape[3] <= 256
    )


def _supports(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor, lists: Sequence[Lists], which: Tensor) -> bool:
    return (
        _fit(k, frames)
        and q.is_cpu
        and q.dtype == k.dtype
        and q.stride(2) == 1
        and q.shape[1] <= 32 * k.shape[1]
        and positions.is_cpu
        and positions.is_contiguous()
        and (which.shape[1] <= 1 or which.stride(1) == 1)
        and all(tensor.dtype == torch.int32 for tensor in (positions, which))
        and (not lists or lists[0].centroids.shape[1] % 4 == 0)
    )
