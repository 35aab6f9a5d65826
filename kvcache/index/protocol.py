"""Protocol of an index specification, and the base of indexes without state."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from ..context import Context, PageIndex
from ..spec import CacheSpec


class IndexSpec(Hashable, Protocol):
    """An index with its options; a cache keeps one index for each."""

    scans: ClassVar[bool]
    """True if it may read any key of a layer, not only summaries and codes."""
    host: ClassVar[bool]
    """True if its entries are on the host, and so must the pages be."""

    def make(self, spec: CacheSpec) -> PageIndex:
        """An empty index for a cache of this shape. Raises `ValueError` if it does not fit."""


class Stateless:
    """Base of an index without entries of its own: it is its own specification."""

    __slots__ = ()
    estimates_mass: ClassVar[bool] = True
    scans: ClassVar[bool] = False
    host: ClassVar[bool] = False

    def observe(self, q: Tensor, context: Context) -> None:
        pass

    def forget(self, frames: Sequence[int]) -> None:
        pass
