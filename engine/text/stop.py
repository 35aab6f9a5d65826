"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Matcher of stop strings in one text that comes in pieces: the string that completes first ends it.

    Of two that complete at the same character the longer one counts. Text is held back only while it may still become
    part of a stop string.
    """

    def __init__(self, strings: Sequence[str], include: bool = False) -> None:
        self._patterns = [_Pattern(text) for text in sorted(strings, key=len, reverse=True)]
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is final now, and the stop string that ended it, if any: nothing may be pushed after that."""
        seen = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            if matched := self._advance(character):
                self._held = ""
                return seen[: end if self._include else end - len(matched)], matched
        free = len(seen) - max((pattern.length for pattern in self._patterns), default=0)
        self._held = seen[free:]
        return seen[:free], None

    def flush(self) -> str:
        """Text that was held back, final once no more follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        complete = [pattern.text for pattern in self._patterns if pattern.advance(character)]
        return complete[0] if complete else None


class _Pattern:
    """Length of one string's prefix that the text so far ends with (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        self._borders = _borders(text)

    def advance(self, character: str) -> bool:
        while self.length and self.text[self.length] != character:
            self.length = self._borders[self.length - 1]
        if self.text[self.length] == character:
            self.length += 1
        return self.length == len(self.text)


def _borders(text: str) -> list[int]:
    """For every prefix of `text`, the length of its longest proper prefix that it also ends with."""
    borders = [0] * len(text)
    length = 0
    for end in range(1, len(text)):
        while length and text[end] != text[length]:
            length = borders[length - 1]
        length += text[end] == text[length]
        borders[end] = length
    return borders
