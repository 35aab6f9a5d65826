"""A tier for contexts that do not fit beside the compute device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..descriptions import Descriptions
from ..errors import OffloadError
from ..ops.admit import Admitted, admit
from ..ops.store import store
from ..selection import Selection
from ..spec import CacheSpec
from ..step import Phase, Span, Step
from .base import Frames, Traffic, own_page
from .pool import Pool
from .prefetch import Prefetcher, make_prefetcher
from .stage import Stage
from .store import BackingStore

LATEST = 2**31 - 4
"""Times are int32, and a token's guesses are of a time right after its own."""


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How many pages are at hand at most."""

    slots: int
    """Of each layer and KV head, for what generated tokens read."""
    staged: int
    """Of one layer, for prompts and for reads that are more than the slots take."""
    tails: int
    """Open pages of each layer: sequences that may hold pages."""
    prefetch_pages: int = 0
    """Of the slots of each layer and head, those that a token may fill with guesses at what the next one reads."""

    def bytes(self, spec: CacheSpec) -> int:
        return (spec.num_layers * (self.slots + self.tails) + self.staged) * spec.num_kv_heads * spec.read_bytes


class OffloadTier:
    """All full pages live in their home; a bounded pool has those that generated tokens read, and a stage the others.

    - A generated token's pages are brought into the pool, each KV head's for itself, in place of those that were read
      longest ago; so what the next token reads again does not move.
    - A prompt streams through the stage, one layer at a time, and leaves the pool to those who decode meanwhile.
    - A page is written home when it becomes full. It then never changes, so leaving the pool is forgetting it.

    Where a page is read changes no bit of what comes out, unless a read is more than the stage takes and is done in
    parts. On a GPU nothing here asks the device for a number but a prompt's list of pages and reads through the stage.
    """

    steady: ClassVar[bool] = False

    def __init__(
        self, spec: CacheSpec, num_frames: int, store: BackingStore, size: PoolSize, device: torch.device
    ) -> None:
        self.spec = spec
        self.size, self.prefetch_pages = size, size.prefetch_pages
        self.store = store
        self._pool = Pool(spec, num_frames, size.slots, size.tails, device)
        self._stage = Stage(spec, num_frames, size.staged, device)
        self._descriptions = Descriptions(spec, num_frames, device)
        self.summaries, self.codes = self._descriptions.summaries, self._descriptions.codes
        self._found = torch.zeros(3, dtype=torch.int64, device=device)
        self._prefetched = torch.zeros((), dtype=torch.int64, device=device)
        self._prefetcher = make_prefetcher(device)
        self.close = weakref.finalize(self, _close, self._prefetcher, store)
        self._staged = self._written = 0  # pages of all heads
        self._staged_by_tokens = 0
        self._vain = 0  # heads of pages that were guessed and did not come
        self._step: Step | None = None
        self._clock = 0
        self._listed: dict[int, int] = {}  # layer that this step has written -> pages of a head that it asked for
        self._guesses: dict[int, Admitted] = {}  # layer -> its last one

    def claim(self, frames: Sequence[int]) -> None:
        self.store.claim(frames)

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        if layer in self._listed:  # the step runs once more, and what it read before need not stay
            self._step = None
        self._begin(step)
        self._listed[layer] = 0
        self._stage.leave()
        self._prefetcher.wait(layer)
        if step.phase is Phase.PREFILL:
            self._write_chunk(layer, k, v, step)
        else:
            self._write_tokens(layer, k, v, step)

    def resident(self, layer: int, selection: Selection, step: Step) -> Frames:
        if self._pooled(layer, selection, step):
            return self._from_pool(layer, selection, step)
        return self._from_stage(layer, selection.frames(step), step)

    def own(self, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        if step.phase is Phase.PREFILL:
            return own_page(self.resident(layer, Selection.own(step, self.spec.num_kv_heads), step), step)
        self._begin(step)
        return self._pool.pages[layer, :, :, 0], self._tails[:, None].expand(-1, self.spec.num_kv_heads)

    def parts(self, layer: int, selection: Selection, step: Step) -> Iterator[tuple[Selection, Frames]]:
        if self._pooled(layer, selection, step):
            yield selection, self._from_pool(layer, selection, step)
        elif len(named := selection.frames(step)) <= self.size.staged:
            yield selection, self._from_stage(layer, named, step)
        else:
            for part in self._cut(selection, step):
                if len(named := part.frames(step)):
                    yield part, self._from_stage(layer, named, step)

    def prefetch(self, layer: int, pages: Tensor, step: Step) -> None:
        self._prefetcher.wait(layer)
        residents = self._pool.residents(layer)
        admitted = admit(step.table, pages, residents, now=self._clock + 1, before=self._clock - 2)
        self._prefetched += (admitted.loads >= 0).sum()
        self._guesses[layer] = admitted  # a stream reads it until somebody has waited
        self._prefetcher.submit(layer, partial(self._guess, layer, admitted))

    def _guess(self, layer: int, admitted: Admitted) -> None:
        """In vain, if it fails: whoever really wants the pages will hear of it."""
        try:
            self._fetch(layer, admitted)
        except OffloadError:
            self._vain += int((admitted.loads >= 0).sum())

    def holds(self, pages: int) -> bool:
        return pages <= self.size.staged

    @property
    def traffic(self) -> Traffic:
        hits, guessed, misses = self._found.tolist()
        prefetched = int(self._prefetched) - self._vain
        heads, piece = self.spec.num_kv_heads, self.spec.read_bytes
        return Traffic(
            hits=hits,
            misses=misses + self._staged_by_tokens * heads,
            fetched=(misses + prefetched + self._staged * heads) * piece,
            written=self._written * heads * piece,
            prefetched=prefetched,
            prefetch_hits=guessed,
        )

    def _begin(self, step: Step) -> None:
        if step is not self._step:
            _check_alone(step)
            self._step = step
            self._tick()
            self._listed.clear()
            tails = [self._pool.capacity + span.sequence for span in step.spans]
            self._tails = torch.tensor(tails, dtype=torch.int32, device=step.starts.device)  # [B]
            self._slots = self._tails.long() * self.spec.page_size + step.starts[: len(tails)] % self.spec.page_size

    def _tick(self) -> None:
        self._clock += 2
        if self._clock > LATEST:
            for layer in range(self.spec.num_layers):
                self._prefetcher.wait(layer)
            self._pool.restart()
            self._clock = 2

    def _write_chunk(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        """A prompt's chunk goes through the stage, where its own queries find it, to its store."""
        span, size = step.spans[0], self.spec.page_size
        first, full = span.start // size, span.stop // size - span.start // size
        frames = step.held[0][first : self.spec.pages_for(span.stop)]
        self._stage.enter(layer, step)
        pages = self._stage.place(torch.tensor(frames, device=k.device))  # side by side, as nothing else is there yet
        if pages is None:
            raise self._too_small(len(frames))
        if span.start % size:
            self._bring(layer, frames[:1], pages[:1])
        store(pages[:, :, 0], pages[:, :, 1], k, v, step.positions - first * size)
        self._send(layer, frames[:full], pages[:full])
        # Not before: if the home fails, the chunk's first tokens may be in the tail alone.
        self._pool.drop(layer, frames)
        if full < len(frames):
            self._pool.open(layer, span.sequence, frames[-1]).copy_(pages[-1])

    def _write_tokens(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        """Every token goes into its sequence's tail; a page that becomes full goes home and stays there to be read."""
        size, tails = self.spec.page_size, self._pool.pages[layer]
        own = [(held[span.start // size], span) for span, held in zip(step.spans, step.held, strict=True)]
        for frame, span in own:
            if self._pool.opened(layer, span.sequence) != frame:
                self._reopen(layer, frame, span)
        store(tails[:, :, 0], tails[:, :, 1], k, v, self._slots)
        if filled := [(frame, span) for frame, span in own if span.stop % size == 0]:
            places = torch.tensor([self._pool.capacity + span.sequence for _, span in filled], device=k.device)
            self._send(layer, [frame for frame, _ in filled], tails[places])

    def _reopen(self, layer: int, frame: int, span: Span) -> None:
        """Make the frame's page the sequence's open one, with the tokens that it has already."""
        tail = self._pool.open(layer, span.sequence, frame)
        if span.start % self.spec.page_size:
            try:
                self.store.read(layer, [frame], tail[None])
            except BaseException:
                self._pool.drop(layer, [frame])  # it is not there
                raise

    def _send(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        """Full pages [n, Hkv, 2, S, D] to their home, and what is known of them to where it stays."""
        if frames:
            self.store.write(layer, frames, pages)
            self._descriptions.fill_from(layer, pages, frames)
            self._written += len(frames)

    def _pooled(self, layer: int, selection: Selection, step: Step) -> bool:
        """Whether the pool has room for the selection besides what this step has asked it for."""
        self._begin(step)
        rows, lists, listed = selection.pages.shape
        asked = self._listed.get(layer, 0) + rows * lists // self.spec.num_kv_heads * listed
        return step.phase is Phase.DECODE and min(asked, step.num_rows * step.max_pages) <= self.size.slots

    def _from_pool(self, layer: int, selection: Selection, step: Step) -> Frames:
        rows, lists, listed = selection.pages.shape
        self._listed[layer] = self._listed.get(layer, 0) + rows * lists // self.spec.num_kv_heads * listed
        residents, pages = self._pool.residents(layer), self._pool.pages[layer]
        admitted = admit(step.table, selection.pages, residents, now=self._clock, before=self._clock)
        self._fetch(layer, admitted)
        self._found += admitted.found.sum(0)
        return Frames(pages[:, :, 0], pages[:, :, 1], admitted.table)

    def _fetch(self, layer: int, admitted: Admitted) -> None:
        """All that was admitted, or as if nothing had been."""
        try:
            self.store.fetch(layer, self._pool.pages[layer], admitted.loads, admitted.slots)
        except BaseException:  # an interrupt, too, leaves slots without their pages
            self._pool.undo(layer, admitted)
            raise

    def _from_stage(self, layer: int, named: Tensor, step: Step) -> Frames:
        """Frames [n] int32, ascending and unique."""
        self._stage.enter(layer, step)
        missing = self._stage.missing(named)
        if (room := self._stage.place(missing)) is None:
            self._stage.clear()
            missing = named
            if (room := self._stage.place(missing)) is None:
                raise self._too_small(len(named))
        try:
            self._bring(layer, missing.tolist(), room)
        except BaseException:
            self._stage.leave()
            raise
        if step.phase is Phase.DECODE:
            self._staged_by_tokens += len(missing)
        pages = self._stage.pages
        return Frames(pages[:, :, 0], pages[:, :, 1], self._stage.table(step.table))

    def _bring(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        """Pages of all heads, from a tail or from store."""
        self.store.read(layer, frames, pages)
        for place, frame in enumerate(frames):
            if (tail := self._pool.tail(layer, frame)) is not None:
                pages[place].copy_(tail)
        self._staged += len(frames)

    def _cut(self, selection: Selection, step: Step) -> Iterator[Selection]:
        """Parts of a selection that the stage takes: some rows of a step, and of one row some pages."""
        together = step.num_rows if step.phase is Phase.PREFILL else max(self.size.staged // step.max_pages, 1)
        mask = selection.mask(step.max_pages)
        for row in range(0, step.num_rows, together):
            for page in range(0, step.max_pages, self.size.staged):
                part = torch.zeros_like(mask)
                here = slice(row, row + together), slice(None), slice(page, page + self.size.staged)
                part[here] = mask[here]
                yield Selection.from_mask(part)

    def _too_small(self, pages: int) -> OffloadError:
        page = self.spec.num_kv_heads * self.spec.read_bytes
        return OffloadError(
            f"kv_memory: {pages} pages of a layer must be read at once, which takes {pages * page} bytes; "
            f"there is room for {self.size.staged} pages = {self.size.staged * page} bytes",
            exhausted=True,
        )


def _check_alone(step: Step) -> None:
    """A sequence has one tail, which holds its last page: raises `ValueError` for two tokens of one in a step."""
    if step.phase is Phase.DECODE and len({span.sequence for span in step.spans}) < len(step.spans):
        raise ValueError("a decode step over an offloaded cache takes one token of each sequence")


def _close(beside: Prefetcher, store: BackingStore) -> None:
    beside.close()
    store.close()
