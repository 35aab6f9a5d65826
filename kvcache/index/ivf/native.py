"""The CPU twins of `cluster` and `list_masses`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...native.calls import DTYPES, ClusterCall, ProbeCall
from ...native.cores import num_threads
from ...native.library import kernels, level
from ...ops.dispatch import UnsupportedCall
from .lists import Lists


def cluster(k: Tensor, frames: Tensor, *, lists: int, iterations: int) -> list[Lists]:
    """See the reference; `UnsupportedCall` off the CPU, and for head dims, segments and lists that do not fit."""
    (segments, heads, pages), (page_size, dim) = frames.shape, k.shape[2:]
    if not _supports_keys(k, frames) or not 0 < pages * page_size <= 2**15 or min(lists, iterations) < 1:
        raise UnsupportedCall
    centroids = torch.empty((segments, heads, lists, dim), dtype=k.dtype)
    ends = torch.empty((segments, heads, lists), dtype=torch.int32)
    tokens = torch.empty((segments, heads, pages * page_size), dtype=torch.int16)
    call = ClusterCall.pack(
        k=k,
        frames=frames,
        centroids=centroids,
        ends=ends,
        tokens=tokens,
        segments=segments,
        kv_heads=heads,
        dim=dim,
        page_size=page_size,
        pages=pages,
        lists=lists,
        iterations=iterations,
        type=DTYPES[k.dtype],
    )
    kernels.keysift_cluster(call, level(), num_threads())
    return [Lists(*(part[i].clone() for part in (centroids, ends, tokens))) for i in range(segments)]


def list_masses(
    q: Tensor,
    k: Tensor,
    frames: Tensor,
    positions: Tensor,
    lists: Sequence[Lists],
    places: Tensor,
    *,
    scale: float,
    segment: int,
    probes: int,
) -> Tensor:
    """See the reference; `UnsupportedCall` off the CPU, for unequal dtypes, and head dims or lists of odd sizes."""
    if not _supports(q, k, frames, positions, lists, places) or probes < 1:
        raise UnsupportedCall
    rows, heads, dim = q.shape
    pages = frames.shape[2]
    masses = torch.empty((rows, heads, pages))
    call = ProbeCall.pack(
        q=q,
        k=k,
        frames=frames,
        positions=positions,
        places=places,
        centroids=[part.centroids for part in lists],
        ends=[part.ends for part in lists],
        tokens=[part.tokens for part in lists],
        masses=masses,
        rows=rows,
        heads=heads,
        kv_heads=k.shape[1],
        dim=dim,
        page_size=k.shape[2],
        pages=pages,
        width=places.shape[1],
        segment=segment,
        lists=lists[0].centroids.shape[1] if lists else 0,
        probes=min(probes, 2**31 - 1),
        type=DTYPES[q.dtype],
        scale=scale,
    )
    kernels.keysift_probe(call, level(), num_threads())
    return masses


def _supports_keys(k: Tensor, frames: Tensor) -> bool:
    return (
        k.is_cpu
        and frames.is_cpu
        and frames.dtype == torch.int32
        and k.dtype in DTYPES
        and k.stride(3) == 1
        and k.shape[3] % 32 == 0
        and k.shape[3] <= 256
    )


def _supports(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor, lists: Sequence[Lists], places: Tensor) -> bool:
    return (
        _supports_keys(k, frames)
        and q.is_cpu
        and q.dtype == k.dtype
        and q.stride(2) == 1
        and q.shape[1] <= 32 * k.shape[1]
        and positions.is_cpu
        and positions.is_contiguous()
        and places.is_cpu
        and (places.shape[1] <= 1 or places.stride(1) == 1)
        and all(tensor.dtype == torch.int32 for tensor in (positions, places))
        and (not lists or lists[0].centroids.shape[1] % 4 == 0)
    )
