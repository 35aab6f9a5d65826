"""Reads and writes of generated tokens through the bounded pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..errors import OffloadError
from ..ops.admit import Admitted, admit
from ..ops.store import store
from ..selection import Selection
from ..spec import CacheSpec
from ..step import Phase, Span, Step
from ..transfer import to_device
from .base import Frames, Traffic
from .full_pages import FullPages
from .pool import Pool
from .prefetch import make_prefetcher

LATEST = 2**31 - 4
"""Times are int32, and a token's prefetches are of a time right after its own."""


@dataclass(frozen=True, slots=True)
class TokenTables:
    """Places of a decode step's tokens in the pool: sent to the device once, read in every layer."""

    tails: Tensor
    """[B] int32, frame of the pool with each sequence's open page."""
    slots: Tensor
    """[B] int64, slot of each token's key and value in the pool."""
    filled: Tensor
    """[n] int64, the tails whose page becomes full, in the order of `Step.filled`."""

    @classmethod
    def of(cls, step: Step, capacity: int) -> TokenTables:
        """Raises `ValueError` for two tokens of one sequence, which has one tail, for its last page."""
        if len({span.sequence for span in step.spans}) < len(step.spans):
            raise ValueError("a decode step over an offloaded cache takes one token of each sequence")
        tails = [capacity + span.sequence for span in step.spans]
        filled = [tail for tail, span in zip(tails, step.spans, strict=True) if span.stop % step.page_size == 0]
        sent = to_device([*tails, *filled], step.starts.device)
        frames = sent[: len(tails)]
        return cls(frames.int(), frames * step.page_size + step.starts % step.page_size, sent[len(tails) :])


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of a step through the layers."""

    step: Step
    tables: TokenTables | None
    """None: a prompt's chunk."""
    listed: dict[int, int] = field(default_factory=dict)
    """Layer that was written -> pages of a head that selections have listed there."""


