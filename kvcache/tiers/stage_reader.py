"""Reads and writes of prompts through the staging buffer, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import OffloadError
from ..ops.store import store
from ..selection import Selection
from ..spec import CacheSpec
from ..step import Phase, Step
from ..transfer import to_device
from .base import Frames, Traffic
from .full_pages import FullPages
from .pool import Pool
from .stage import Stage


class StageReader:
    """The pages of a prompt, and reads of generated tokens that exceed the pool.

    A prompt streams through the stage layer by layer and leaves the pool to sequences that decode meanwhile. On a GPU
    only `selected_frames` waits for the device: copies from the backing store are issued by the host, which therefore
    needs the list.
    """

    def __init__(
        self, spec: CacheSpec, num_frames: int, size: int, pages: FullPages, pool: Pool, device: torch.device
    ) -> None:
        self.stage = Stage(spec, num_frames, size, device)
        self._spec, self._pages, self._pool = spec, pages, pool
        self._device = device
        self._pages_read = self._pages_read_by_tokens = 0  # pages of all heads

    def begin(self) -> None:
        """Begin a layer of a step: what is staged is out of date."""
        self.stage.leave()

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        """Write a prompt's chunk to the stage, where its own queries find it, and its full pages to the store."""
        span, size = step.spans[0], self._spec.page_size
        first, full = span.start // size, span.stop // size - span.start // size
        frames, index = step.held[0][first : self._spec.pages_for(span.stop)], step.table[0, 0, first:].long()
        self.stage.enter(layer, step)
        pages = self.stage.place(frames, index)  # side by side, as the stage is empty
        if pages is None:
            raise self._too_small(len(frames))
        if span.start % size:
            self._load(layer, frames[:1], pages[:1])
        store(pages[:, :, 0], pages[:, :, 1], k, v, step.positions - first * size)
        self._pages.write(layer, frames[:full], step.filled, pages[:full])
        # Not before: if the store fails, the chunk's first tokens may be in the tail alone.
        self._pool.drop(layer, frames, index)
        if full < len(frames):
            self._pool.open(layer, span.sequence, frames[-1]).copy_(pages[-1])

    def read(self, layer: int, selection: Selection, step: Step) -> Frames:
        """The selected pages. Raises `OffloadError` if they exceed the stage; see `parts`."""
        return self._stage_frames(layer, self.selected_frames(selection, step), step)

    def parts(self, layer: int, selection: Selection, step: Step) -> Iterator[tuple[Selection, Frames]]:
        """The selected pages in disjoint parts that the stage has room for, each readable until the next."""
        if len(frames := self.selected_frames(selection, step)) <= self.stage.size:
            yield selection, self._stage_frames(layer, frames, step)
            return
        for part in self._cut(selection, step):
            if frames := self.selected_frames(part, step):
                yield part, self._stage_frames(layer, frames, step)

    def selected_frames(self, selection: Selection, step: Step) -> list[int]:
        """Frames of the selected pages, ascending and unique. Waits for the device, unless every page is selected."""
        if not selection.complete:
            listed: list[int] = selection.frames(step).tolist()
            return listed
        held = (frames[: self._spec.pages_for(span.stop)] for span, frames in zip(step.spans, step.held, strict=True))
        return sorted({frame for frames in held for frame in frames})

    def _stage_frames(self, layer: int, frames: Sequence[int], step: Step) -> Frames:
        """Stage the missing ones of these frames."""
        self.stage.enter(layer, step)
        missing = self.stage.missing(frames)
        if (room := self._place(missing)) is None:
            self.stage.clear()
            missing = list(frames)
            if (room := self._place(missing)) is None:
                raise self._too_small(len(frames))
        try:
            self._load(layer, missing, room)
        except BaseException:
            self.stage.leave()
            raise
        if step.phase is Phase.DECODE:
            self._pages_read_by_tokens += len(missing)
        pages = self.stage.pages
        return Frames(pages[:, :, 0], pages[:, :, 1], self.stage.table(step.table))

    def _place(self, frames: Sequence[int]) -> Tensor | None:
        return self.stage.place(frames, to_device(frames, self._device))

    def _load(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        """Load pages of all heads, each from its tail or from the backing store."""
        self._pages.store.read(layer, frames, pages)
        for place, frame in enumerate(frames):
            if (tail := self._pool.tail(layer, frame)) is not None:
                pages[place].copy_(tail)
        self._pages_read += len(frames)

    def _cut(self, selection: Selection, step: Step) -> Iterator[Selection]:
        """Parts of a selection that the stage has room for: some rows of a step, and of one row some pages."""
        size = self.stage.size
        together = step.num_rows if step.phase is Phase.PREFILL else max(size // step.max_pages, 1)
        mask = selection.mask(step.max_pages)
        for row in range(0, step.num_rows, together):
            for page in range(0, step.max_pages, size):
                part = torch.zeros_like(mask)
                here = slice(row, row + together), slice(None), slice(page, page + size)
                part[here] = mask[here]
                yield Selection.from_mask(part)

    def _too_small(self, pages: int) -> OffloadError:
        page = self._spec.num_kv_heads * self._spec.read_bytes
        return OffloadError(
            f"kv_memory: {pages} pages of a layer must be read at once, which takes {pages * page} bytes; "
            f"there is room for {self.stage.size} pages = {self.stage.size * page} bytes",
            exhausted=True,
        )

    @property
    def traffic(self) -> Traffic:
        """Pages read from tails and the store; those that tokens read count as misses."""
        heads, piece = self._spec.num_kv_heads, self._spec.read_bytes
        return Traffic(misses=self._pages_read_by_tokens * heads, fetched=self._pages_read * heads * piece)
