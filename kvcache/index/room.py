"""Memory of what indexes keep, and what they keep by the contents of pages."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Set
from itertools import takewhile
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

from ..contents import Contents

T = TypeVar("T")

BLOCK_BYTES, PAGE_BYTES = 1024, 8
"""What a block takes besides its parts, and for each of its pages."""

IN_USE = 64
"""Steps after its last use in which a block does not give way: two that are in use would take turns being built."""


class Room:
    """Bytes that the blocks of all indexes of a cache may take; those used longest ago give way to new ones."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit`: None: any number of bytes."""
        self.limit = limit
        self.used = 0
        self._now = 0
        self._blocks: OrderedDict[Block[Any], int] = OrderedDict()  # the one used longest ago first -> when it was

    def tick(self) -> None:
        """Begin a step."""
        self._now += 1

    def touch(self, block: Block[Any]) -> None:
        """Note that the block is used in this step."""
        self._blocks[block] = self._now
        self._blocks.move_to_end(block)

    def make(self, size: int) -> bool:
        """Make room for `size` bytes. False: blocks in use take too much; then nothing gave way."""
        if self.limit is None:
            return True
        leaving: list[Block[Any]] = []
        old, free = self._old(), self.limit - self.used
        while free < size:
            if (block := next(old, None)) is None:
                return False
            leaving.append(block)
            free += block.bytes
        for block in leaving:
            block.drop()
        return True

    @property
    def available(self) -> float:
        """Bytes that `make` can make room for."""
        return math.inf if self.limit is None else self.limit - self.used + sum(block.bytes for block in self._old())

    def _old(self) -> Iterator[Block[Any]]:
        """Blocks that may give way, the one used longest ago first."""
        used = takewhile(lambda item: item[1] + IN_USE < self._now, self._blocks.items())
        return (block for block, _ in used)

    def leave(self, block: Block[Any]) -> None:
        """Forget a block that was dropped."""
        self._blocks.pop(block, None)


class Block(Generic[T]):
    """Parts that were made from the contents of some pages, by layer. It is kept from its first part on."""

    __slots__ = ("__weakref__", "_blocks", "bytes", "contents", "parts")

    def __init__(self, blocks: Blocks[T], contents: Contents) -> None:
        self.contents = contents
        self.parts: dict[int, T] = {}
        self.bytes = 0
        self._blocks = blocks

    @property
    def least(self) -> int:
        """Bytes that its first part takes besides its own."""
        return 0 if self.parts else BLOCK_BYTES + PAGE_BYTES * len(self.contents)

    def put(self, layer: int, part: T, size: int) -> None:
        """Keep a part of so many bytes, for which, and for `least`, `Room.make` has made room."""
        size += self.least
        if not self.parts:
            self._blocks.keep(self)
        self.parts[layer] = part
        self.bytes += size
        self._blocks.room.used += size

    def drop(self) -> None:
        """Forget the block and its parts."""
        self._blocks.drop(self)


class Blocks(Generic[T]):
    """Blocks by the contents that they were made from, each valid until its last page is written anew.

    A sequence's pages are written in order, so the last one of a run is written anew with any page before it, unless
    that gets the same tokens again: to look for it costs the same for runs of any length. Sequences that share a
    prefix hold the same pages, and so share blocks.
    """

    def __init__(self, room: Room, cancel: Callable[[T], None] = lambda part: None) -> None:
        """`cancel` is called with every part that is dropped."""
        self.room = room
        self.version = 0
        """Grows whenever a block is dropped."""
        self._cancel = cancel
        self._blocks: dict[Contents, Block[T]] = {}
        self._new: WeakValueDictionary[Contents, Block[T]] = WeakValueDictionary()  # without parts, while someone looks
        self._ending: defaultdict[int, set[Block[T]]] = defaultdict(set)  # by the frame of their last page

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def bytes(self) -> int:
        return sum(block.bytes for block in self._blocks.values())

    def get(self, contents: Contents) -> Block[T] | None:
        """The block of these contents, which counts as used; None: there is none."""
        if (block := self._blocks.get(contents)) is not None:
            self.room.touch(block)
        return block

    def at(self, contents: Contents) -> Block[T]:
        """The block of these contents, a new one without parts if there is none."""
        if (block := self.get(contents) or self._new.get(contents)) is None:
            block = self._new[contents] = Block(self, contents)
        return block

    def keep(self, block: Block[T]) -> None:
        """Keep a block that gets its first part."""
        self._new.pop(block.contents, None)
        self._blocks[block.contents] = block
        self._ending[block.contents.last].add(block)
        self.room.touch(block)

    def forget(self, frames: Set[int]) -> None:
        """Drop every block that ends in one of these frames, which are about to hold other tokens."""
        for frame in self._ending.keys() & frames:
            for block in list(self._ending[frame]):
                self.drop(block)

    def clear(self) -> None:
        """Drop all blocks."""
        for block in list(self._blocks.values()):
            self.drop(block)

    def drop(self, block: Block[T]) -> None:
        """Forget a block and its parts."""
        if self._blocks.get(block.contents) is not block:
            return
        del self._blocks[block.contents]
        ending = self._ending[block.contents.last]
        ending.discard(block)
        if not ending:
            del self._ending[block.contents.last]
        self.version += 1
        self.room.used -= block.bytes
        self.room.leave(block)
        for part in block.parts.values():
            self._cancel(part)
