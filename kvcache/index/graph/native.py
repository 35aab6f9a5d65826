"""The CPU twins of `keysift.kvcache.index.graph.ops`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ...native.cores import num_threads
from ...native.library import DTYPES, GraphLinksCall, GraphNearestCall, GraphSearchCall, kernels, level
from .ops import Found, KeyGraph, Reach


def search_graphs(
    q: Tensor,
    k: Tensor,
    frames: Tensor,
    positions: Tensor,
    graphs: Sequence[KeyGraph | None],
    reach: Reach,
    scale: float,
) -> Found:
    """See the reference; `NotImplemented` off the CPU, for unequal dtypes and for head dims that do not fit."""
    if not _supports(q, k) or frames.dtype != torch.int32 or q.shape[1] > 64 * k.shape[1]:
        return NotImplemented  # type: ignore[no-any-return]
    rows, heads, dim = q.shape
    positions = positions.contiguous()
    hits = (rows, heads, reach.top_k)
    keys, scores = torch.empty(hits, dtype=torch.int32), torch.empty(hits)
    scanned, masses = torch.empty(hits[:2], dtype=torch.int32), torch.empty(*hits[:2], frames.shape[2])
    sizes = [(0, 0, 0) if graph is None else (graph.tokens, graph.hubs, graph.entries) for graph in graphs]
    ends, hubs, entries = torch.tensor(sizes, dtype=torch.int32).T.contiguous()
    links, points = ((ctypes.c_void_p * rows)(*of) for of in zip(*map(_addresses, graphs), strict=True))
    call = GraphSearchCall(
        *(tensor.data_ptr() for tensor in (q, k, frames, positions, ends, hubs, entries)),
        ctypes.addressof(links),
        ctypes.addressof(points),
        *(tensor.data_ptr() for tensor in (keys, scores, scanned, masses)),
        *(tensor.stride()[:axes] for tensor, axes in ((q, 2), (k, 3), (frames, 3))),
        *(rows, heads, k.shape[1], dim, k.shape[2], frames.shape[2]),
        *(reach.degree, reach.beam, reach.top_k, reach.sink, reach.window, DTYPES[q.dtype]),
        scale,
    )
    kernels.keysift_graph_search(ctypes.byref(call), level(), num_threads())
    return Found(keys, scores, scanned, masses)


def nearest_keys(q: Tensor, k: Tensor, frames: Tensor, first: int, end: int, wanted: int, threads: int = 0) -> Tensor:
    """See the reference; `NotImplemented` as above."""
    if not _supports(q, k):
        return NotImplemented  # type: ignore[no-any-return]
    q, frames = q.contiguous(), frames.contiguous()
    nearest = torch.empty((*q.shape[:2], wanted), dtype=torch.int32)
    call = GraphNearestCall(
        *(tensor.data_ptr() for tensor in (q, k, frames, nearest)),
        k.stride()[:3],
        *(*q.shape, k.shape[2], wanted, first, end, DTYPES[q.dtype]),
    )
    kernels.keysift_graph_nearest(ctypes.byref(call), level(), threads or num_threads())
    return nearest


def link_keys(nearest: Tensor, tokens: int, degree: int, threads: int = 0) -> Tensor:
    """See the reference; `NotImplemented` off the CPU."""
    if not nearest.is_cpu:
        return NotImplemented  # type: ignore[no-any-return]
    nearest = nearest.contiguous()
    links = torch.empty((nearest.shape[0], tokens, degree), dtype=torch.int32)
    call = GraphLinksCall(nearest.data_ptr(), links.data_ptr(), *nearest.shape, tokens, degree)
    kernels.keysift_graph_links(ctypes.byref(call), level(), threads or num_threads())
    return links


def _addresses(graph: KeyGraph | None) -> tuple[int | None, int | None]:
    return (None, None) if graph is None else (graph.links.data_ptr(), graph.points.data_ptr())


def _supports(q: Tensor, k: Tensor) -> bool:
    """Vectors of all instruction sets fill a head of a multiple of 16 channels."""
    return (
        q.is_cpu
        and k.is_cpu
        and q.dtype == k.dtype
        and q.dtype in DTYPES
        and q.shape[-1] % 16 == 0
        and q.stride(-1) == k.stride(-1) == 1
    )
