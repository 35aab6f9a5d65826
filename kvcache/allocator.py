"""Allocation of frames, in host integers alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class OutOfFrames(RuntimeError):
    """Raised when more frames are requested than are available."""


class FrameAllocator:
    """Reference counts of frames, each of which is free, held, or idle: without references, but with its content kept.

    Idle frames are reused when no free one is left, the longest idle first.
    """

    def __init__(self, num_frames: int) -> None:
        self.total = num_frames
        self.on_evict: Callable[[int], None] = lambda frame: None
        """Called with an idle frame that is about to be reused."""
        self._free = list(range(num_frames - 1, -1, -1))
        self._references = [0] * num_frames
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Frames that can be taken now."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int]:
        """Take `count` frames with one reference each. Raises `OutOfFrames`, taking none, if there are fewer."""
        if count > self.available:
            raise OutOfFrames(f"{count} frames asked for, {self.available} of {self.total} available")
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        frame = self._free.pop() if self._free else self._evict()
        self._references[frame] = 1
        return frame

    def _evict(self) -> int:
        frame, _ = self._idle.popitem(last=False)
        self._kept.discard(frame)
        self.on_evict(frame)
        return frame

    def hold(self, frame: int) -> None:
        """Add a reference to a held or idle frame."""
        assert self._references[frame] or frame in self._idle, f"frame {frame} is free"
        self._idle.pop(frame, None)
        self._references[frame] += 1

    def keep(self, frame: int) -> None:
        """Make the frame idle rather than free when its last reference is released."""
        self._kept.add(frame)

    def unkeep(self, frame: int) -> None:
        """Undo `keep`: the frame becomes free with its last reference, at once if it is idle."""
        self._kept.discard(frame)
        if frame in self._idle:
            del self._idle[frame]
            self._free.append(frame)

    def exclusive(self, frame: int) -> bool:
        """True if the frame has one reference and will not be kept: no other sequence reads it, now or later."""
        return self._references[frame] == 1 and frame not in self._kept

    def release(self, frame: int) -> None:
        """Drop one reference."""
        assert self._references[frame] > 0, f"frame {frame} is not held"
        self._references[frame] -= 1
        if self._references[frame]:
            return
        if frame in self._kept:
            self._idle[frame] = None
        else:
            self._free.append(frame)
