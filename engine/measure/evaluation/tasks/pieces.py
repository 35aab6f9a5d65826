"""Prompts of an exact number of tokens, put together from pieces that are tokenized one by one."""

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
"""Depths, evenly spaced from the first to the last sentence, among which RULER draws its needles' places."""


class TooShort(Exception):
    """There is less room for a context than the least that a task needs."""


class Pieces:
    """Tokenizes parts of a text as they would stand in the whole; pieces begin where a line or a word does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend

    def __call__(self, text: str, behind: str = "\n") -> Tokens:
        """Tokens of `text` where `behind` goes before it: a tokenizer may treat the start of a whole text differently.

        Where the border itself would become one token, `text` is taken alone.
        """
        before, whole = self.alone(behind), self.alone(behind + text)
        return whole[len(before) :] if whole[: len(before)] == before else self.alone(text)

    def alone(self, text: str) -> Tokens:
        """Tokens of `text`, without those that the model expects around a whole one."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def opening(self) -> Tokens:
        """The special tokens that a whole text begins with."""
        plain, whole = self.alone("x"), list(self._backend.encode("x").ids)
        starts = range(len(whole) - len(plain) + 1)
        return whole[: next((at for at in starts if whole[at : at + len(plain)] == plain), 0)]


@dataclass(frozen=True, slots=True)
class Puzzle:
    """What a task makes of its dice: everything but the filling, which depends on the room there is."""

    context: Callable[[int], Tokens]
    """Tokens of the context, exactly as many as asked for; raises `TooShort`."""
    question: str
    """What goes behind the context, from the line break on where the context does not end with one."""
    prefix: str
    """How the answer begins; it is given to the model."""
    answers: tuple[str, ...]
    gold: str
    """The answer as it goes on behind the prefix."""
    match: Match = "all"


Build = Callable[[Random, Pieces], Puzzle]


def fill(room: int, head: Tokens, hay: Iterator[Tokens], needles: Sequence[Tokens], dice: Random) -> Tokens:
    """`room` tokens: the head, then as much hay as there is room for, with the needles in their order at random depths.

    Only the first piece of hay is cut, at its front, so that no needle and no sentence behind it is.
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
    """Before which pieces the needles go, in rising order; never before the first, which may be half a sentence."""
    depths = sorted(dice.sample(range(DEPTHS), needles))
    return [min(max(round(pieces * depth / (DEPTHS - 1)), 1), pieces) for depth in depths]
