"""The bytes that indexes take are counted, bounded, and free once the pages are written anew."""

from __future__ import annotations

import tracemalloc

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from keysift.kvcache.contents import Contents
from keysift.kvcache.index import room as room_module
from keysift.kvcache.index.room import Blocks, Room

FRAMES = 12
LEAST = room_module.BLOCK_BYTES + room_module.PAGE_BYTES


class Uses(RuleBasedStateMachine):
    """Blocks of two kinds in one room, over frames that are reused."""

    @initialize(limit=st.one_of(st.none(), st.integers(0, 12_000)))
    def begin(self, limit: int | None) -> None:
        self.room = Room(limit)
        self.made = self.dropped = 0
        self.kinds: list[Blocks[int]] = [Blocks(self.room, self.drop), Blocks(self.room, self.drop)]

    def drop(self, part: int) -> None:
        self.dropped += 1

    @rule(kind=st.integers(0, 1), frames=st.lists(st.integers(0, FRAMES - 1), min_size=1, max_size=5, unique=True))
    def build(self, kind: int, frames: list[int]) -> None:
        block = self.kinds[kind].at(Contents(frames))
        layer, size = len(block.parts), len(frames) * 3
        before = self.room.used
        if self.room.make(size + block.least):
            if (
                layer == 0 or block.contents in self.kinds[kind]._blocks
            ):  # it may have given way itself only if it was not in use
                block.put(layer, self.made, size)
                self.made += 1
        else:
            assert self.room.used == before

    @rule(frames=st.lists(st.integers(0, FRAMES - 1), max_size=4))
    def reuse(self, frames: list[int]) -> None:
        for kind in self.kinds:
            kind.forget(frames)
            assert all(block.contents.last not in frames for block in kind._blocks.values())

    @rule(steps=st.sampled_from([1, 1, 70]))
    def pass_by(self, steps: int) -> None:
        for _ in range(steps):
            self.room.tick()

    @rule(kind=st.integers(0, 1))
    def clear(self, kind: int) -> None:
        self.kinds[kind].clear()
        assert self.kinds[kind].bytes == 0

    @invariant()
    def what_is_counted_is_there(self) -> None:
        if not hasattr(self, "room"):
            return
        blocks = [block for kind in self.kinds for block in kind._blocks.values()]
        assert self.room.used == sum(block.bytes for block in blocks) == sum(kind.bytes for kind in self.kinds)
        assert self.room.limit is None or self.room.used <= self.room.limit
        assert set(self.room._blocks) == set(blocks)
        assert self.made - self.dropped == sum(len(block.parts) for block in blocks)
        for kind in self.kinds:
            ending = {(frame, block) for frame, ending in kind._ending.items() for block in ending}
            assert ending == {(block.contents.last, block) for block in kind._blocks.values()}
            assert all(kind._ending.values())
            assert all(block.parts for block in kind._blocks.values())


def test_what_takes_room_is_what_is_there() -> None:
    Uses.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
    Uses.TestCase("runTest").runTest()


def test_what_was_used_longest_ago_gives_way_unless_it_is_in_use() -> None:
    room = Room(10 + 2 * LEAST)
    blocks: Blocks[int] = Blocks(room)
    for frame in range(2):
        room.tick()
        assert room.make(5 + LEAST)
        blocks.at(Contents([frame])).put(0, frame, 5)
    assert not room.make(1), "both are in use"
    for _ in range(room_module.IN_USE + 1):
        room.tick()
        assert blocks.get(Contents([0])) is not None
    assert room.available == 5 + LEAST
    assert room.make(1)
    assert blocks.get(Contents([1])) is None
    assert not room.make(6 + LEAST)
    assert blocks.get(Contents([0])) is not None


@pytest.mark.parametrize("size", [11 + LEAST, 10_000])
def test_what_never_fits_makes_nothing_give_way(size: int) -> None:
    room = Room(10 + LEAST)
    blocks: Blocks[int] = Blocks(room)
    assert room.make(10 + LEAST)
    blocks.at(Contents([0])).put(0, 0, 10)
    for _ in range(2 * room_module.IN_USE):
        room.tick()
    assert not room.make(size)
    assert len(blocks) == 1


def test_a_block_that_found_no_room_is_not_kept() -> None:
    blocks: Blocks[int] = Blocks(Room(0))
    block = blocks.at(Contents(range(1000)))
    assert blocks.at(Contents(range(1000))) is block, "others that look for it meanwhile find it"
    del block
    assert (len(blocks), len(blocks._new), len(blocks.room._blocks)) == (0, 0, 0)


def test_notes_of_a_block_are_few_and_counted() -> None:
    """A new block over many pages is not registered with each of them, which took longer than a step."""
    blocks: Blocks[int] = Blocks(Room())
    pages = 20_000
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    blocks.at(Contents(range(pages))).put(0, 0, 0)
    taken = tracemalloc.get_traced_memory()[0] - before - pages * 32  # the numbers themselves are those of the sequence
    tracemalloc.stop()
    assert taken <= blocks.bytes <= 2 * pages * room_module.PAGE_BYTES
