"""Prompts of an exact number of tokens, assembled from pieces that are tokenized one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from ..sample import Match

if TYPE_CHECKING:
    from ....model.tokenizer import Tokenizer

Tokens = list[int]
DEPTHS = 40
"""Number of evenly spaced depths among which RULER draws the places of its needles."""


class TooShort(Exception):
    """The room for a context is less than the least that a task needs."""


class Pieces:
    """Tokenizer of parts of a text; pieces begin at a line or a word."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, before: str = "\n") -> Tokens:
        """Tokens of `text` after the text `before`, as a tokenizer may treat the start of a text differently.

        If one token would span the border, `text` is tokenized alone.
        """
        head, both = self.alone(before), self.alone(before + text)
        return both[len(head) :] if both[: len(head)] == head else self.alone(text)

    def alone(self, text: str) -> Tokens:
        """Tokens of `text`, without special tokens around it."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def opening(self) -> Tokens:
        """The special tokens that begin a text."""
        return list(self._tokenizer.opening)


@dataclass(frozen=True, slots=True)
class Puzzle:
    """A question, its answers, and a context that fills the room."""

    context: Callable[[int], Tokens]
    """Returns a context of exactly the given number of tokens; raises `TooShort`."""
    question: str
    """Text after the context; it begins with a line break unless the context ends with one."""
    prefix: str
    """Beginning of the answer, part of the prompt."""
    answers: tuple[str, ...]
    gold: str
    """The answer as a continuation of the prefix."""
    match: Match = "all"


Build = Callable[[Random, Pieces], Puzzle]


def fill(room: int, head: Tokens, hay: Iterator[Tokens], needles: Sequence[Tokens], dice: Random) -> Tokens:
    """`room` tokens: the head, then as much hay as fits, with the needles in order at random depths.

    Only the first piece of hay is cut, at its front; needles and all other pieces are complete.
    """
    missing = room - len(head) - sum(map(len, needles))
    if missing < 0:
        raise TooShort
    pieces = stack(missing, hay)
    for at, needle in reversed([*zip(places(len(pieces), len(needles), dice), needles, strict=True)]):
        pieces.insert(at, needle)
    return [*head, *(token for piece in pieces for token in piece)]


def stack(count: int, hay: Iterator[Tokens]) -> list[Tokens]:
    """Pieces of hay of `count` tokens in all, the front of the first one cut away."""
    pieces: list[Tokens] = []
    while count > 0:
        pieces.append(next(hay))
        count -= len(pieces[-1])
    while count < 0 and len(pieces[0]) <= -count:
        count += len(pieces.pop(0))
    if count < 0:
        pieces[0] = pieces[0][-count:]
    return pieces


def places(pieces: int, needles: int, dice: Random) -> list[int]:
    """Ascending indices of the pieces that needles precede; never the first, which may be half a sentence."""
    depths = sorted(dice.sample(range(DEPTHS), needles))
    return [min(max(round(pieces * depth / (DEPTHS - 1)), 1), pieces) for depth in depths]
