"""The inverted lists that are kept: of every full segment of a sequence, built when it is full or first searched."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...selection import Selection
from ..room import Block, Blocks, Room
from .lists import Lists, cluster

if TYPE_CHECKING:
    from ...contents import Contents
    from ...context import Context
    from ...spec import CacheSpec
    from ...step import Span

_ALL = 2**31
"""More segments than any row has."""


@dataclass(frozen=True, slots=True)
class _View:
    """The segments of a step, the same in all layers."""

    spans: tuple[Span, ...]
    version: int
    """Of the blocks."""
    rows: list[list[Block[Lists]]]
    """Of each span, as many as its tokens fill at the end of the step."""
    order: list[Block[Lists]]
    """All of them, each once."""
    places: Tensor
    """[R, W] int32, place in `order` of each row's segments."""
    complete: set[int]
    """Layers that have all lists."""


class Sizes(NamedTuple):
    """All that lists depend on besides keys; see `Ivf`."""

    segment: int
    tokens_per_list: int
    iterations: int


class Part(NamedTuple):
    """Rows of a step that are searched together, and their lists."""

    rows: Tensor | None
    """[r] int64; None: all rows."""
    lists: list[Lists]
    """Of all their segments."""
    places: Tensor
    """[r, W] int32, place in `lists` of each row's first W segments."""


@dataclass(frozen=True, slots=True)
class _Missing:
    """Lists that are to be built: of a segment that begins with this page of a row's sequence."""

    row: int
    page: int
    segment: Block[Lists]


class Segments:
    """Inverted lists by the contents of their segment, so that a shared prefix shares them."""

    def __init__(self, spec: CacheSpec, room: Room, sizes: Sizes) -> None:
        self.sizes = sizes
        self._spec = spec
        self._pages = sizes.segment // spec.page_size
        self._lists = sizes.segment // sizes.tokens_per_list
        self._blocks: Blocks[Lists] = Blocks(room)
        self._view: _View | None = None

    def __len__(self) -> int:
        """Segments."""
        return len(self._blocks)

    @property
    def bytes(self) -> int:
        return self._blocks.bytes

    def observe(self, q: Tensor, context: Context, rows: Sequence[int]) -> None:
        if not context.spec.window(context.layer):
            self._build(context, self._view_of(context), rows)

    def known(self, pages: Sequence[Contents]) -> int:
        return len(pages)

    def forget(self, frames: Set[int]) -> None:
        self._view = None
        self._blocks.forget(frames)

    claim = forget

    def clear(self) -> None:
        self._view = None
        self._blocks.clear()

    def of(self, context: Context) -> list[Part]:
        """The lists of all rows: one part, unless some lack lists for which there is no room.

        The tokens after a row's first segment without lists are scanned, those of no other row.
        """
        view, layer = self._view_of(context), context.layer
        self._build(context, view, range(len(view.rows)))
        if layer in view.complete:
            return [Part(None, [segment.parts[layer] for segment in view.order], view.places)]
        known = [_known(row, layer) for row in view.rows]
        widths = [width if width < len(row) else _ALL for width, row in zip(known, view.rows, strict=True)]
        return [_part(context, view, width, widths) for width in dict.fromkeys(widths)]

    def _view_of(self, context: Context) -> _View:
        step, view = context.step, self._view
        if view is None or view.spans is not step.spans or view.version != self._blocks.version:
            rows = [
                [self._blocks.at(step.contents(row, page, page + self._pages)) for page in self._begins(span)]
                for row, span in enumerate(step.spans)
            ]
            order, places = _numbered(rows, step.starts.device)
            places = places.expand(step.num_rows, -1)
            self._view = view = _View(step.spans, self._blocks.version, rows, order, places, set())
        return view

    def _begins(self, span: Span) -> range:
        """First pages of the segments that the span's sequence fills."""
        return range(0, span.stop // self._spec.page_size - self._pages + 1, self._pages)

    def _build(self, context: Context, view: _View, rows: Sequence[int]) -> None:
        """Build the lists that this layer still lacks, as far as there is room; the step's keys are cached already."""
        if context.layer in view.complete:
            return
        missing = {
            segment: _Missing(row, number * self._pages, segment)
            for row in rows
            for number, segment in enumerate(view.rows[row])
            if context.layer not in segment.parts
        }
        fitting = self._fitting(list(missing.values()))
        if fitting:
            self._cluster(context, fitting)
        if len(rows) == len(view.rows) and len(fitting) == len(missing):
            view.complete.add(context.layer)

    def _fitting(self, missing: list[_Missing]) -> list[_Missing]:
        """The first ones that there is room for."""
        room, sizes = self._blocks.room, list(accumulate(self._bytes + each.segment.least for each in missing))
        if not sizes or room.make(sizes[-1]):
            return missing
        count = bisect(sizes, room.available)
        return missing[:count] if count and room.make(sizes[count - 1]) else []

    @property
    def _bytes(self) -> int:
        """Bytes of one segment's lists in a layer."""
        spec = self._spec
        each = self._lists * (spec.head_dim * spec.dtype.itemsize + 4) + 2 * self._pages * spec.page_size
        return spec.num_kv_heads * each

    def _cluster(self, context: Context, missing: list[_Missing]) -> None:
        frames = context.fetch(self._selection(context, missing))
        tables = [frames.table[each.row, :, each.page : each.page + self._pages] for each in missing]
        made = cluster(frames.k, torch.stack(tables), lists=self._lists, iterations=self.sizes.iterations)
        for each, lists in zip(missing, made, strict=True):
            each.segment.put(context.layer, lists, self._bytes)

    def _selection(self, context: Context, missing: list[_Missing]) -> Selection:
        """The pages of these segments and no others."""
        mask = torch.zeros(context.step.num_rows, 1, context.step.max_pages, dtype=torch.bool)
        for each in missing:
            mask[each.row, :, each.page : each.page + self._pages] = True
        heads = mask.expand(-1, self._spec.num_kv_heads, -1)
        return Selection.from_mask(heads.to(context.step.starts.device))


def _known(segments: list[Block[Lists]], layer: int) -> int:
    """Number of first segments that have lists."""
    return next((number for number, segment in enumerate(segments) if layer not in segment.parts), len(segments))


def _part(context: Context, view: _View, width: int, widths: list[int]) -> Part:
    """The rows that have lists of so many first segments."""
    numbers = [number for number, own in enumerate(widths) if own == width]
    step, device = context.step, context.step.starts.device
    order, places = _numbered([view.rows[number][:width] for number in numbers], device)
    lists = [segment.parts[context.layer] for segment in order]
    if len(numbers) == len(widths):
        return Part(None, lists, places.expand(step.num_rows, -1))
    return Part(torch.tensor(numbers, device=device), lists, places)


def _numbered(rows: list[list[Block[Lists]]], device: torch.device) -> tuple[list[Block[Lists]], Tensor]:
    """The segments of some spans, each once, and [spans, W] int32, the place of each one's."""
    order = list(dict.fromkeys(segment for row in rows for segment in row))
    place_of = {segment: place for place, segment in enumerate(order)}
    width = max(map(len, rows))
    padded = [[place_of[segment] for segment in row] + [0] * (width - len(row)) for row in rows]
    return order, torch.tensor(padded, dtype=torch.int32, device=device).view(len(rows), width)
