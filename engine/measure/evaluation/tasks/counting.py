"""RULER's two tasks of counting: the common words of a list, and the frequent words of a coded text."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice, repeat
from random import Random

from .pieces import Pieces, Puzzle, Tokens, TooShort, stack
from .texts import numbered, words

COMMON = 10
LIST_HEAD = "Below is a numbered list of words. In these words, some appear more often than others."
LIST_HEAD += " Memorize the ones that appear most often.\n"
LIST_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
LIST_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
LISTS = (((40, 10, 3), (30, 3)), ((20, 3, 1), (6, 1)), (None, (3, 1)))
"""(words, counts of common and of other ones) of the solved example, and those counts in the list; the first that fits.

RULER's from 4,096 tokens on, RULER's below, and one without an example."""
CODED_HEAD = "Read the following coded text and track the frequency of each coded word."
CODED_HEAD += " Find the three most frequently appeared coded words."
CODED_QUESTION = "\nQuestion: Do not provide any explanation. Please ignore the dots '....'."
CODED_QUESTION += " What are the three most frequently appeared words in the above coded text?"
CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
DOTS = " ..."
ZETA = math.pi**2 / 6
"""Riemann's at 2."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PER_WORD = 50
"""Tokens of the context per distinct coded word."""
CLEAR = (1, 2, 3, 4)
"""Ranks whose counts must differ: the three answers and the next; rank 0 is dots."""


def common_words(dice: Random, pieces: Pieces) -> Puzzle:
    """A numbered list with ten words that occur ten times as often as the others."""
    pool = dice.sample(words(), len(words()))
    common, others, spare = pool[:COMMON], pool[COMMON:-40], pool[-40:]

    def context(room: int) -> Tokens:
        for example, (often, seldom) in LISTS:
            head = pieces((solved(dice, spare, *example) if example else "") + LIST_HEAD)
            try:
                return head + listing(room - len(head), often, seldom, common, others, dice, pieces)
            except TooShort:
                continue
        raise TooShort

    return Puzzle(context, LIST_QUESTION, LIST_PREFIX, tuple(common), f" {numbered(common)}")


def solved(dice: Random, spare: list[str], many: int, often: int, seldom: int) -> str:
    """A short list with its answer."""
    common, others = spare[:COMMON], spare[COMMON:many]
    entries = common * often + others * seldom
    dice.shuffle(entries)
    return f"{LIST_HEAD}{numbered(entries)}{LIST_QUESTION}{LIST_PREFIX} {numbered(common)}\n"


def listing(
    room: int, often: int, seldom: int, common: list[str], others: list[str], dice: Random, pieces: Pieces
) -> Tokens:
    """A list of exactly `room` tokens.

    When no further word fits at full count, words come once, and blank lines before the list fill what is left. When
    the words run out, all counts are raised.
    """
    factor = 1
    while (many := fitting(room, often * factor, seldom * factor, common, others, pieces)) == len(others):
        factor += 1
    if not many:
        raise TooShort
    entries = common * (often * factor) + others[:many] * (seldom * factor)
    dice.shuffle(entries)
    written = [token for entry in enumerated(entries, pieces) for token in entry]
    for entry in islice(enumerated(entries + others[many:], pieces), len(entries), None):
        if len(written) + len(entry) > room:
            break
        written += entry
    return [
        token for line in stack(room - len(written), repeat(pieces("\n", ".") or pieces(DOTS))) for token in line
    ] + written


def fitting(room: int, often: int, seldom: int, common: list[str], others: list[str], pieces: Pieces) -> int:
    """Number of other words that fit in with the common ones."""
    entries = enumerated(common * often + [word for word in others for _ in range(seldom)], pieces)
    spent, many = sum(map(len, islice(entries, len(common) * often))), 0
    while spent <= room and many < len(others):
        spent += sum(map(len, islice(entries, seldom)))
        many += spent <= room
    return many


def enumerated(entries: list[str], pieces: Pieces) -> Iterator[Tokens]:
    """Tokens of `1. first`, ` 2. second` and so on; numbers and words are tokenized separately."""
    written: dict[str, Tokens] = {}
    for place, word in enumerate(entries, 1):
        if word not in written:
            written[word] = pieces(f" {word}")
        yield pieces(f"{' ' * (place > 1)}{place}.") + written[word]


def frequent_words(dice: Random, pieces: Pieces) -> Puzzle:
    """Coded words whose counts fall with the square of their rank; the commonest of all is dots."""
    answers = coded(dice, 3, ())

    def context(room: int) -> Tokens:
        head = pieces(CODED_HEAD)
        left = room - len(head)
        ranked = [DOTS.strip(), *answers, *coded(dice, max(room // PER_WORD, 8), answers)]
        costs = [len(pieces(f" {word}")) for word in ranked]
        # The sum of all counts is at most this number of words, and none costs less than a token.
        many = bisect_right(range(2 * room + 1), left, key=lambda total: priced(total, costs)) - 1
        counts = occurrences(max(many, 0), len(ranked))
        if sorted({counts[rank] for rank in CLEAR}, reverse=True) != [counts[rank] for rank in CLEAR]:
            raise TooShort
        entries = [word for word, often in zip(ranked, counts, strict=True) for _ in range(often)]
        dice.shuffle(entries)
        written = [token for word in entries for token in pieces(f" {word}")]
        dots = stack(left - len(written), repeat(pieces(DOTS)))
        return head + [token for piece in dots for token in piece] + written

    return Puzzle(context, CODED_QUESTION, CODED_PREFIX, tuple(answers), f" {', '.join(answers)}")


def coded(dice: Random, many: int, taken: Sequence[str]) -> list[str]:
    """Words of six random letters, none of them taken."""
    found: dict[str, None] = {}
    while len(found) < many:
        word = "".join(dice.choices(LETTERS, k=6))
        if word not in taken:
            found[word] = None
    return [*found]


def occurrences(total: int, ranks: int) -> list[int]:
    """Count of each rank among about `total` words: Zipf's law with an exponent of 2."""
    return [int(total / (rank * rank) / ZETA) for rank in range(1, ranks + 1)]


def priced(total: int, costs: Sequence[int]) -> int:
    """Tokens of a text of about `total` words."""
    return sum(cost * often for cost, often in zip(costs, occurrences(total, len(costs)), strict=True))
