"""What every index can do."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from ..context import Context
    from ..spec import CacheSpec


class PageIndex(Protocol):
    """Answers where a query's attention goes, for all sequences of one cache."""

    tells_shares: ClassVar[bool]
    """It knows every page, and estimates masses rather than bounds them: their shares tell a selection's coverage."""

    def masses(self, q: Tensor, context: Context) -> Tensor:
        """[R, Hq, F] fp32: natural log of each page's share of a query's attention, up to a factor per row and head.

        q [R, Hq, D], one query in each row of the step, whose keys are cached already. -inf: nothing worth reading was
        found there. Every page behind the last full one, the row's own, is known exactly or not at all.
        """

    def observe(self, q: Tensor, context: Context) -> None:
        """Note a step's queries [T, Hq, D] of one layer, once its keys are cached."""

    def forget(self, frames: Sequence[int]) -> None:
        """These frames are about to become full of other tokens; nothing that was known of their last ones counts."""


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
    tells_shares: ClassVar[bool] = True
    scans: ClassVar[bool] = False
    host: ClassVar[bool] = False

    def observe(self, q: Tensor, context: Context) -> None:
        pass

    def forget(self, frames: Sequence[int]) -> None:
        pass
