"""XAttention: pages by sums over the antidiagonals of small tiles of scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import Context

from .. import patterns
from ..prompt import PromptStrategy
from ..strategy import Positive, Share, option

MOST_SCORES = 2**24
"""Numbers that are computed at once, or those of one row: a stride of 1 has as many as dense attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XAttention(PromptStrategy):
    """Pages that hold `threshold` of each row's attention, as antidiagonal sums of the scores estimate it.

    Scores are cut into tiles of `stride` queries by `stride` keys; each tile is rated by the mean score along its
    antidiagonal, which every column and every diagonal through the tile crosses once. A softmax over a group's tiles,
    summed over the groups of a row and the tiles of a page, is the mass that the threshold is compared with, row by row
    and head by head.

    Other than the published code: groups of queries begin with the row, wherever the chunk begins; an antidiagonal
    that a prompt's ragged end cuts short is the mean of what there is of it; forced pages come on top instead of
    counting into the threshold; one threshold serves all heads. A tile on the diagonal counts pairs on both sides of
    it, as published; it lies in the row's own pages, which are always read. The estimate costs ``1 / stride`` of the
    score half of dense attention. Nothing is computed exactly, so
    coverage comes from one query of each row.
    """

    source = "Xu et al., XAttention, arXiv 2503.16428"
    threshold: Share = option(0.9, "estimated attention mass to keep; 1: everything")
    stride: Positive = option(8, "side of a tile in tokens, cut to a common divisor with pages and rows")

    def choose(self, q: Tensor, context: Context) -> tuple[Tensor, None]:
        return patterns.cover(self.estimate(q, context), self.threshold), None

    def estimate(self, q: Tensor, context: Context) -> Tensor:
        """[R, Hq, F] fp32, the estimated mass of each page, summed over the row's groups of queries."""
        step = context.step
        stride = math.gcd(self.stride, step.page_size, step.queries_per_row)
        index = torch.arange(step.num_rows * step.queries_per_row, device=q.device)
        there, index = index < q.shape[0], index.clamp(max=q.shape[0] - 1)  # [R * M], the last row may be short
        keys, known = _keys(context)
        scores_of_row = q.shape[1] * (step.queries_per_row // stride) * (len(known) // stride)
        queries = max(1, MOST_SCORES // scores_of_row) * step.queries_per_row
        parts = zip(torch.split(index, queries), torch.split(there, queries), strict=True)
        return torch.cat([_masses(q, context, keys, known, *part, stride) for part in parts])


def _masses(
    q: Tensor, context: Context, keys: Tensor, known: Tensor, index: Tensor, there: Tensor, stride: int
) -> Tensor:
    """[R', Hq, F], masses for some rows, whose queries are at `index` where they are `there`; see `_keys`."""
    step = context.step
    scores = _antidiagonals(q[index].float() * there[:, None, None], keys, stride)  # [Hq, n, m]
    pairs = _antidiagonals(there.float()[:, None, None], known.float()[None, :, None], stride)[0]  # [n, m]
    lasts = step.positions[index[stride - 1 :: stride]]
    seen = (pairs > 0) & (torch.arange(0, len(known), stride, device=q.device) <= lasts[:, None])
    scores = (scores * context.spec.softmax_scale / pairs.clamp(min=1)).masked_fill(~seen, float("-inf"))
    mass = scores.softmax(-1).masked_fill(~seen.any(-1)[:, None], 0.0)
    pages = torch.unflatten(mass, 2, (step.max_pages, -1))
    tiles: Tensor = torch.unflatten(pages, 1, (-1, step.queries_per_row // stride))
    return tiles.sum((2, 4)).transpose(0, 1)


def _keys(context: Context) -> tuple[Tensor, Tensor]:
    """The sequence's keys in order, [Hkv, F * S, D] fp32, zeros after its end, and a mask [F * S] of those it has."""
    frames = context.fetch(context.all())
    heads = torch.arange(frames.k.shape[1], device=frames.k.device)[:, None]
    keys = frames.k[frames.table[0].long(), heads].flatten(1, 2).float()
    known = torch.arange(keys.shape[1], device=keys.device) <= context.step.lasts[-1]
    return keys.masked_fill(~known[:, None], 0.0), known  # unused slots may hold NaN


def _antidiagonals(q: Tensor, k: Tensor, stride: int) -> Tensor:
    """[Hq, n, m], for q [n * stride, Hq, D] and k [Hkv, m * stride, D], products summed along each tile's antidiagonal.

    Query i of a group meets key ``stride - 1 - i``: one matrix product of groups as long vectors, one of them reversed.
    """
    groups = torch.unflatten(q.transpose(0, 1), 1, (-1, stride)).flip(2).flatten(2)  # [Hq, n, stride * D]
    keys = torch.unflatten(k, 1, (-1, stride)).flatten(2)  # [Hkv, m, stride * D]
    shared = torch.unflatten(groups, 0, (k.shape[0], -1)).flatten(1, 2)  # [Hkv, G * n, stride * D]
    return torch.unflatten(shared @ keys.transpose(1, 2), 1, (-1, groups.shape[1])).flatten(0, 1)
