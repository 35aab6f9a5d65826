"""Needles in haystacks: RULER's eight tasks of them, and one that is within a small model's reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from random import Random
from typing import Literal

from .pieces import Pieces, Puzzle, Tokens, fill
from .texts import NOISE, number, pair_of_words, prose, random_uuid

Haystack = Literal["noise", "prose", "needles"]
Kind = Literal["numbers", "words", "uuids"]
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
HEAD = "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it."
HEAD += " I will quiz you about the {kind} afterwards.\n"
QUESTION = "What {are_all} the special magic {kind} for {query} mentioned in the provided text?"
PREFIX = " The special magic {kind} for {query} mentioned in the provided text {are}"
SINGLE = {"some": "A", "are": "is", "are_all": "is"}
SEVERAL = {"some": "Some", "are": "are", "are_all": "are all"}
DRAWN: dict[Kind, Callable[[Random], str]] = {
    "numbers": partial(number, digits=7),
    "words": pair_of_words,
    "uuids": random_uuid,
}
EIGHT = ("harbour", "lantern", "meadow", "orchard", "compass", "thimble", "granite", "saddle")


@dataclass(frozen=True, slots=True)
class Needles:
    """Settings of one of RULER's tasks."""

    haystack: Haystack
    keys: int = 1
    values: int = 1
    """Per key."""
    queries: int = 1
    key: Kind = "words"
    value: Kind = "numbers"

    def build(self, dice: Random, pieces: Pieces) -> Puzzle:
        fresh = Fresh(dice)
        hidden = {fresh(self.key): [fresh(self.value) for _ in range(self.values)] for _ in range(self.keys)}
        asked = dice.sample([*hidden], self.queries)
        answers = tuple(value for key in asked for value in hidden[key])
        needles = [self.needle(key, value) for key, values in hidden.items() for value in values]
        dice.shuffle(needles)
        forms = self.forms(asked, len(answers))
        return Puzzle(
            partial(self.context, pieces, HEAD.format(**forms), needles, fresh),
            ("\n" if self.haystack == "prose" else "") + QUESTION.format(**forms),
            PREFIX.format(**forms),
            answers,
            " " + ", ".join(answers),
        )

    def context(self, pieces: Pieces, head: str, needles: list[str], fresh: Fresh, room: int) -> Tokens:
        written = [self.write(pieces, needle) for needle in needles]
        return fill(room, pieces(head), self.hay(pieces, fresh), written, fresh.dice)

    def hay(self, pieces: Pieces, fresh: Fresh) -> Iterator[Tokens]:
        if self.haystack == "noise":
            return repeat(self.write(pieces, NOISE))
        if self.haystack == "prose":
            return (self.write(pieces, sentence) for sentence in prose(fresh.dice))
        return (self.write(pieces, self.needle(fresh(self.key), fresh(self.value))) for _ in repeat(None))

    def write(self, pieces: Pieces, sentence: str) -> Tokens:
        """A sentence of the haystack: within a paragraph of prose, otherwise on its own line."""
        return pieces(f" {sentence}" if self.haystack == "prose" else f"{sentence}\n")

    def needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)

    def forms(self, asked: list[str], answers: int) -> dict[str, str]:
        """Words that depend on the number of answers."""
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        single = answers == 1
        return (SINGLE if single else SEVERAL) | {"kind": self.value[:-1] if single else self.value, "query": query}


class Fresh:
    """Distinct random keys and values for one sample."""

    def __init__(self, dice: Random) -> None:
        self.dice = dice
        self._drawn: set[str] = set()

    def __call__(self, kind: Kind) -> str:
        while (drawn := DRAWN[kind](self.dice)) in self._drawn:
            pass
        self._drawn.add(drawn)
        return drawn


def eight(dice: Random, pieces: Pieces) -> Puzzle:
    """Eight names in prose with six digits each; the answer begins with the words of the needle."""
    values = distinct(dice, 8, 6)
    lines = [NEEDLE.format(kind="numbers", key=key, value=value) for key, value in zip(EIGHT, values, strict=True)]
    dice.shuffle(lines)
    asked = dice.randrange(len(EIGHT))
    head = HEAD.format(**SEVERAL, kind="numbers")

    def context(room: int) -> Tokens:
        hay = (pieces(f" {sentence}") for sentence in prose(dice))
        return fill(room, pieces(head), hay, [pieces(f"\n{line}\n") for line in lines], dice)

    return Puzzle(
        context,
        f"\n\nWhat is the special magic number for {EIGHT[asked]}?",
        f"\nOne of the special magic numbers for {EIGHT[asked]} is:",
        (values[asked],),
        f" {values[asked]}",
    )


def passkey(dice: Random, pieces: Pieces) -> Puzzle:
    """One number, stated twice, in noise."""
    key = number(dice, 5)
    head = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
    head += " I will quiz you about the important information there.\n"
    needle = f"The pass key is {key}. Remember it. {key} is the pass key.\n"

    def context(room: int) -> Tokens:
        return fill(room, pieces(head), repeat(pieces(f"{NOISE}\n")), [pieces(needle)], dice)

    return Puzzle(context, "What is the pass key?", " The pass key is", (key,), f" {key}")


def copy(dice: Random, pieces: Pieces) -> Puzzle:
    """A marked passage of about 32 tokens to repeat; each group of four words, or a few more, is an answer."""
    passage = some_words(dice, pieces, 32)
    head = "One passage of the following text stands between <passage> and </passage>. Make sure to memorize it."
    head += " I will ask you to repeat it afterwards.\n"

    def context(room: int) -> Tokens:
        hay = (pieces(f" {sentence}") for sentence in prose(dice))
        return fill(room, pieces(head), hay, [pieces(f"\n<passage>{passage}</passage>\n")], dice)

    parts = passage.split()
    starts = range(0, max(len(parts) - 3, 1), 4)
    answers = tuple(" ".join(parts[at : at + 4 if at < starts[-1] else None]) for at in starts)
    question = "\n\nRepeat the passage between <passage> and </passage> word for word."
    return Puzzle(context, question, "\n<passage>", answers, passage)


def some_words(dice: Random, pieces: Pieces, tokens: int) -> str:
    """Words of prose, as many as fit in so many tokens."""
    found = " ".join(islice(prose(dice), 40)).split()
    return " ".join(found[: next(many for many in range(4, 99) if len(pieces(" ".join(found[: many + 1]))) > tokens)])


def distinct(dice: Random, many: int, digits: int) -> list[str]:
    values: dict[str, None] = {}
    while len(values) < many:
        values[number(dice, digits)] = None
    return [*values]
