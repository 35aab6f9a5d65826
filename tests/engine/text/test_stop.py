"""Stop strings: found wherever the text is cut, and no possible part of one is released early."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keysift.engine.text.stop import StopStrings


def feed(stops: StopStrings, pieces: list[str]) -> tuple[str, str | None]:
    text = ""
    for piece in pieces:
        out, matched = stops.push(piece)
        text += out
        if matched is not None:
            return text, matched
    return text + stops.flush(), None


def expected(text: str, strings: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """Reference: the string that completes first, of two at one place the longer one."""
    for end in range(1, len(text) + 1):
        if found := [string for string in strings if text[:end].endswith(string)]:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    "strings", [("stop",), ("aab", "ab"), ("aaab", "b"), ("abab", "ba"), ("\n\nUser:", "\n\n\n"), ()]
)
def test_every_cut_gives_the_same(strings: tuple[str, ...], include: bool) -> None:
    dice = random.Random(0)
    alphabet = sorted(set("".join(strings))) or ["x"]
    for _ in range(200):
        text = "".join(dice.choices(alphabet, k=dice.randrange(12)))
        cuts = sorted(dice.sample(range(len(text) + 1), k=min(len(text), dice.randrange(4))))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        assert feed(StopStrings(strings, include), pieces) == expected(text, strings, include)


def test_holds_back_only_text_that_may_still_match() -> None:
    stops = StopStrings(["END"])
    assert stops.push("the E") == ("the ", None)
    assert stops.push("N") == ("", None)
    assert stops.push("E") == ("EN", None)
    assert stops.push("ND!") == ("", "END")


def test_flush_returns_text_that_was_held_back() -> None:
    stops = StopStrings(["END"])
    assert stops.push("weekEN") == ("week", None)
    assert (stops.flush(), stops.flush()) == ("EN", "")


Piece = tuple[str, bool, bool]
"""Text, whether it is shown, and whether a stop string that completes in it ends the text."""


def found(pieces: list[Piece], strings: list[str], include: bool) -> tuple[str, str | None]:
    """Reference: every end of every string tried at every character."""
    said, shown = "", ""
    places: list[int] = []
    for text, visible, ends in pieces:
        for character in text:
            said += character
            shown += character * visible
            places.append(len(shown))
            if ends and (complete := [string for string in strings if said.endswith(string)]):
                longest = max(complete, key=len)
                before = [0, *places][len(said) - len(longest)]
                return shown[:before] + longest * include, longest
    return shown, None


words = st.text("ab<", min_size=1, max_size=5)


@given(
    pieces=st.lists(st.tuples(st.text("ab<", max_size=6), st.booleans(), st.booleans()), max_size=12),
    strings=st.lists(words, max_size=5),
    include=st.booleans(),
)
def test_hidden_text_and_text_that_is_no_end_count(pieces: list[Piece], strings: list[str], include: bool) -> None:
    stops, text, matched = StopStrings(strings, include), "", None
    for piece in pieces:
        out, matched = stops.push(*piece)
        text += out
        if matched is not None:
            break
    assert (text + stops.flush(), matched) == found(pieces, strings, include)


def test_a_match_that_is_no_end_may_be_the_beginning_of_one() -> None:
    stops = StopStrings(["abab"])
    assert stops.push("xabab", ends=False) == ("xab", None)
    assert stops.push("ab") == ("", "abab")


@given(pieces=st.lists(st.text("ab<", max_size=6), max_size=12), strings=st.lists(words, max_size=5))
def test_no_more_is_held_back_than_may_still_match(pieces: list[str], strings: list[str]) -> None:
    stops, seen, given_out = StopStrings(strings), "", ""
    for piece in pieces:
        out, matched = stops.push(piece)
        if matched is not None:
            return
        seen, given_out = seen + piece, given_out + out
        parts = {string[:size] for string in strings for size in range(len(string))}
        held = max((len(part) for part in parts if seen.endswith(part)), default=0)
        assert given_out == seen[: len(seen) - held]


def test_strings_of_megabytes_cost_what_the_text_matches() -> None:
    strings = [f"{letter}{'ab' * 2**20}" for letter in "abcdefgh"]
    begun = time.perf_counter()
    stops = StopStrings(strings)
    assert feed(stops, ["once upon a time", "babababab"] * 20) == (("once upon a time" + "babababab") * 20, None)
    assert time.perf_counter() - begun < 0.1