class PoolReader:
    """The pages of generated tokens: open ones in tails, full ones in slots, aged by a clock that steps advance.

    Each KV head fetches its own pages, in place of those that were read longest ago, so that pages which the next token
    reads again do not move. On a GPU nothing here waits for the device, unless a fetch fails, or
    the store has grown: `fetch` then copies the addresses of its extents.
    """

    def __init__(
        self, spec: CacheSpec, num_frames: int, slots: int, tails: int, pages: FullPages, device: torch.device
    ) -> None:
        self.pool = Pool(spec, num_frames, slots, tails, device)
        self.prefetcher = make_prefetcher(device)
        self._spec, self._pages = spec, pages
        self._clock = 0
        self._run: _Run | None = None
        self._prefetches: dict[int, Admitted] = {}  # layer -> the last one, which a stream may still read
        self._found = torch.zeros(3, dtype=torch.int64, device=device)
        self._prefetched = torch.zeros((), dtype=torch.int64, device=device)
        self._failed = 0  # heads of pages whose prefetch failed

    def begin(self, layer: int, step: Step) -> None:
        """Begin a layer of a step; if it begins again, the step runs again, and may evict what its last run read."""
        if self._run is not None and layer in self._run.listed:
            self._run = None
        self._run_of(step).listed[layer] = 0
        self.prefetcher.wait(layer)

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        """Write every token to its sequence's tail, and pages that become full to the backing store."""
        tables, tails = self._tables(step), self.pool.pages[layer]
        last = [(held[span.start // step.page_size], span) for span, held in zip(step.spans, step.held, strict=True)]
        for frame, span in last:
            if self.pool.opened(layer, span.sequence) != frame:
                self._reopen(layer, frame, span)
        store(tails[:, :, 0], tails[:, :, 1], k, v, tables.slots)
        if filled := [frame for frame, span in last if span.stop % step.page_size == 0]:
            self._pages.write(layer, filled, step.filled, tails[tables.filled])

    def _reopen(self, layer: int, frame: int, span: Span) -> None:
        """Make the frame's page the sequence's open one, with the tokens that it has already."""
        tail = self.pool.open(layer, span.sequence, frame)
        if span.start % self._spec.page_size:
            try:
                self._pages.store.read(layer, [frame], tail[None])
            except BaseException:
                self.pool.close(layer, frame)
                raise

    def fits(self, layer: int, selection: Selection, step: Step) -> bool:
        """True if the slots have room for the selection besides what this run has listed in the layer."""
        listed = self._run_of(step).listed.get(layer, 0) + self._count(selection)
        return step.phase is Phase.DECODE and min(listed, step.num_rows * step.max_pages) <= self.pool.capacity

    def read(self, layer: int, selection: Selection, step: Step) -> Frames:
        """The selected pages, once those that are missing are fetched; see `fits`."""
        listed, residents, pages = self._run_of(step).listed, self.pool.residents(layer), self.pool.pages[layer]
        listed[layer] = listed.get(layer, 0) + self._count(selection)
        admitted = admit(step.table, selection.pages, residents, now=self._clock, before=self._clock)
        self._fetch(layer, admitted)
        self._found += admitted.found.sum(0)
        return Frames(pages[:, :, 0], pages[:, :, 1], admitted.table)

    def own(self, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        """See `Tier.own`."""
        tails = self._tables(step).tails[:, None].expand(-1, self._spec.num_kv_heads)
        return self.pool.pages[layer, :, :, 0], tails

    def prefetch(self, layer: int, pages: Tensor, step: Step) -> None:
        """See `Tier.prefetch`."""
        self.prefetcher.wait(layer)
        residents = self.pool.residents(layer)
        admitted = admit(step.table, pages, residents, now=self._clock + 1, before=self._clock - 2)
        self._prefetched += (admitted.loads >= 0).sum()
        self._prefetches[layer] = admitted
        self.prefetcher.submit(layer, partial(self._try_fetch, layer, admitted))

    def _try_fetch(self, layer: int, admitted: Admitted) -> None:
        """Fetch, but ignore a failure of the store: a read of the same pages reports it."""
        try:
            self._fetch(layer, admitted)
        except OffloadError:
            self._failed += int((admitted.loads >= 0).sum())

    def _fetch(self, layer: int, admitted: Admitted) -> None:
        """Fetch all that was admitted; after a failure nothing of it is resident."""
        try:
            self._pages.store.fetch(layer, self.pool.pages[layer], admitted.loads, admitted.slots)
        except BaseException:  # an interrupt, too, leaves slots without their pages
            self.pool.undo(layer, admitted)
            raise

    def _count(self, selection: Selection) -> int:
        """Pages that the selection lists for one KV head."""
        rows, lists, listed = selection.pages.shape
        return rows * lists // self._spec.num_kv_heads * listed

    def _tables(self, step: Step) -> TokenTables:
        tables = self._run_of(step).tables
        assert tables is not None, "a decode step"
        return tables

    def _run_of(self, step: Step) -> _Run:
        """The step's run, a new one if it has none."""
        if self._run is None or self._run.step is not step:
            tables = TokenTables.of(step, self.pool.capacity) if step.phase is Phase.DECODE else None
            self._tick()
            self._run = _Run(step, tables)
        return self._run

    def _tick(self) -> None:
        self._clock += 2
        if self._clock > LATEST:
            for layer in range(self._spec.num_layers):
                self.prefetcher.wait(layer)
            self.pool.restart()
            self._clock = 2

    @property
    def traffic(self) -> Traffic:
        """Pages of single heads that were found, fetched and prefetched; waits for the device."""
        hits, prefetch_hits, misses = self._found.tolist()
        prefetched = int(self._prefetched) - self._failed
        fetched = (misses + prefetched) * self._spec.read_bytes
        return Traffic(hits, misses, fetched, prefetched=prefetched, prefetch_hits=prefetch_hits)
