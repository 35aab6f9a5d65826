"""Entries built over runs of full pages, looked up by the frames that hold them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Blocks(Generic[T]):
    """A map from runs of frames to the entry built over their contents, valid until one of them is reused.

    Sequences that share a prefix hold the same frames, and so share entries.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[Hashable, tuple[int, ...]], T] = {}
        self._users: defaultdict[int, set[tuple[Hashable, tuple[int, ...]]]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, kind: Hashable, frames: tuple[int, ...]) -> T | None:
        """The entry of these frames in this order, or None; `kind` separates entries, by layer for example."""
        return self._entries.get((kind, frames))

    def put(self, kind: Hashable, frames: tuple[int, ...], entry: T) -> None:
        self._entries[kind, frames] = entry
        for frame in frames:
            self._users[frame].add((kind, frames))

    def forget(self, frames: Iterable[int]) -> None:
        """Drop every entry over any of these frames."""
        for frame in frames:
            for key in self._users.pop(frame, ()):
                self._entries.pop(key, None)
                for other in key[1]:
                    if other in self._users:
                        self._users[other].discard(key)
