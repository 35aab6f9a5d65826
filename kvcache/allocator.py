"""Who holds which frame. Host integers only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class OutOfFrames(RuntimeError):
    """More frames were asked for than are available."""


class FrameAllocator:
    """Frames are free, held (somebody references them) or idle (nobody does, but their content is kept).

    Idle frames are handed out again when no free one is left, the one that has been idle longest first.
    """

    def __init__(self, num_frames: int) -> None:
        self.total = num_frames
        self.on_evict: Callable[[int], None] = lambda frame: None
        """Called with a kept frame whose content is about to be given up."""
        self._free = list(range(num_frames - 1, -1, -1))
        self._references = [0] * num_frames
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int]:
        """`count` frames with one reference each; raises `OutOfFrames` and takes none when there are fewer."""
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
        """One more reference to a held or idle frame."""
        assert self._references[frame] or frame in self._idle, f"frame {frame} is free"
        self._idle.pop(frame, None)
        self._references[frame] += 1

    def keep(self, frame: int) -> None:
        """Let the frame go idle rather than free when its last reference is released."""
        self._kept.add(frame)

    def unkeep(self, frame: int) -> None:
        """Let the frame become free with its last reference after all; at once if it is idle."""
        self._kept.discard(frame)
        if frame in self._idle:
            del self._idle[frame]
            self._free.append(frame)

    def exclusive(self, frame: int) -> bool:
        """Nobody but its one holder reads the frame, now or later."""
        return self._references[frame] == 1 and frame not in self._kept

    def release(self, frame: int) -> None:
        """One reference less."""
        assert self._references[frame] > 0, f"frame {frame} is not held"
        self._references[frame] -= 1
        if self._references[frame]:
            return
        if frame in self._kept:
            self._idle[frame] = None
        else:
            self._free.append(frame)
