"""Protocol of an index specification, and the base of indexes without state."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import ClassVar, Protocol

from ..context import Entries, PageIndex
from ..spec import CacheSpec
from .room import Room


class IndexSpec(Hashable, Protocol):
    """An index with its options; a cache keeps one index for each."""

    scans: ClassVar[bool]
    """True if it may read any key of a layer, not only summaries and codes."""
    host: ClassVar[bool]
    """True if its entries are on the host, and so must the pages be."""

    def make(self, spec: CacheSpec, room: Room, others: Iterable[Entries] = ()) -> PageIndex:
        """An index for a cache of this shape, over those of these entries that suit it, or over empty ones.

        Raises `ValueError` if it does not fit.
        """


class Stateless:
    """Base of an index without entries: it is its own specification."""

    __slots__ = ()
    estimates_mass: ClassVar[bool] = True
    scans: ClassVar[bool] = False
    host: ClassVar[bool] = False
    entries: ClassVar[None] = None
