"""Prefix reuse: a hash chain over full pages finds the frames that already hold them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from .allocator import FrameAllocator


class PageKeys:
    """Keys of the full pages of one growing list of tokens: hashes of a page and of all that precedes it.

    The root stands for all else that the content depends on: model, strategy, salt. Where the content of a page depends
    on pages after it too, those that are computed `together`, its key is a hash of them all, and it has none until all
    of them are full.
    """

    def __init__(self, root: str, page_size: int, together: int = 1) -> None:
        self._together = together
        self._grain = together * page_size
        self._last = blake2b(root.encode(), digest_size=16).digest()
        self._keys: list[bytes] = []

    def upto(self, tokens: Sequence[int]) -> list[bytes]:
        """Keys of all full pages of `tokens`, which must agree with the lists of earlier calls."""
        grain, together = self._grain, self._together
        for start in range(len(self._keys) // together * grain, len(tokens) - grain + 1, grain):
            pages = array("q", tokens[start : start + grain]).tobytes()
            self._last = blake2b(self._last + pages, digest_size=16).digest()
            self._keys += [self._last + place.to_bytes(4, "little") for place in range(together)]
        return self._keys[: len(tokens) // grain * together]


class PrefixCache:
    """Full pages that later prompts may share, for as long as the allocator does not reuse their frames."""

    def __init__(self, allocator: FrameAllocator) -> None:
        self._allocator = allocator
        self._frames: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._notes: dict[int, object] = {}
        allocator.on_evict = self._forget

    def __len__(self) -> int:
        return len(self._frames)

    def __contains__(self, key: bytes) -> bool:
        return key in self._frames

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Frames of the longest known prefix of `keys`; the caller holds those that it uses."""
        frames: list[int] = []
        for key in keys:
            if (frame := self._frames.get(key)) is None:
                break
            frames.append(frame)
        return frames

    def note(self, frame: int) -> object:
        """The note of an offered frame."""
        return self._notes[frame]

    def insert(self, key: bytes, frame: int, note: object = None, *, replace: bool = False) -> None:
        """Offer a full, held frame for reuse, with a note; a known key keeps its frame, unless it is replaced."""
        if (known := self._frames.get(key)) is not None:
            if not replace or known == frame:
                return
            self.withdraw(known)
        self._frames[key] = frame
        self._keys[frame] = key
        self._notes[frame] = note
        self._allocator.keep(frame)

    def withdraw(self, frame: int) -> None:
        """End the reuse of a frame, if it is offered."""
        if frame in self._keys:
            self._forget(frame)
            self._allocator.unkeep(frame)

    def _forget(self, frame: int) -> None:
        del self._frames[self._keys.pop(frame)], self._notes[frame]
