"""Interface of tiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from ..ops.encode import Codes
from ..selection import Selection
from ..step import Step


@dataclass(frozen=True, slots=True)
class Frames:
    """Keys and values that an op can read, and the table of each row's pages in them."""

    k: Tensor
    """[N, Hkv, S, D]"""
    v: Tensor
    """[N, Hkv, S, D]"""
    table: Tensor
    """[R, Hkv, F] int32, page -> frame."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Pages read, and bytes moved between memories."""

    hits: int = 0
    """Pages of one layer and KV head that tokens read and that were resident."""
    misses: int = 0
    """Pages of one layer and KV head that tokens read and that had to be fetched."""
    fetched: int = 0
    """Bytes read from the backing store."""
    written: int = 0
    """Bytes written to the backing store."""
    prefetched: int = 0
    """Pages of one layer and KV head that were prefetched."""
    prefetch_hits: int = 0
    """Prefetched pages that tokens then read."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) - getattr(other, name) for name in self.__slots__))

    def __floordiv__(self, parts: int) -> Traffic:
        return Traffic(*(getattr(self, name) // parts for name in self.__slots__))


class Tier(Protocol):
    """Memory of the pages of all layers, which makes those of a selection readable by an op.

    The cache's tables name a page by its frame; the tier chooses the place that an op reads it from.
    """

    steady: ClassVar[bool]
    """Pages stay in place once they are readable, so that another thread may go on reading them."""
    prefetch_pages: int
    """Pages of each KV head that may be prefetched for a token; 0: none."""

    def claim(self, frames: Sequence[int]) -> None:
        """Make room for frames that are about to be used. Raises `OffloadError` if there is none."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        """Write the step's keys and values [T, Hkv, D] to their slots; summarise and encode pages that become full."""

    def resident(self, layer: int, selection: Selection, step: Step) -> Frames:
        """Make the selected pages readable until the next call. Raises `OffloadError` if they do not fit at once."""

    def own(self, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        """Keys [*, Hkv, S, D], and the place in them of the page of each row's last query: [R, Hkv] int32."""

    def parts(self, layer: int, selection: Selection, step: Step) -> Iterator[tuple[Selection, Frames]]:
        """Make the selected pages readable in disjoint parts, each until the next one is requested."""

    def prefetch(self, layer: int, pages: Tensor, step: Step) -> None:
        """Begin to fetch pages [R, H, P] that the layer may read for the next token.

        They replace only pages that neither this token nor the one before has read.
        """

    def summaries(self, layer: int) -> Tensor:
        """[N, Hkv, 4, D]: mean, least and greatest key and mean value of each full frame."""

    def codes(self, layer: int) -> Codes:
        """Keys of each full frame in a few bits; empty if the spec has no codes."""

    def holds(self, pages: int) -> bool:
        """True if so many pages of one layer can be read at once."""

    @property
    def traffic(self) -> Traffic:
        """Totals since the start; may wait for the device."""

    def close(self) -> None:
        """Free all memory and files; the tier must not be used afterwards."""


class InPlaceTier:
    """Base of tiers whose pages are read where they were written."""

    steady: ClassVar[bool] = True
    prefetch_pages = 0
    traffic = Traffic()

    def claim(self, frames: Sequence[int]) -> None:
        pass

    def prefetch(self, layer: int, pages: Tensor, step: Step) -> None:
        pass

    def holds(self, pages: int) -> bool:
        return True

    def close(self) -> None:
        pass


def own_page(frames: Frames, step: Step) -> tuple[Tensor, Tensor]:
    """`Tier.own` from frames that hold the pages."""
    last = step.last_pages.long()[:, None, None].expand(-1, frames.table.shape[1], 1)
    return frames.k, frames.table.gather(2, last)[..., 0]
