"""What every index can do."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from ..context import Context, PageIndex
from ..spec import CacheSpec


class IndexSpec(Hashable, Protocol):
    """Which index, with which options: a cache keeps one index for each."""

    scans: ClassVar[bool]
    """It reads all keys of a layer, or any of them, rather than what lies beside them."""
    host: ClassVar[bool]
    """Its entries are on the host, and so must the pages be."""

    def make(self, spec: CacheSpec) -> PageIndex:
        """An empty index for a cache of this shape. Raises `ValueError` where it does not fit."""


class Stateless:
    """For an index that keeps nothing but what lies beside the keys: it is its own specification."""

    __slots__ = ()
    estimates_mass: ClassVar[bool] = True
    scans: ClassVar[bool] = False
    host: ClassVar[bool] = False

    def observe(self, q: Tensor, context: Context) -> None:
        pass

    def forget(self, frames: Sequence[int]) -> None:
        pass
