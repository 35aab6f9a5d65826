"""The CPU twins of `search_graphs`, `nearest_keys` and `link_keys`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...native.calls import DTYPES, GraphLinksCall, GraphNearestCall, GraphSearchCall
from ...native.cores import num_threads
from ...native.library import kernels, level
from ...ops.dispatch import UnsupportedCall
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
    """See the reference; `UnsupportedCall` off the CPU, for unequal dtypes and for head dims that do not fit."""
    tables = frames.dtype == positions.dtype == torch.int32 and frames.is_cpu and positions.is_cpu
    if not (_supports(q, k) and tables and q.shape[1] <= 64 * k.shape[1] and min(reach.beam, reach.top_k) > 0):
        raise UnsupportedCall
    rows, heads, dim = q.shape
    pages = frames.shape[2]
    positions = positions.contiguous()
    reach = reach.within(pages * k.shape[2])
    found = _empty(rows, heads, reach.top_k, pages)
    sizes = [(0, 0, 0) if graph is None else (graph.tokens, graph.hubs, graph.entries) for graph in graphs]
    ends, hubs, entries = torch.tensor(sizes, dtype=torch.int32).T.contiguous()
    call = GraphSearchCall.pack(
        q=q,
        k=k,
        frames=frames,
        positions=positions,
        ends=ends,
        hubs=hubs,
        entries=entries,
        links=[None if graph is None else graph.links for graph in graphs],
        points=[None if graph is None else graph.points for graph in graphs],
        **found._asdict(),
        rows=rows,
        heads=heads,
        kv_heads=k.shape[1],
        dim=dim,
        page_size=k.shape[2],
        pages=pages,
        **reach._asdict(),
        type=DTYPES[q.dtype],
        scale=scale,
    )
    kernels.keysift_graph_search(call, level(), num_threads())
    return found


def nearest_keys(q: Tensor, k: Tensor, frames: Tensor, first: int, end: int, wanted: int, threads: int = 0) -> Tensor:
    """See the reference; `UnsupportedCall` as `search_graphs`."""
    if not (_supports(q, k) and frames.dtype == torch.int32 and frames.is_cpu and wanted > 0):
        raise UnsupportedCall
    q, frames = q.contiguous(), frames.contiguous()
    kv_heads, queries, dim = q.shape
    nearest = torch.empty((kv_heads, queries, wanted), dtype=torch.int32)
    call = GraphNearestCall.pack(
        q=q,
        k=k,
        frames=frames,
        nearest=nearest,
        kv_heads=kv_heads,
        queries=queries,
        dim=dim,
        page_size=k.shape[2],
        wanted=wanted,
        first=first,
        end=end,
        type=DTYPES[q.dtype],
    )
    kernels.keysift_graph_nearest(call, level(), threads or num_threads())
    return nearest


def link_keys(nearest: Tensor, tokens: int, degree: int, threads: int = 0) -> Tensor:
    """See the reference; `UnsupportedCall` off the CPU."""
    if not nearest.is_cpu or nearest.dtype != torch.int32:
        raise UnsupportedCall
    nearest = nearest.contiguous()
    kv_heads, queries, wanted = nearest.shape
    links = torch.empty((kv_heads, tokens, degree), dtype=torch.int32)
    call = GraphLinksCall.pack(
        nearest=nearest,
        links=links,
        kv_heads=kv_heads,
        queries=queries,
        wanted=wanted,
        tokens=tokens,
        degree=degree,
    )
    kernels.keysift_graph_links(call, level(), threads or num_threads())
    return links


def _empty(rows: int, heads: int, top_k: int, pages: int) -> Found:
    return Found(
        keys=torch.empty((rows, heads, top_k), dtype=torch.int32),
        scores=torch.empty((rows, heads, top_k)),
        scanned=torch.empty((rows, heads), dtype=torch.int32),
        masses=torch.empty((rows, heads, pages)),
    )


def _supports(q: Tensor, k: Tensor) -> bool:
    """Support of all three kernels; vectors of every instruction set fill a head of a multiple of 16 channels."""
    return (
        q.is_cpu
        and k.is_cpu
        and q.dtype == k.dtype
        and q.dtype in DTYPES
        and q.shape[-1] % 16 == 0
        and q.stride(-1) == k.stride(-1) == 1
    )
