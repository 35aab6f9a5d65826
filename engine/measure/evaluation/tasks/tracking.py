"""RULER's variable tracking: the names that hold a value, along a chain of assignments."""

from __future__ import annotations

from itertools import repeat
from random import Random

from .pieces import Pieces, Puzzle, Tokens, TooShort, fill
from .texts import NOISE, capitals, number

HOPS = 4
EXAMPLE_NOISES = (10, 5, 2)
"""Lines of noise in the solved example: RULER's number, then fewer for shorter prompts."""
HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = "Question: Find all variables that are assigned the value {value} in the text above."
PREFIX = " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned"
PREFIX += " the value {value}, they are:"


def tracking(dice: Random, pieces: Pieces) -> Puzzle:
    """One chain of four hops in noise, after a small solved example."""
    example_value, value = distinct_values(dice)
    example, names = distinct_names(dice, 3), distinct_names(dice, 5)

    def context(room: int) -> Tokens:
        needles = [pieces(line) for line in assignments(names, value)]
        for noises in EXAMPLE_NOISES:
            head = pieces(solved(dice, example, example_value, noises) + HEAD)
            try:
                return fill(room, head, repeat(pieces(f"{NOISE}\n")), needles, dice)
            except TooShort:
                continue
        raise TooShort

    asked = {"value": value, "count": len(names)}
    return Puzzle(context, QUESTION.format(**asked), PREFIX.format(**asked), tuple(names), f" {' '.join(names)}")


def assignments(names: list[str], value: str) -> list[str]:
    """One line each: the value, then every name from the one before it."""
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    return [f"VAR {name} = {source}\n" for name, source in zip(names, sources, strict=True)]


def solved(dice: Random, names: list[str], value: str, noises: int) -> str:
    """An example with its answer."""
    lines = [f"{NOISE}\n"] * noises
    places = sorted(dice.choices(range(noises + 1), k=len(names)))
    for at, line in reversed([*zip(places, assignments(names, value), strict=True)]):
        lines.insert(at, line)
    asked = {"value": value, "count": len(names)}
    answer = f"{PREFIX.format(**asked)} {' '.join(names)}\n\n"
    return HEAD + "".join(lines) + QUESTION.format(**asked) + answer


def distinct_names(dice: Random, letters: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names[capitals(dice, letters)] = None
    return [*names]


def distinct_values(dice: Random) -> tuple[str, str]:
    first = second = number(dice, 5)
    while first == second:
        second = number(dice, 5)
    return first, second
