"""The indexes of a cache: which of them there are, whose sequences they observe, and the memory that they take."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from .contents import Contents
from .context import Entries, PageIndex
from .index.protocol import IndexSpec
from .index.room import Room
from .spec import CacheSpec
from .step import Span, Step

SPARE = 4
"""Indexes that are kept without an open sequence that names them, for the next request that does."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Watch:
    """Entries that observe the step of these spans, each with the numbers of its spans."""

    spans: tuple[Span, ...]
    rows: list[tuple[Entries, list[int]]]


class Indexes:
    """Indexes by their specification. Each observes the open sequences that name it, and no others.

    Those that build alike share what they build. One that no open sequence names stays for a while: of these the last
    `SPARE` that were used, and as many without entries.
    """

    def __init__(self, spec: CacheSpec, device: torch.device, limit: int | None = None) -> None:
        """`limit`: bytes of all entries; None: no limit."""
        self.room = Room(limit)
        self._spec = spec
        self._device = device
        self._known: OrderedDict[IndexSpec, PageIndex] = OrderedDict()  # the one used longest ago first
        self._named: dict[int, tuple[IndexSpec, ...]] = {}  # by open sequence
        self._watch: _Watch | None = None

    def __len__(self) -> int:
        return len(self._known)

    @property
    def bytes(self) -> int:
        """Bytes that all entries take."""
        return self.room.used

    def check(self, spec: IndexSpec) -> None:
        """Raise `ValueError` for an index that does not fit the cache. On any thread."""
        self._make(spec, Room(), [])

    def find(self, spec: IndexSpec) -> PageIndex:
        """The one index of this specification, made if there is none. Raises `ValueError` if it does not fit."""
        if (index := self._known.get(spec)) is None:
            index = self._known[spec] = self._make(spec, self.room, self._entries())
            self._watch = None
            self._trim()
        return index

    def _make(self, spec: IndexSpec, room: Room, others: Iterable[Entries]) -> PageIndex:
        if spec.host and self._device.type != "cpu":
            raise ValueError(f"index: {type(spec).__name__.lower()} lives on the host, pages are on {self._device}")
        return spec.make(self._spec, room, others)

    def open(self, sequence: int, specs: tuple[IndexSpec, ...]) -> None:
        """Have these observe a sequence from its first token on. Raises `ValueError` as `find`."""
        self._watch = None
        if not specs:
            return
        self._named[sequence] = specs  # first, so that none of them gives way to another
        try:
            for spec in specs:
                self.find(spec)
        except Exception:
            self.close(sequence)
            raise

    def close(self, sequence: int) -> None:
        """End what `open` began."""
        self._watch = None
        for spec in self._named.pop(sequence, ()):
            if spec in self._known:
                self._known.move_to_end(spec)
        self._trim()

    def clear(self) -> None:
        """Free all that the indexes hold, and stop what they build."""
        for entries in self._entries():
            _clear(entries)

    def known(self, specs: Iterable[IndexSpec], frames: Sequence[int]) -> int:
        """Number of the first frames of a prompt, of these, with all that these indexes need besides keys."""
        each = (self.find(spec).entries for spec in specs)
        pages = list(Contents(frames).pages())
        return min((entries.known(pages) for entries in each if entries is not None), default=len(frames))

    def watches(self, sequence: int) -> bool:
        """True if an index has to observe the sequence on the host."""
        return bool(self._of(sequence))

    def observes(self, spans: Sequence[Span]) -> bool:
        """True if an index has to observe some of these sequences on the host."""
        return any(self.watches(span.sequence) for span in spans)

    def watching(self, step: Step) -> list[tuple[Entries, list[int]]]:
        """Entries that have to observe a step, each with the numbers of its spans."""
        if self._watch is None or self._watch.spans is not step.spans:
            rows: dict[int, tuple[Entries, list[int]]] = {}
            for row, span in enumerate(step.spans):
                for entries in self._of(span.sequence):
                    rows.setdefault(id(entries), (entries, []))[1].append(row)
            self._watch = _Watch(step.spans, list(rows.values()))
        return self._watch.rows

    def begin(self, filled: Sequence[int]) -> None:
        """Begin a step in which these frames become full."""
        self.room.tick()
        frames = set(filled)
        self._each(lambda entries: entries.forget(frames))

    def claim(self, frames: Sequence[int]) -> None:
        """Note that these frames were taken for pages of another sequence."""
        taken = set(frames)
        self._each(lambda entries: entries.claim(taken))

    def _each(self, change: Callable[[Entries], None]) -> None:
        """Apply a change to all entries. Those that fail begin anew: what they hold may be of pages that are gone."""
        for entries in self._entries():
            try:
                change(entries)
            except Exception:
                logger.exception("an index failed to forget pages and begins anew")
                self._renew(entries)

    def _renew(self, entries: Entries) -> None:
        """Replace the indexes over these entries by new ones."""
        for spec in [spec for spec, index in self._known.items() if index.entries is entries]:
            del self._known[spec]
        _clear(entries)
        self._watch = None
        for spec in self._wanted() - self._known.keys():
            try:
                self.find(spec)
            except Exception:
                logger.exception("an index could not begin anew; it fails those that search it")

    def _wanted(self) -> set[IndexSpec]:
        """Specifications that open sequences name."""
        return {spec for specs in self._named.values() for spec in specs}

    def _entries(self) -> list[Entries]:
        """The entries of all indexes, each once."""
        each = (index.entries for index in self._known.values())
        return list({id(entries): entries for entries in each if entries is not None}.values())

    def _of(self, sequence: int) -> list[Entries]:
        """The entries of the indexes that a sequence names, each once."""
        each = (self._known[spec].entries for spec in self._named.get(sequence, ()) if spec in self._known)
        return list({id(entries): entries for entries in each if entries is not None}.values())

    def _trim(self) -> None:
        """Drop the indexes that no open sequence has named for the longest time, and entries that are left over."""
        wanted, before = self._wanted(), self._entries()
        spare = [(spec, index.entries is None) for spec, index in self._known.items() if spec not in wanted]
        for bare in (True, False):  # those without entries do not take the place of others
            for spec in [spec for spec, is_bare in spare if is_bare is bare][:-SPARE]:
                del self._known[spec]
        left = {id(entries) for entries in self._entries()}
        for entries in before:
            if id(entries) not in left:
                _clear(entries)


def _clear(entries: Entries) -> None:
    """Free notes that no index searches any more."""
    try:
        entries.clear()
    except Exception:
        logger.exception("an index failed to free its entries")
