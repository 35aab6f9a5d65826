"""What was built over runs of full pages, found again by the frames that hold them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Blocks(Generic[T]):
    """Things made of what certain frames hold, and worth nothing once one of them holds something else.

    Sequences that share a prefix hold the same frames, and so find the same things.
    """

    def __init__(self) -> None:
        self._things: dict[tuple[Hashable, tuple[int, ...]], T] = {}
        self._users: defaultdict[int, set[tuple[Hashable, tuple[int, ...]]]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._things)

    def get(self, kind: Hashable, frames: tuple[int, ...]) -> T | None:
        """What was put for these frames in this order; `kind` tells apart what they mean, such as a layer."""
        return self._things.get((kind, frames))

    def put(self, kind: Hashable, frames: tuple[int, ...], thing: T) -> None:
        self._things[kind, frames] = thing
        for frame in frames:
            self._users[frame].add((kind, frames))

    def forget(self, frames: Iterable[int]) -> None:
        """Drop everything that was made of any of these frames."""
        for frame in frames:
            for key in self._users.pop(frame, ()):
                self._things.pop(key, None)
                for other in key[1]:
                    if other in self._users:
                        self._users[other].discard(key)
