"""An index of inverted lists: clusters of keys, of which a query scans the nearest.

As in Liu et al., "RetroInfer", arXiv 2505.02922, keys are clustered segment by segment, but by distance rather than by
angle, and each query head scans lists of its own, which finds more keys for the same number of products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..blocks import Blocks
from .lists import Lists, cluster, list_masses

if TYPE_CHECKING:
    from ...context import Context
    from ...selection import Selection
    from ...spec import CacheSpec
    from ...step import Step

Segment = dict[int, Lists]
"""The lists of a segment, by layer, as far as they are built."""


@dataclass(frozen=True, slots=True)
class Ivf:
    """Scans the `nprobe` nearest lists of each query head, and all keys that no list covers yet."""

    scans: ClassVar[bool] = True
    host: ClassVar[bool] = False

    segment: int = 2048
    """Tokens clustered together, counted from the start of a sequence, so that a shared prefix shares its lists."""
    tokens_per_list: int = 16
    """Mean length of a list."""
    nprobe: int = 64
    """Lists that a query head scans. 64 find 96 % of the 100 best keys among 6,000, 32 find 88 %; longer contexts need
    few more."""
    iterations: int = 4
    """Most iterations of k-means. 16 add 0.1 % to the keys found, 2 lose 0.6 %."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for a number out of range and for lists that do not fill a segment."""
        if min(self.segment, self.tokens_per_list, self.nprobe, self.iterations) < 1:
            raise ValueError("ivf: all options are at least 1")
        if self.segment % self.tokens_per_list or self.segment > 2**15:
            raise ValueError(f"ivf: segment {self.segment} is no multiple of {self.tokens_per_list}, or above {2**15}")

    def make(self, spec: CacheSpec) -> IvfIndex:
        if self.segment % spec.page_size:
            raise ValueError(f"ivf: segment {self.segment} is no multiple of the page size {spec.page_size}")
        return IvfIndex(self, spec)


@dataclass(frozen=True, slots=True)
class _View:
    """The segments of a step, the same in all layers."""

    step: Step
    everything: Selection
    rows: list[list[Segment]]
    """Of each span, as many as its tokens fill at the end of the step."""
    segments: list[Segment]
    """All of them, each once."""
    places: Tensor
    """[R, W] int32, place in `segments` of each row's segments."""
    complete: set[int]
    """Layers whose lists are all built."""


class IvfIndex:
    """Inverted lists of all segments of a cache's sequences, built when a segment is full or at its first query."""

    estimates_mass: ClassVar[bool] = False

    def __init__(self, options: Ivf, spec: CacheSpec) -> None:
        self.options = options
        self._pages = options.segment // spec.page_size
        self.segments: Blocks[Segment] = Blocks()
        self._view: _View | None = None

    def masses(self, q: Tensor, context: Context) -> Tensor:
        """[R, Hq, F], by all keys that were scanned."""
        view, options = self._view_of(context), self.options
        self._build(context, view)
        frames = context.fetch(view.everything)
        return list_masses(
            *(q, frames.k, frames.table, context.step.starts),
            [segment[context.layer] for segment in view.segments],
            view.places,
            scale=context.spec.softmax_scale,
            segment=options.segment,
            probes=options.nprobe,
        )

    def observe(self, q: Tensor, context: Context) -> None:
        if not context.spec.window(context.layer):
            self._build(context, self._view_of(context))

    def forget(self, frames: Sequence[int]) -> None:
        self._view = None
        self.segments.forget(frames)

    def _view_of(self, context: Context) -> _View:
        if self._view is None or self._view.step is not context.step:
            self._view = self._make_view(context)
        return self._view

    def _make_view(self, context: Context) -> _View:
        step = context.step
        rows = [self._segments_of(held, span.stop) for held, span in zip(step.held, step.spans, strict=True)]
        segments = list({id(segment): segment for row in rows for segment in row}.values())
        place_of = {id(segment): place for place, segment in enumerate(segments)}
        width = max(len(row) for row in rows)
        padded = [[place_of[id(segment)] for segment in row] + [0] * (width - len(row)) for row in rows]
        places = torch.tensor(padded, dtype=torch.int32, device=step.starts.device).view(len(rows), width)
        return _View(step, context.all(), rows, segments, places.expand(step.num_rows, -1), set())

    def _segments_of(self, frames: Sequence[int], tokens: int) -> list[Segment]:
        """The segments that a sequence's first tokens fill."""
        return [
            self._segment_of(tuple(frames[start : start + self._pages]))
            for start in range(0, tokens // self.options.segment * self._pages, self._pages)
        ]

    def _segment_of(self, frames: tuple[int, ...]) -> Segment:
        if (segment := self.segments.get(None, frames)) is None:
            segment = {}
            self.segments.put(None, frames, segment)
        return segment

    def _build(self, context: Context, view: _View) -> None:
        """Build the lists that this layer still lacks; the step's keys are cached already."""
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
            count = self.options.segment // self.options.tokens_per_list
            made = cluster(frames.k, torch.stack(tables), lists=count, iterations=self.options.iterations)
            for (_, _, segment), lists in zip(missing.values(), made, strict=True):
                segment[context.layer] = lists
        view.complete.add(context.layer)
