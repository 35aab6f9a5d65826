"""Memory of what indexes keep, and what they keep by the contents of pages."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from ..contents import Contents

T = TypeVar("T")

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
        freed = 0
        for block, used in self._blocks.items():
            if self.used - freed + size <= self.limit or used + IN_USE >= self._now:
                break
            leaving.append(block)
            freed += block.bytes
        if self.used - freed + size > self.limit:
            return False
        for block in leaving:
            block.drop()
        return True

    def leave(self, block: Block[Any]) -> None:
        """Forget a block that was dropped."""
        self._blocks.pop(block, None)


class Block(Generic[T]):
    """Parts that were made from the contents of some pages, by layer."""

    def __init__(self, blocks: Blocks[T], contents: Contents) -> None:
        self.contents = contents
        self.parts: dict[int, T] = {}
        self.bytes = 0
        self._blocks = blocks

    def put(self, layer: int, part: T, size: int) -> None:
        """Keep a part of so many bytes, for which `Room.make` has made room."""
        self.parts[layer] = part
        self.bytes += size
        self._blocks.room.used += size

    def drop(self) -> None:
        """Forget the block and its parts."""
        self._blocks.drop(self)


class Blocks(Generic[T]):
    """Blocks by the contents that they were made from, each valid until one of its pages is written anew.

    Sequences that share a prefix hold the same pages, and so share blocks.
    """

    def __init__(self, room: Room, cancel: Callable[[T], None] = lambda part: None) -> None:
        """`cancel` is called with every part that is dropped."""
        self.room = room
        self.version = 0
        """Grows whenever a block is dropped."""
        self._cancel = cancel
        self._blocks: dict[Contents, Block[T]] = {}
        self._users: defaultdict[Contents, set[Block[T]]] = defaultdict(set)  # of each page

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
        if (block := self._blocks.get(contents)) is None:
            block = self._blocks[contents] = Block(self, contents)
            for page in contents.pages():
                self._users[page].add(block)
        self.room.touch(block)
        return block

    def forget(self, frames: Sequence[int]) -> None:
        """Drop every block of pages in any of these frames, which are about to hold other tokens."""
        for page in Contents(frames).pages():
            for block in list(self._users.get(page, ())):
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
        for page in block.contents.pages():
            self._users[page].discard(block)
            if not self._users[page]:
                del self._users[page]
        self.version += 1
        self.room.used -= block.bytes
        self.room.leave(block)
        for part in block.parts.values():
            self._cancel(part)
