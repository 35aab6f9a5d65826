"""Probes: exact attention of a few queries of a prompt chunk, as evidence to select pages by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import Context, Step
from keysift.kvcache.transfer import to_device

from .ops.column_scores import column_scores


@dataclass(frozen=True, slots=True)
class Probe:
    """Exact attention masses, [B, Hq, F] fp32 as from `column_scores`; the queries of a probe lie within one row."""

    mass: Tensor
    peak: Tensor
    bands: Tensor | None
    rows: Tensor
    """[B] int64, ascending: the row of the step that each probe's queries lie in; the last row has a probe."""
    counts: Tensor
    """[B] int64, queries of each probe."""

    @property
    def columns(self) -> Tensor:
        """[Hq, F], mean mass of each page over all queries."""
        return self._mean(self.mass)

    @property
    def diagonals(self) -> Tensor:
        """[Hq, F], mean mass of each diagonal band over all queries; needs ``take(..., bands=True)``."""
        assert self.bands is not None
        return self._mean(self.bands)

    def kept(self, mask: Tensor) -> Tensor:
        """[B, Hq], the share of each probe's attention on the pages of mask [R, Hq, F]."""
        return (self.mass * mask[self.rows]).sum(-1)

    def to_rows(self, each: Tensor, num_rows: int) -> Tensor:
        """Values of probes [B, ...] for rows [R, ...]: each row has that of the first probe at or after it."""
        rows = torch.arange(num_rows, device=each.device)
        return each[torch.searchsorted(self.rows, rows)]

    def _mean(self, each: Tensor) -> Tensor:
        return torch.einsum("bhf,b->hf", each, self.counts / self.counts.sum())


def take(q: Tensor, context: Context, queries: Tensor, *, bands: bool = False) -> Probe:
    """Probe the chunk: exact attention of some of its queries over all keys so far.

    Args:
        q: [T, Hq, D], the chunk's queries.
        queries: [B, m] int64, indices into the chunk, -1 for padding; a probe's within one row, probes ascending.
        bands: also sum the masses along diagonals.
    """
    step = context.step
    frames = context.fetch(context.all())
    index, valid = queries.clamp(min=0).flatten(), queries >= 0
    scores = column_scores(
        q[index],
        frames.k,
        frames.table[:1].expand(queries.shape[0], -1, -1),
        torch.where(valid.flatten(), step.positions[index], -1).int(),
        queries_per_probe=queries.shape[1],
        scale=context.spec.softmax_scale,
        bands=bands,
    )
    return Probe(*scores, rows=queries.amax(1) // step.queries_per_row, counts=valid.sum(1))


def every_row(step: Step, count: int) -> Tensor:
    """[R, count] int64: queries evenly spaced over each row, with its last one; without repetition in a full row."""
    width = step.queries_per_row
    count = min(count, width)
    picks = torch.arange(1, count + 1, device=step.starts.device) * width // count - 1
    rows = torch.arange(step.num_rows, device=step.starts.device)[:, None] * width
    return (rows + picks).clamp(max=step.positions.shape[0] - 1)


def tails(step: Step, count: int, segment: int = 0) -> Tensor:
    """[B, count] int64: the last queries of every `segment` tokens, by absolute position, and of the chunk; -1 pads.

    A last row that is shorter than `count` is joined by the row before it. Segments are multiples of the row's width;
    0: only the chunk's end.
    """
    width, tokens, first = step.queries_per_row, step.positions.shape[0], step.spans[0].start
    ends = [min(row * width, tokens) for row in range(1, step.num_rows + 1)]
    short = tokens - (step.num_rows - 1) * width < count
    chosen = [
        end
        for row, end in enumerate(ends)
        if row >= step.num_rows - 1 - short or (segment and (first + end) % segment == 0)
    ]
    stops = on_device(chosen, step)[:, None]
    queries = stops + torch.arange(-count, 0, device=stops.device)
    return queries.masked_fill(queries < (stops - 1) // width * width, -1)


def on_device(values: list[int] | list[list[int]], step: Step) -> Tensor:
    """Host integers as an int64 tensor on the step's device, copied without waiting for it."""
    return to_device(values, step.starts.device)
