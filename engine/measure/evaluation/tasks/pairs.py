"""Key-value retrieval as in InfiniteBench: one value of a JSON object of random names."""

from __future__ import annotations

from itertools import chain
from random import Random

from .pieces import Pieces, Puzzle, Tokens, TooShort
from .texts import random_uuid

HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
QUESTION = '\n\nKey: "{key}"'
PREFIX = "\nThe value associated with the specified key is:"


def pairs(dice: Random, pieces: Pieces) -> Puzzle:
    """One pair of random names among as many as fit."""
    key, value = random_uuid(dice), random_uuid(dice)

    def context(room: int) -> Tokens:
        head, asked = pieces(HEAD + "{"), written(key, value, pieces)
        before, after = pieces(f'"{random_uuid(dice)}": "'), pieces('"}', "0")
        left = room - sum(map(len, (head, asked, before, after)))
        if left < 0:
            raise TooShort
        made = others(left, dice, pieces)
        rest = left - sum(map(len, made))
        made.insert(dice.randrange(len(made) + 1), asked)
        return [*head, *chain.from_iterable(made), *before, *digits(rest, dice, pieces), *after]

    return Puzzle(context, QUESTION.format(key=key), PREFIX, (value,), f" {value}")


def others(room: int, dice: Random, pieces: Pieces) -> list[Tokens]:
    """As many pairs as fit."""
    made: list[Tokens] = []
    while room >= len(pair := written(random_uuid(dice), random_uuid(dice), pieces)):
        made.append(pair)
        room -= len(pair)
    return made


def written(key: str, value: str, pieces: Pieces) -> Tokens:
    return pieces(f'"{key}": "{value}", ')


def digits(count: int, dice: Random, pieces: Pieces) -> Tokens:
    """`count` tokens for the last value, which fills the rest, so that the object stays valid JSON."""
    found: Tokens = []
    while len(found) < count:
        found += pieces(f"-{random_uuid(dice)}", "0")
    return found[:count]
