"""Paged cache: page tables of sequences over one tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .allocator import FrameAllocator
from .context import Context, PageIndex
from .index.protocol import IndexSpec
from .indexes import Indexes
from .prefix import PrefixCache
from .recent import NULL_SEQUENCE, Recent, place
from .spec import CacheSpec
from .step import PaddedShape, Phase, Span, Step
from .tiers.base import Tier
from .tiers.device import DeviceTier
from .transfer import to_device


class PagedCache:
    """Keys and values of many sequences in pages of one tier. Only `recent` allocates memory after construction.

    Sequences are small integers below `max_sequences`, chosen by `open`. Page bookkeeping is host integers; the
    page tables are mirrored on the device, where steps read them. One more sequence, the null sequence, pads steps: its
    one frame, which exists if the cache made its tier itself, takes the writes of padding rows.
    """

    def __init__(
        self,
        spec: CacheSpec,
        num_frames: int,
        *,
        max_sequences: int,
        max_len: int,
        device: torch.device | str = "cpu",
        tier: Tier | None = None,
        index_bytes: int | None = None,
    ) -> None:
        """`tier` has room for as many frames and sequences; None: a `DeviceTier`.

        `index_bytes`: most memory of what indexes keep; None: no limit.
        """
        self.spec = spec
        self.device = torch.device(device)
        self.allocator = FrameAllocator(num_frames)
        self.prefix = PrefixCache(self.allocator)
        self.tier: Tier = tier or DeviceTier(spec, num_frames + 1, self.device)
        shape = (max_sequences + 1, spec.pages_for(max_len))
        self._tables = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._tables[max_sequences] = num_frames
        self._null_sequence, self._null_frames = max_sequences, [num_frames]
        self._frames: dict[int, list[int]] = {}
        self.indexes = Indexes(spec, self.device, index_bytes)
        self.recent = Recent(spec)
        self._closed = list(range(max_sequences - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """Pages that can be reserved now, kept prefixes included."""
        return self.allocator.available

    @property
    def longest(self) -> int:
        """Pages of a sequence of `max_len` tokens."""
        return self._tables.shape[1]

    def open(self, *specs: IndexSpec) -> int:
        """Open a sequence without pages; returns its number. The indexes of these specifications observe it.

        Raises:
            ValueError: an index does not fit the cache; nothing was opened.
        """
        self.indexes.open(self._closed[-1], specs)
        sequence = self._closed.pop()
        self._frames[sequence] = []
        return sequence

    def match(self, keys: Sequence[bytes], *specs: IndexSpec) -> list[int]:
        """Frames of the longest known prefix of `keys` with all that indexes of these specifications need."""
        frames = self.prefix.match(keys)
        return frames[: self.indexes.known(specs, frames)]

    def share(self, sequence: int, frames: Sequence[int]) -> None:
        """Begin an empty sequence with full pages of other sequences."""
        for frame in frames:
            self.allocator.hold(frame)
        self._append(sequence, list(frames))

    def reserve(self, sequence: int, tokens: int) -> None:
        """Allocate pages for the sequence's first `tokens` tokens.

        Raises:
            OutOfFrames: too few frames are available; nothing was allocated.
            OffloadError: the tier has no room for them; nothing was allocated.
        """
        missing = self.spec.pages_for(tokens) - len(self._frames[sequence])
        if missing <= 0:
            return
        frames = self.allocator.take(missing)
        try:
            self.tier.claim(frames)
        except Exception:
            for frame in reversed(frames):
                self.allocator.release(frame)
            raise
        self.indexes.claim(frames)
        self._append(sequence, frames)

    def _append(self, sequence: int, frames: list[int]) -> None:
        held = self._frames[sequence]
        start = len(held)
        held.extend(frames)  # first, so that `release` finds them if the copy fails
        self._tables[sequence, start : len(held)] = to_device(frames, self.device, torch.int32)

    def release(self, sequence: int) -> None:
        """Close the sequence and release its pages, last one first: a kept prefix loses its tail before its head."""
        frames = self._frames.pop(sequence)
        try:
            for frame in reversed(frames):
                self.allocator.release(frame)
            self.recent.drop(sequence)
            self.indexes.close(sequence)
        finally:
            self._closed.append(sequence)

    def rollback(self, sequence: int, tokens: int) -> None:
        """Truncate the sequence to its first `tokens` tokens and release the pages after them.

        Raises:
            ValueError: they end within a page that other sequences may read; nothing was changed.
        """
        held = self._frames[sequence]
        count = self.spec.pages_for(tokens)
        if tokens % self.spec.page_size and count <= len(held) and not self.allocator.exclusive(held[count - 1]):
            raise ValueError(f"tokens: {tokens} ends within a page that others share")
        for frame in reversed(held[count:]):
            self.allocator.release(frame)
        del held[count:]
        self.recent.drop(sequence)

    def keep(self, sequence: int, keys: Sequence[bytes], first_page: int = 0, note: object = None) -> None:
        """Offer full pages from `first_page` on for reuse under these prefix keys, each with this note.

        Those of a sequence that indexes observe replace others, which may lack what indexes need.
        """
        held, replace = self._frames[sequence], self.indexes.watches(sequence)
        for key, frame in zip(keys, held[first_page:], strict=False):
            self.prefix.insert(key, frame, note, replace=replace)

    def withdraw(self, sequence: int) -> None:
        """End the reuse of all pages of the sequence, those that it shares included."""
        for frame in self._frames[sequence]:
            self.prefix.withdraw(frame)

    def prefill(self, span: Span, queries_per_row: int, tokens_left: int = 0) -> Step:
        """Step for a chunk of one sequence's prompt, `tokens_left` of whose tokens come later."""
        starts = range(span.start, span.stop, queries_per_row)
        lasts = [min(start + queries_per_row, span.stop) - 1 for start in starts]
        step = self._step(Phase.PREFILL, (span,), list(starts), lasts, queries_per_row)
        return replace(step, rows_left=-(-tokens_left // queries_per_row))

    def decode(self, spans: Sequence[Span], shape: PaddedShape | None = None) -> Step:
        """Step for one token of each sequence, padded to `shape` with rows of the null sequence.

        Padding takes a `DeviceTier` that the cache made: no other tier has a frame for what padding rows write.
        """
        count = 0 if shape is None else shape.rows - len(spans)
        padded = (*spans, *[Span(self._null_sequence, 0, 1)] * count)
        starts = [span.start for span in padded]
        step = self._step(Phase.DECODE, padded, starts, starts, 1, 0 if shape is None else shape.pages)
        places = to_device([place(self._owner(span), span.start) for span in padded], self.device)
        step = replace(step, places=places, num_padding_rows=count)
        if shape is not None:
            full = [(self._filled(span) or self._null_frames)[0] for span in padded]
            step = replace(step, filled=to_device(full, self.device))
        self.recent.prepare(step)
        return step

    def _step(
        self, phase: Phase, spans: tuple[Span, ...], starts: list[int], lasts: list[int], width: int, pages: int = 0
    ) -> Step:
        page_size = self.spec.page_size
        max_pages = max(pages, *(self.spec.pages_for(span.stop) for span in spans))
        sequences = to_device([span.sequence for span in spans], self.device)
        table = self._tables[:, :max_pages].index_select(0, sequences)[:, None]  # [B, 1, F]
        filled = [frame for span in spans for frame in self._filled(span)]
        self.indexes.begin(filled)
        last = to_device(lasts, self.device, torch.int32)
        return Step(
            phase=phase,
            spans=spans,
            positions=to_device([p for span in spans for p in range(span.start, span.stop)], self.device),
            slots=to_device([slot for span in spans for slot in self._slots(span)], self.device),
            table=table.expand(len(starts), self.spec.num_kv_heads, max_pages),
            starts=to_device(starts, self.device, torch.int32),
            lasts=last,
            last_pages=last // page_size,
            places=last.new_empty(0, dtype=torch.int64),
            filled=to_device(filled, self.device),
            page_size=page_size,
            queries_per_row=width,
            max_pages=max_pages,
            held=tuple(self._held(span) for span in spans),
        )

    def _owner(self, span: Span) -> int:
        """Number of the span's sequence in `recent`."""
        return NULL_SEQUENCE if span.sequence == self._null_sequence else span.sequence

    def _held(self, span: Span) -> list[int]:
        """Frames of the span's sequence, page by page."""
        return self._null_frames if span.sequence == self._null_sequence else self._frames[span.sequence]

    def _slots(self, span: Span) -> list[int]:
        """Slots of the span's tokens."""
        held, size = self._held(span), self.spec.page_size
        return [held[position // size] * size + position % size for position in range(span.start, span.stop)]

    def _filled(self, span: Span) -> list[int]:
        """Frames that become full with the span."""
        size = self.spec.page_size
        return self._held(span)[span.start // size : span.stop // size]

    def append(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        """Write the step's keys and values [T, Hkv, D] of one layer."""
        self.tier.write(layer, k, v, step)

    def observe(self, layer: int, q: Tensor, step: Step) -> None:
        """Pass the queries [T, Hq, D] of one layer, whose keys are written, to the indexes of their sequences."""
        if watching := self.indexes.watching(step):
            context = self.context(layer, step)
            for entries, rows in watching:
                entries.observe(q, context, rows)

    def index(self, spec: IndexSpec) -> PageIndex:
        """The cache's one index of this specification, empty at first. Raises `ValueError` if it does not fit."""
        return self.indexes.find(spec)

    def close(self) -> None:
        """Free the indexes and stop what they build; the cache must not be used afterwards."""
        self.indexes.clear()

    def context(self, layer: int, step: Step, spec: IndexSpec | None = None) -> Context:
        """One layer in a step, for a strategy that searches an index of this spec, if any."""
        return Context(layer, self.spec, step, self.tier, None if spec is None else self.index(spec), self.recent)
