"""Inverted lists: keys in clusters, of which a query scans the nearest.

Liu et al., "RetroInfer", arXiv 2505.02922, cluster keys segment by segment; so do we, but by distance rather than by
angle, and each query head has lists of its own: that finds more keys for the same number of products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..blocks import Blocks
from ..hits import Hits
from .lists import Lists, cluster, list_hits, list_masses

if TYPE_CHECKING:
    from ...context import Context
    from ...selection import Selection
    from ...spec import CacheSpec
    from ...step import Step

Segment = dict[int, Lists]
"""By layer, as far as they are built."""


@dataclass(frozen=True, slots=True)
class Ivf:
    """Scans the `nprobe` nearest lists of each query head, and all keys that no list covers yet."""

    scans: ClassVar[bool] = True
    host: ClassVar[bool] = False

    segment: int = 2048
    """Tokens that are clustered together, counted from the start of a sequence, so that a shared prefix shares them."""
    tokens_per_list: int = 16
    """On average."""
    nprobe: int = 64
    """Lists. 64 find 96 % of the 100 best keys among 6,000 and need few more in longer contexts; 32 find 88 %."""
    top_k: int = 100
    """Keys that `IvfIndex.search` keeps for each query head."""
    iterations: int = 4
    """Of k-means. More find no more: 16 add 0.1 % to the keys found, 2 lose 0.6 %."""

    def __post_init__(self) -> None:
        """Raises `ValueError` where a number is out of range or lists do not fill a segment."""
        if min(self.segment, self.tokens_per_list, self.nprobe, self.top_k, self.iterations) < 1:
            raise ValueError("ivf: all options are at least 1")
        if self.segment % self.tokens_per_list or self.segment > 2**15:
            raise ValueError(f"ivf: segment {self.segment} is no multiple of {self.tokens_per_list}, or above {2**15}")

    def make(self, spec: CacheSpec) -> IvfIndex:
        if self.segment % spec.page_size:
            raise ValueError(f"ivf: segment {self.segment} is no multiple of the page size {spec.page_size}")
        return IvfIndex(self, spec)


@dataclass(frozen=True, slots=True)
class _View:
    """What is the same in all layers of a step."""

    step: Step
    everything: Selection
    rows: list[list[Segment]]
    """Of each span, as many as its tokens fill when the step is done."""
    segments: list[Segment]
    """Each once."""
    which: Tensor
    """[R, W] int32, of each row's segments the place in `segments`."""
    complete: set[int]
    """Layers in which all are built."""


class IvfIndex:
    """The lists of all segments of a cache's sequences, built when a segment is full or when they are first needed."""

    estimates_mass: ClassVar[bool] = False

    def __init__(self, options: Ivf, spec: CacheSpec) -> None:
        self._options = options
        self._pages = options.segment // spec.page_size
        self._blocks: Blocks[Segment] = Blocks()
        self._view: _View | None = None

    def masses(self, q: Tensor, context: Context) -> Tensor:
        """By all keys that were scanned: more is known of a page than its hits tell."""
        return list_masses(*self._look(q, context), **self._numbers(context))

    def search(self, q: Tensor, context: Context) -> Hits:
        """The best keys for queries q [R, Hq, D], one in each row."""
        return list_hits(*self._look(q, context), **self._numbers(context), top_k=self._options.top_k)

    def observe(self, q: Tensor, context: Context) -> None:
        if not context.spec.window(context.layer):
            self._build(context, self._see(context))

    def forget(self, frames: Sequence[int]) -> None:
        self._view = None
        self._blocks.forget(frames)

    def _numbers(self, context: Context) -> dict[str, Any]:
        options = self._options
        return {"scale": context.spec.softmax_scale, "segment": options.segment, "probes": options.nprobe}

    def _look(self, q: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Lists], Tensor]:
        view = self._see(context)
        self._build(context, view)
        frames = context.fetch(view.everything)
        lists = [segment[context.layer] for segment in view.segments]
        return q, frames.k, frames.table, context.step.starts, lists, view.which

    def _see(self, context: Context) -> _View:
        if self._view is None or self._view.step is not context.step:
            self._view = self._make_view(context)
        return self._view

    def _make_view(self, context: Context) -> _View:
        step = context.step
        rows = [self._segments(held, span.stop) for held, span in zip(step.held, step.spans, strict=True)]
        segments = list({id(segment): segment for row in rows for segment in row}.values())
        places = {id(segment): place for place, segment in enumerate(segments)}
        width = max(len(row) for row in rows)
        which = [[places[id(segment)] for segment in row] + [0] * (width - len(row)) for row in rows]
        table = torch.tensor(which, dtype=torch.int32, device=step.starts.device).view(len(rows), width)
        return _View(step, context.all(), rows, segments, table.expand(step.num_rows, -1), set())

    def _segments(self, frames: Sequence[int], tokens: int) -> list[Segment]:
        """Those that a sequence's first tokens fill."""
        return [
            self._segment(tuple(frames[start : start + self._pages]))
            for start in range(0, tokens // self._options.segment * self._pages, self._pages)
        ]

    def _segment(self, frames: tuple[int, ...]) -> Segment:
        if (segment := self._blocks.get(None, frames)) is None:
            segment = {}
            self._blocks.put(None, frames, segment)
        return segment

    def _build(self, context: Context, view: _View) -> None:
        """Cluster what this layer still lacks; the step's keys are cached by now."""
        if context.layer in view.complete:
            return
        missing = {
            id(segment): (row, start * self._pages, segment)
            for row, segments in enumerate(view.rows)
            for start, segment in enumerate(segments)
            if context.layer not in segment
        }
        if missing:
            frames = context.fetch(view.everything)
            tables = [frames.table[row, :, page : page + self._pages] for row, page, _ in missing.values()]
            count = self._options.segment // self._options.tokens_per_list
            made = cluster(frames.k, torch.stack(tables), lists=count, iterations=self._options.iterations)
            for (_, _, segment), lists in zip(missing.values(), made, strict=True):
                segment[context.layer] = lists
        view.complete.add(context.layer)
