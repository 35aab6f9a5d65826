"""Stop strings: found wherever the text is cut, and no possible part of one is released early."""

from __future__ import annotations

import itertools
import random

import pytest

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
