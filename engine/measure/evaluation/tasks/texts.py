"""Material of prompts: noise, English prose and words, numbers and names."""

from __future__ import annotations

import importlib
import re
import uuid
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import count
from random import Random

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's haystack of repeated sentences."""
_BLANK = re.compile(r"\n\s*\n")
_SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_NOT_PROSE = re.compile(r"::=|>>>|\*\*\*|===|---|\|")
_WORD = re.compile(r"(?<![\w.'`])[a-z]{4,10}(?![\w.'`(=])")


@cache
def sentences() -> tuple[str, ...]:
    """Distinct sentences of CPython's documentation, part of every Python, without code and tables."""
    paragraphs = (" ".join(part.split()) for topic in _topics() for part in _BLANK.split(topic))
    return tuple(dict.fromkeys(line for text in paragraphs if _is_prose(text) for line in _SENTENCE.split(text)))


@cache
def words() -> tuple[str, ...]:
    """Plain words of 4 to 10 letters from the same documentation, in alphabetical order."""
    return tuple(sorted({word for topic in _topics() for word in _WORD.findall(topic)}))


def prose(dice: Random) -> Iterator[str]:
    """Consecutive sentences from a random place on, endlessly."""
    first, lines = dice.randrange(len(sentences())), sentences()
    return (lines[number % len(lines)] for number in count(first))


def number(dice: Random, digits: int) -> str:
    return str(dice.randrange(10 ** (digits - 1), 10**digits))


def pair_of_words(dice: Random) -> str:
    """A name that no text contains by chance."""
    return "-".join(dice.sample(words(), 2))


def random_uuid(dice: Random) -> str:
    return str(uuid.UUID(int=dice.getrandbits(128), version=4))


def capitals(dice: Random, letters: int) -> str:
    return "".join(dice.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=letters))


def numbered(items: Sequence[str]) -> str:
    """`1. first 2. second`, as RULER writes lists."""
    return " ".join(f"{place}. {item}" for place, item in enumerate(items, 1))


def _topics() -> list[str]:
    # Half a megabyte: imported when a task is made, not when tasks are listed.
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return [topics[name] for name in sorted(topics)]


def _is_prose(text: str) -> bool:
    letters = sum(letter.isalpha() or letter == " " for letter in text)
    return text[:1].isupper() and text.endswith(".") and not _NOT_PROSE.search(text) and letters > 0.85 * len(text)
