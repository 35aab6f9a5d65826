"""Stop strings in a stream of text."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain, compress


class StopStrings:
    """Matcher of stop strings in one text that comes in pieces, some of which are not shown.

    The string that completes first ends the text; of two that complete at the same character the longer one counts.
    Text is held back only while it may still become part of a stop string. Making one takes no time however long the
    strings are: tables grow with the text that matches.
    """

    def __init__(self, strings: Sequence[str], include: bool = False) -> None:
        self._by_first: dict[str, list[_Pattern]] = {}
        for text in dict.fromkeys(strings):
            self._by_first.setdefault(text[0], []).append(_Pattern(text))
        self._include = include
        self._begun: list[_Pattern] = []
        """Patterns of which the text so far ends with a part."""
        self._held, self._shown = "", b""
        """Text that is not final yet, and a byte for each of its characters: 1 where it is shown."""

    def push(self, text: str, shown: bool = True, ends: bool = True) -> tuple[str, str | None]:
        """Shown text that is final now, and the stop string that ended it, if any: nothing may be pushed after that.

        A stop string that completes within a text that does not count as an end (`ends`) is text as any other.
        """
        if not self._begun and self._by_first.keys().isdisjoint(text):
            return text if shown else "", None
        seen, mask = self._held + text, self._shown + bytes((shown,)) * len(text)
        for end, character in enumerate(text, start=len(self._held) + 1):
            if (matched := self._advance(character)) is not None and ends:
                self._held, self._shown = "", b""
                before = _visible(seen, mask, end - len(matched))
                return before + matched if self._include else before, matched
        free = len(seen) - max((pattern.length for pattern in self._begun), default=0)
        self._held, self._shown = seen[free:], mask[free:]
        return _visible(seen, mask, free), None

    def flush(self) -> str:
        """Shown text that was held back, final once no more follows."""
        rest = _visible(self._held, self._shown, len(self._held))
        self._held, self._shown = "", b""
        return rest

    def _advance(self, character: str) -> str | None:
        """The longest stop string that completes with this character."""
        fresh = [pattern for pattern in self._by_first.get(character, ()) if not pattern.length]
        complete = [pattern.text for pattern in chain(self._begun, fresh) if pattern.advance(character)]
        self._begun = [pattern for pattern in chain(self._begun, fresh) if pattern.length]
        return max(complete, key=len, default=None)


def _visible(text: str, mask: bytes, end: int) -> str:
    """The characters of text[:end] that are shown."""
    return text[:end] if 0 not in mask[:end] else "".join(compress(text[:end], mask))


class _Pattern:
    """Length of one string's proper prefix that the text so far ends with (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        self._borders = array("l")
        """For prefixes of `text`, the length of the longest proper prefix that they also end with, as far as needed."""

    def advance(self, character: str) -> bool:
        """True where the string completes with this character."""
        self.length = self._extended(self.length, character)
        border = self._border(self.length)
        if complete := self.length == len(self.text):
            self.length = border
        return complete

    def _extended(self, length: int, character: str) -> int:
        """Length of the longest prefix that ends a text which ended with a prefix of `length` before `character`."""
        while length and self.text[length] != character:
            length = self._borders[length - 1]
        return length + (self.text[length] == character)

    def _border(self, length: int) -> int:
        """Longest proper prefix that the prefix of this length, at most one more than any before, also ends with."""
        if length > (known := len(self._borders)):
            self._borders.append(self._extended(self._borders[-1], self.text[known]) if known else 0)
        return self._borders[length - 1] if length else 0
