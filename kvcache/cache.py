"""The paged cache: page tables of the sequences over one tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .allocator import FrameAllocator
from .context import Context, PageIndex
from .index.protocol import IndexSpec, Stateless
from .prefix import PrefixCache
from .recent import NULL_SEQUENCE, Recent, place
from .spec import CacheSpec
from .step import PaddedShape, Phase, Span, Step
from .tiers.base import Tier
from .tiers.device import DeviceTier


class PagedCache:
    """Keys and values of many sequences in pages of one tier. Only `recent` allocates anything after construction.

    Sequences are small integers below `max_sequences`, chosen by `open`. Page bookkeeping is host integers; the
    page tables are mirrored on the device, where steps read them. One sequence more is nobody's: its one frame, which
    only a cache on the device has, takes what the padding of a step writes.
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
    ) -> None:
        """`tier` has room for as many frames and sequences; none: everything stays on the device."""
        self.spec = spec
        self.device = torch.device(device)
        self.allocator = FrameAllocator(num_frames)
        self.prefix = PrefixCache(self.allocator)
        self.tier: Tier = tier or DeviceTier(spec, num_frames + 1, self.device)
        shape = (max_sequences + 1, spec.pages_for(max_len))
        self._tables = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._tables[max_sequences] = num_frames
        self._null_sequence, self._spare = max_sequences, [num_frames]
        self._frames: dict[int, list[int]] = {}
        self._indexes: dict[IndexSpec, PageIndex] = {}
        self.recent = Recent(spec)
        self._closed = list(range(max_sequences - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """Pages that could be reserved now, kept prefixes included."""
        return self.allocator.available

    @property
    def longest(self) -> int:
        """Pages of the longest sequence that there can be."""
        return self._tables.shape[1]

    def open(self) -> int:
        """A new sequence without pages."""
        sequence = self._closed.pop()
        self._frames[sequence] = []
        return sequence

    def share(self, sequence: int, frames: Sequence[int]) -> None:
        """Start an empty sequence with full pages that another one wrote."""
        for frame in frames:
            self.allocator.hold(frame)
        self._append(sequence, list(frames))

    def reserve(self, sequence: int, tokens: int) -> None:
        """Give the sequence pages for its first `tokens` tokens.

        Raises:
            OutOfFrames: there are too few; nothing was reserved.
            OffloadError: there are enough, but the tier has no room for them; nothing was reserved either.
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
        self._append(sequence, frames)

    def _append(self, sequence: int, frames: list[int]) -> None:
        held = self._frames[sequence]
        start = len(held)
        held.extend(frames)  # first, so that `release` finds them if there is no memory for what follows
        self._tables[sequence, start : len(held)] = torch.tensor(frames, dtype=torch.int32)

    def release(self, sequence: int) -> None:
        """Close the sequence and give its pages back.

        The last page goes first, so that a kept prefix loses its tail before its head.
        """
        for frame in reversed(self._frames.pop(sequence)):
            self.allocator.release(frame)
        self.recent.drop(sequence)
        self._closed.append(sequence)

    def rollback(self, sequence: int, tokens: int) -> None:
        """Forget all but the sequence's first `tokens` tokens and give the pages behind them back.

        Raises:
            ValueError: it would reopen a page that others may read; nothing was changed.
        """
        held = self._frames[sequence]
        count = self.spec.pages_for(tokens)
        if tokens % self.spec.page_size and count <= len(held) and not self.allocator.exclusive(held[count - 1]):
            raise ValueError(f"tokens: {tokens} ends within a page that others share")
        for frame in reversed(held[count:]):
            self.allocator.release(frame)
        del held[count:]
        self.recent.drop(sequence)

    def keep(self, sequence: int, keys: Sequence[bytes], first_page: int = 0) -> None:
        """Offer full pages from `first_page` on for reuse under these prefix keys."""
        held = self._frames[sequence]
        for key, frame in zip(keys, held[first_page:], strict=False):
            self.prefix.insert(key, frame)

    def withdraw(self, sequence: int) -> None:
        """Offer none of the sequence's pages for reuse any more, not even those that it shares."""
        for frame in self._frames[sequence]:
            self.prefix.withdraw(frame)

    def prefill(self, span: Span, queries_per_row: int, tokens_left: int = 0) -> Step:
        """The step that runs a chunk of one sequence's prompt, of which so many tokens come later."""
        starts = range(span.start, span.stop, queries_per_row)
        lasts = [min(start + queries_per_row, span.stop) - 1 for start in starts]
        step = self._step(Phase.PREFILL, (span,), list(starts), lasts, queries_per_row)
        return replace(step, rows_left=-(-tokens_left // queries_per_row))

    def decode(self, spans: Sequence[Span], room: PaddedShape | None = None) -> Step:
        """The step that runs one token of each sequence, padded to `room` if there is any; then rows of nobody follow.

        Only a `DeviceTier` of the cache's own making has a frame for what those write.
        """
        count = 0 if room is None else room.rows - len(spans)
        padded = (*spans, *[Span(self._null_sequence, 0, 1)] * count)
        starts = [span.start for span in padded]
        step = self._step(Phase.DECODE, padded, starts, starts, 1, 0 if room is None else room.pages)
        places = torch.tensor([place(self._owner(span), span.start) for span in padded], device=self.device)
        step = replace(step, places=places, num_padding_rows=count)
        if room is not None:
            full = [(self._filled(span) or self._spare)[0] for span in padded]
            step = replace(step, filled=torch.tensor(full, device=self.device))
        self.recent.prepare(step)
        return step

    def _step(
        self, phase: Phase, spans: tuple[Span, ...], starts: list[int], lasts: list[int], width: int, pages: int = 0
    ) -> Step:
        page_size = self.spec.page_size
        max_pages = max(pages, *(self.spec.pages_for(span.stop) for span in spans))
        sequences = torch.tensor([span.sequence for span in spans], device=self.device)
        table = self._tables[:, :max_pages].index_select(0, sequences)[:, None]  # [B, 1, F]
        filled = [frame for span in spans for frame in self._filled(span)]
        for index in self._indexes.values():
            index.forget(filled)
        last = torch.tensor(lasts, dtype=torch.int32, device=self.device)
        return Step(
            phase=phase,
            spans=spans,
            positions=torch.tensor([p for span in spans for p in range(span.start, span.stop)], device=self.device),
            slots=torch.tensor([slot for span in spans for slot in self._slots(span)], device=self.device),
            table=table.expand(len(starts), self.spec.num_kv_heads, max_pages),
            starts=torch.tensor(starts, dtype=torch.int32, device=self.device),
            lasts=last,
            last_pages=last // page_size,
            places=last.new_empty(0, dtype=torch.int64),
            filled=torch.tensor(filled, dtype=torch.int64, device=self.device),
            page_size=page_size,
            queries_per_row=width,
            max_pages=max_pages,
            held=tuple(self._held(span) for span in spans),
        )

    def _owner(self, span: Span) -> int:
        """The span's sequence, as `recent` knows it."""
        return NULL_SEQUENCE if span.sequence == self._null_sequence else span.sequence

    def _held(self, span: Span) -> list[int]:
        """Frames of the span's sequence, page by page."""
        return self._spare if span.sequence == self._null_sequence else self._frames[span.sequence]

    def _slots(self, span: Span) -> list[int]:
        held, size = self._held(span), self.spec.page_size
        return [held[position // size] * size + position % size for position in range(span.start, span.stop)]

    def _filled(self, span: Span) -> list[int]:
        size = self.spec.page_size
        return self._held(span)[span.start // size : span.stop // size]

    def append(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        """Write the step's keys and values [T, Hkv, D] of one layer."""
        self.tier.write(layer, k, v, step)

    def index(self, which: IndexSpec) -> PageIndex:
        """The cache's one index of this kind and with these options; from now on it observes every step.

        Raises:
            ValueError: it does not fit the cache.
        """
        if which not in self._indexes:
            self._indexes[which] = self.new_index(which)
        return self._indexes[which]

    def new_index(self, which: IndexSpec) -> PageIndex:
        """An empty index for this cache, which knows nothing of it. Raises `ValueError` where it does not fit."""
        if which.host and self.device.type != "cpu":
            raise ValueError(f"index: {type(which).__name__.lower()} lives on the host, pages are on {self.device}")
        return which.make(self.spec)

    def retire(self, which: IndexSpec) -> None:
        """Give up an index and all that it knows; whoever asks for it again begins with an empty one."""
        self._indexes.pop(which, None)

    @property
    def observed(self) -> bool:
        """Some index takes note of every step, on the host."""
        return not all(isinstance(index, Stateless) for index in self._indexes.values())

    def observe(self, layer: int, q: Tensor, step: Step) -> None:
        """Show the step's queries [T, Hq, D] of one layer, whose keys are written, to all indexes."""
        for index in self._indexes.values():
            index.observe(q, self.context(layer, step))

    def context(self, layer: int, step: Step, which: IndexSpec | None = None) -> Context:
        """One layer as a strategy that searches this index sees it."""
        return Context(layer, self.spec, step, self.tier, None if which is None else self.index(which), self.recent)
