"""Frame allocator: every frame is free, held or idle, and none is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from keysift.kvcache import FrameAllocator, OutOfFrames, PageKeys, PrefixCache


def test_take_gives_distinct_frames_until_none_is_left() -> None:
    allocator = FrameAllocator(5)
    assert sorted(allocator.take(3) + allocator.take(2)) == [0, 1, 2, 3, 4]
    with pytest.raises(OutOfFrames, match="1 frames asked for, 0 of 5 available"):
        allocator.take(1)


def test_a_refused_take_takes_nothing() -> None:
    allocator = FrameAllocator(3)
    with pytest.raises(OutOfFrames):
        allocator.take(4)
    assert allocator.available == 3


def test_the_longest_idle_frame_is_evicted_first() -> None:
    allocator = FrameAllocator(3)
    evicted: list[int] = []
    allocator.on_evict = evicted.append
    first, second, third = allocator.take(3)
    for frame in (second, first, third):
        allocator.keep(frame)
        allocator.release(frame)
    allocator.hold(second)
    assert allocator.take(2) == [first, third]
    assert evicted == [first, third]


class PrefixMachine(RuleBasedStateMachine):
    """Random sequences of pages that begin, share, are offered for reuse and end."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = FrameAllocator(12)
        self.prefix = PrefixCache(self.allocator)
        self.content: dict[int, bytes] = {}
        self.live: list[list[int]] = []

    @rule(target=held, tokens=st.lists(st.integers(0, 1), min_size=2, max_size=12))
    def start(self, tokens: list[int]) -> list[int]:
        keys = PageKeys("model", 2).upto(tokens)
        frames = self.prefix.match(keys)
        assert [self.content[frame] for frame in frames] == keys[: len(frames)], "a hit has the content of its key"
        for frame in frames:
            self.allocator.hold(frame)
        try:
            fresh = self.allocator.take(len(keys) - len(frames))
        except OutOfFrames:
            fresh, keys = [], keys[: len(frames)]
        for key, frame in zip(keys[len(frames) :], fresh, strict=True):
            self.content[frame] = key
            self.prefix.insert(key, frame)
        self.live.append(frames + fresh)
        return frames + fresh

    @rule(frames=consumes(held))
    def stop(self, frames: list[int]) -> None:
        for frame in reversed(frames):
            self.allocator.release(frame)
        self.live.remove(frames)

    @rule(frames=consumes(held))
    def fail(self, frames: list[int]) -> None:
        """Spoil the content of these frames: no prefix may match them, though other sequences may still hold them."""
        for frame in frames:
            self.prefix.withdraw(frame)
            self.content[frame] = b"spoilt"
        self.stop(frames)

    @invariant()
    def nothing_is_lost(self) -> None:
        used = {frame for frames in self.live for frame in frames}
        assert self.allocator.available + len(used) == self.allocator.total


TestPrefix = PrefixMachine.TestCase


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 8), st.integers(0, 40))
def test_keys_do_not_depend_on_how_the_tokens_arrived(tokens: list[int], page_size: int, cut: int) -> None:
    grown = PageKeys("root", page_size)
    grown.upto(tokens[:cut])
    assert grown.upto(tokens) == PageKeys("root", page_size).upto(tokens)
    assert len(grown.upto(tokens)) == len(tokens) // page_size


def test_keys_differ_with_the_root_and_with_everything_before_the_page() -> None:
    base = PageKeys("a", 2).upto([1, 2, 3, 4])
    assert base[0] != PageKeys("b", 2).upto([1, 2])[0]
    assert base[1] != PageKeys("a", 2).upto([0, 2, 3, 4])[1]
    assert base[0] == PageKeys("a", 2).upto([1, 2, 9, 9])[0]


def test_keys_of_pages_that_are_computed_together_stand_for_all_of_them() -> None:
    keys = PageKeys("a", 2, together=2).upto([1, 2, 3, 4, 5, 6])
    assert len(keys) == len(set(keys)) == 2, "those of the third page come with the fourth"
    assert not set(keys) & set(PageKeys("a", 2, together=2).upto([1, 2, 9, 9]))
