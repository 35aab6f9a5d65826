"""Where pages physically are."""

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
    """Keys and values that an op can read, and where each page of each row is in them."""

    k: Tensor
    """[N, Hkv, S, D]"""
    v: Tensor
    """[N, Hkv, S, D]"""
    table: Tensor
    """[R, Hkv, F] int32, page -> frame."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What reading and writing pages has moved between memories."""

    hits: int = 0
    """Pages of one layer and KV head that were where an op could read them."""
    misses: int = 0
    """The same that had to be fetched first."""
    fetched: int = 0
    """Bytes that came from the pages' home."""
    written: int = 0
    """Bytes that went there."""
    prefetched: int = 0
    """Pages of one layer and KV head that were fetched on a guess."""
    prefetch_hits: int = 0
    """Those of them that were read."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) - getattr(other, name) for name in self.__slots__))

    def __floordiv__(self, parts: int) -> Traffic:
        return Traffic(*(getattr(self, name) // parts for name in self.__slots__))


class Tier(Protocol):
    """Holds the pages of all layers and brings those that a selection names where an op can read them.

    A page lives in its home frame, the one that tables name; where an op reads it is the tier's business.
    """

    steady: ClassVar[bool]
    """What was once readable stays where it is, so that a thread beside may go on reading it."""
    prefetch_pages: int
    """Pages of each KV head that may be foreseen; 0: nobody need guess."""

    def claim(self, frames: Sequence[int]) -> None:
        """These frames are about to be used. Raises `OffloadError` where there is no room for them."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        """Put the step's keys and values [T, Hkv, D] into their slots; summarise and encode pages that become full."""

    def resident(self, layer: int, selection: Selection, step: Step) -> Frames:
        """The selected pages, readable until the next call. Raises `OffloadError` where they do not fit at once."""

    def own(self, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        """Keys [*, Hkv, S, D], and where in them the page of each row's last query is: [R, Hkv] int32."""

    def parts(self, layer: int, selection: Selection, step: Step) -> Iterator[tuple[Selection, Frames]]:
        """The same in as many disjoint parts as it takes, each readable until the next is asked for."""

    def prefetch(self, layer: int, pages: Tensor, step: Step) -> None:
        """Begin to bring pages [R, H, P] that the layer may read for the next token; a guess costs time, nothing else.

        Only frames that neither this token nor the one before has read make room for them.
        """

    def summaries(self, layer: int) -> Tensor:
        """[N, Hkv, 4, D]: mean, least and greatest key and mean value of each full frame."""

    def codes(self, layer: int) -> Codes:
        """The keys of each full frame in a few bits; without a word where the spec has no codes."""

    def holds(self, pages: int) -> bool:
        """Whether all of so many pages of one layer can be read at once."""

    @property
    def traffic(self) -> Traffic:
        """What has moved since the start; may wait for the device."""

    def close(self) -> None:
        """Give up all memory and files; nothing may be asked afterwards."""


class Unmoved:
    """What a tier says where pages stay where they are written."""

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
    """Of frames that hold it: see `Tier.own`."""
    last = step.last_pages.long()[:, None, None].expand(-1, frames.table.shape[1], 1)
    return frames.k, frames.table.gather(2, last)[..., 0]
