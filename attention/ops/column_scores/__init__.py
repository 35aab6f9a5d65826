"""Exact attention mass of a few probe queries, page by page, for selections."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keysift.kvcache.ops.dispatch import op


class ColumnScores(NamedTuple):
    """Attention of each probe's queries, [B, Hq, F] fp32 each. A probe without queries has zeros."""

    mass: Tensor
    """Mean over the queries of the mass that each page holds; sums to 1."""
    peak: Tensor
    """The greatest mass that any of the queries gives each page."""
    bands: Tensor | None
    """Mean mass on each diagonal band: keys `b * S ... (b + 1) * S - 1` tokens before the query; sums to 1."""


@op(
    native="keysift.attention.ops.column_scores.native:column_scores",
    triton="keysift.attention.ops.column_scores.triton:column_scores",
)
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
    """Causal softmax masses of probes, pooled over their queries, without anything of size [queries, tokens].

    Probe b is the queries ``b * m ... (b + 1) * m - 1``, at any positions. Accumulates in fp32; tokens that
    no query sees never reach a result, not even as NaN.

    Args:
        q: [B * m, Hq, D], any strides with a contiguous last axis.
        k: [N, Hkv, S, D], frames of keys after rotary embedding, in q's dtype.
        frames: [B, Hkv, F] int32, page -> frame of each probe's sequence; axes may have stride 0. Pages that none of a
            probe's queries sees may hold anything that is a frame.
        positions: [B * m] int32, position of each query, at most F * S - 1; it sees all keys up to there. -1: there
            is no such query. Those of a probe ascend, absent ones anywhere: a twin may sum by position, and only in
            this order are a probe's bits the same whatever the other probes are.
        queries_per_probe: m.
        scale: factor of the scores.
        bands: compute the diagonal bands too.
    """
    num_probes, max_pages = frames.shape[0], frames.shape[2]
    shape = (num_probes, q.shape[1], max_pages)
    mass, peak = (torch.zeros(shape, device=q.device) for _ in range(2))
    diagonal = torch.zeros(shape, device=q.device) if bands else None
    for b in range(num_probes):
        queries = slice(b * queries_per_probe, (b + 1) * queries_per_probe)
        where = positions[queries].long()
        weights = _softmax(q[queries].float(), _keys(k, frames[b]), where, scale)  # [m, Hq, F * S]
        count = (where >= 0).sum().clamp(min=1)
        pages = torch.unflatten(weights, -1, (max_pages, -1)).sum(-1)
        mass[b], peak[b] = pages.sum(0) / count, pages.amax(0)
        if diagonal is not None:
            diagonal[b] = _bands(weights, where, k.shape[2], max_pages) / count
    return ColumnScores(mass, peak, diagonal)


def _keys(k: Tensor, frames: Tensor) -> Tensor:
    """frames [Hkv, F] -> [Hkv, F * S, D] fp32"""
    heads = torch.arange(k.shape[1], device=k.device)[:, None]
    return k[frames.long(), heads].flatten(1, 2).float()


def _softmax(q: Tensor, keys: Tensor, where: Tensor, scale: float) -> Tensor:
    """q [m, Hq, D] over keys [Hkv, J, D] -> causal weights [m, Hq, J]; all zeros for an absent query."""
    grouped = torch.unflatten(q, 1, (keys.shape[0], -1))  # [m, Hkv, G, D]
    scores = torch.einsum("mkgd,kjd->mkgj", grouped, keys).flatten(1, 2) * scale
    hidden = torch.arange(keys.shape[1], device=q.device) > where[:, None]
    scores = scores.masked_fill(hidden[:, None], float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    return torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0))


def _bands(weights: Tensor, where: Tensor, page_size: int, max_pages: int) -> Tensor:
    """weights [m, Hq, J] summed over the queries by their distance from the query -> [Hq, F]."""
    distance = where[:, None] - torch.arange(weights.shape[-1], device=weights.device)
    band = (distance.clamp(min=0) // page_size)[:, None].expand(weights.shape)
    summed = weights.new_zeros(*weights.shape[:2], max_pages).scatter_add_(-1, band, weights)
    return summed.sum(0)
