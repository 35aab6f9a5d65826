"""Training queries of graphs, kept with the pages of their tokens: few, and more widely apart in longer contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..room import BLOCK_BYTES, Blocks, Room

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence, Set

    from ...contents import Contents
    from ...context import Context
    from ...spec import CacheSpec

PAGES = 0
"""Layer under which a block keeps the queries of all layers."""


class KeptQueries:
    """Queries of evenly spaced tokens, such that every graph finds at most `most` over its own tokens.

    A graph over more tokens takes queries that are further apart, by a power of two. So a token's query is kept where
    some graph over it takes it: which graph depends on positions alone, and so does what is kept, whoever computes the
    page and however its prompt is cut.
    """

    def __init__(self, spec: CacheSpec, room: Room, most: int, grain: int) -> None:
        """`grain`: pages by which graphs grow; the least has two."""
        self._most, self._grain, self._size = most, grain, spec.page_size
        layers = [layer for layer in range(spec.num_layers) if not spec.window(layer)]
        self._place = {layer: place for place, layer in enumerate(layers)}
        self._blocks: Blocks[Tensor] = Blocks(room)
        self._least = BLOCK_BYTES + len(layers) * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize
        self.users: set[object] = set()
        """Those who train graphs by them."""

    @property
    def bytes(self) -> int:
        return self._blocks.bytes

    def claim(self, frames: Set[int]) -> None:
        """Forget the queries of frames that are about to hold other pages."""
        self._blocks.forget(frames)

    def leave(self, user: object) -> None:
        """Forget all queries if no other user is left."""
        self.users.discard(user)
        if not self.users:
            self._blocks.clear()

    def add(self, q: Tensor, context: Context, row: int, first: int) -> None:
        """Keep some of the queries of a row's span, which begin at q[first]; of a page all in all layers, or none."""
        step, span = context.step, context.step.spans[row]
        for page in range(span.start // self._size, -(-span.stop // self._size)) if self._most else ():
            places = self._positions(page)
            new = [position for position in places if span.start <= position < span.stop]
            if not new:
                continue
            at, start, layer = places.index(new[0]), first + new[0] - span.start, self._place[context.layer]
            contents = step.contents(row, page, page + 1)
            if at == layer == 0:  # later ones would leave gaps
                self._begin(contents, len(places), q)
            if (block := self._blocks.get(contents)) is not None:
                block.parts[PAGES][layer, at : at + len(new)] = q[start : start + new[-1] - new[0] + 1 : places.step]

    def known(self, pages: Sequence[Contents]) -> int:
        """Number of the first pages of a prompt, of these, whose queries are all kept, if any can be."""
        lacking = (
            number
            for number, page in enumerate(pages)
            if self._any and self._positions(number) and self._blocks.get(page) is None
        )
        return next(lacking, len(pages))

    @property
    def _any(self) -> bool:
        """False if none are wanted, or there can be no room for those of one token: keys train all graphs."""
        limit = self._blocks.room.limit
        return self._most > 0 and (limit is None or limit >= self._least)

    def training(self, context: Context, row: int, pages: int) -> Tensor:
        """[M, Hq, D], queries of a row's first pages; M = 0: none are kept."""
        found = [*self._found(context, row, range(0, pages * self._size, self._stride(pages)))] if self._most else []
        return torch.stack(found) if found else torch.empty(0, 1, 1)

    def _found(self, context: Context, row: int, positions: range) -> Iterator[Tensor]:
        for position in positions:
            page = position // self._size
            block = self._blocks.get(context.step.contents(row, page, page + 1))
            if block is not None:
                at = self._positions(page).index(position)
                yield block.parts[PAGES][self._place[context.layer], at]

    def _begin(self, contents: Contents, count: int, q: Tensor) -> None:
        """Keep `count` queries of a page, [layers, count, Hq, D], if there is room for them."""
        block = self._blocks.at(contents)
        if PAGES in block.parts:
            return
        shape = (len(self._place), count, *q.shape[1:])
        size = torch.Size(shape).numel() * q.itemsize
        if self._blocks.room.make(size + block.least):
            with torch.inference_mode(False):  # else they could not be written outside of it
                block.put(PAGES, torch.zeros(shape, dtype=q.dtype, device=q.device), size)

    def _positions(self, page: int) -> range:
        """Positions of a page whose queries are kept: those that the least graph over it may take."""
        graph = max((page // self._grain + 1) * self._grain, 2 * self._grain)
        stride, start = self._stride(graph), page * self._size
        return range(-(-start // stride) * stride, start + self._size, stride)

    def _stride(self, pages: int) -> int:
        """Distance of the training queries of a graph over so many pages."""
        return 1 << max(-(-pages * self._size // self._most) - 1, 0).bit_length()
