"""Identity of what full pages hold."""

from __future__ import annotations

from collections.abc import Iterable, Set


class Contents:
    """The contents of a run of full pages, equal to themselves until one of the pages is written anew.

    It is made of the pages' frames, and is what entries are looked up by. Tiers may put the same pages elsewhere, so
    none of these numbers indexes a tensor: keys are read through `Frames` alone, whose table belongs to them.
    """

    __slots__ = ("_frames", "_hash")

    def __init__(self, frames: Iterable[int]) -> None:
        self._frames = tuple(frames)
        self._hash = hash(self._frames)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contents) and self._hash == other._hash and self._frames == other._frames

    def __hash__(self) -> int:
        return self._hash

    def __len__(self) -> int:
        """Pages."""
        return len(self._frames)

    @property
    def last(self) -> int:
        """Frame of the last page."""
        return self._frames[-1]

    def meets(self, frames: Set[int]) -> bool:
        """True if a page is in one of these frames."""
        return bool(frames) and not frames.isdisjoint(self._frames)

    def pages(self) -> Iterable[Contents]:
        """The contents of each page."""
        return (Contents([frame]) for frame in self._frames)
