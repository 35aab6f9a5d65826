"""Prompts of real text, as random tokens are no test of sparse attention."""

from __future__ import annotations

import pydoc_data.topics
import random
from pathlib import Path

from ...errors import InvalidRequest
from ...model.tokenizer import Tokenizer

CHARACTERS = 8
"""Most characters per token, in text like English."""


class Prompts:
    """Prompts of an exact number of tokens, cut from one text that is repeated at its end."""

    def __init__(self, tokenizer: Tokenizer, text: str, seed: int, longest: int) -> None:
        """`longest`: tokens of the longest batch, which bounds the text that is tokenized."""
        self._opening = tokenizer.opening
        self._tokens = tokenizer.encode(text[: CHARACTERS * longest], add_special_tokens=False)
        if not self._tokens:
            raise InvalidRequest("text", "some text, got none")
        self._start = random.Random(seed).randrange(len(self._tokens))

    def batch(self, count: int, length: int) -> list[tuple[int, ...]]:
        """`count` prompts of `length` tokens, from different places."""
        apart = len(self._tokens) // count
        return [self._cut(self._start + i * apart, length) for i in range(count)]

    def _cut(self, start: int, length: int) -> tuple[int, ...]:
        opening, whole = self._opening[:length], self._tokens
        window = (whole[(start + i) % len(whole)] for i in range(length - len(opening)))
        return (*opening, *window)


def read(path: Path | None) -> str:
    """The text of a file, by default CPython's documentation, part of every Python."""
    if path is None:
        return "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("text", f"a readable text file, got {str(path)!r} ({error})") from None
