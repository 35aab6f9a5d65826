"""Transcripts: stop strings over special tokens, over the shortest length, and beside end tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keysift.engine.model.tokenizer import Detokenizer, Tokenizer
from keysift.engine.request import SamplingParams
from keysift.engine.text.transcript import Transcript
from tests.models import make_tokenizer

START, END = 1, 2
TOKENIZER = Tokenizer(make_tokenizer())


def say(*words: str | int) -> list[int]:
    """Tokens of texts, in which special tokens are plain text, and of ids."""
    tokens = []
    for word in words:
        plain = [] if isinstance(word, int) else [TOKENIZER.encode(character) for character in word]
        tokens += [word] if isinstance(word, int) else [token for each in plain for token in each]
    return tokens


def write(tokens: list[int], eos: frozenset[int] = frozenset({END}), **params: Any) -> tuple[str, str | int | None]:
    """Text of a transcript, and what ended it."""
    settings = SamplingParams(max_new_tokens=10_000, **params)
    transcript = Transcript(Detokenizer(TOKENIZER, settings.skip_special_tokens), settings, eos)
    text = ""
    for token in tokens:
        text += transcript.push(token)
        if transcript.matched is not None:
            return text, transcript.matched
    return text + transcript.flush(), transcript.matched


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stop", ["<|start|>", "i<|start|>", "<|start|>u", "i<|start|>us", "|sta"])
def test_a_stop_string_may_be_or_span_a_special_token(stop: str, skip: bool, include: bool) -> None:
    text, matched = write(
        say("hi", START, "user"), stop_strings=(stop,), skip_special_tokens=skip, include_stop_strings=include
    )
    assert matched == stop
    if include:
        assert text.endswith(stop)
        text = text.removesuffix(stop)
    assert text == {"<|start|>": "hi", "<|start|>u": "hi", "|sta": "hi" if skip else "hi<"}.get(stop, "h")


def test_hidden_tokens_that_match_nothing_stay_hidden() -> None:
    assert write(say("a", START, "b", START, "c"), stop_strings=("<|start|>x", "zz")) == ("abc", None)


def test_the_string_counts_where_the_end_token_completes_it_too() -> None:
    assert write(say("done", END), stop_strings=("ne<|end|>",)) == ("do", "ne<|end|>")
    assert write(say("done", END), stop_strings=("<|end|>x",)) == ("done", END)
    assert write(say("done", END), stop_strings=("ne",), include_stop_strings=True) == ("done", "ne")
    assert write(say("done", END), ignore_eos=True, stop_strings=("<|end|>",)) == ("done", "<|end|>")
    assert write(say("a.b"), stop_token_ids=tuple(say("."))) == ("a", say(".")[0])


def test_text_held_back_for_a_string_comes_with_the_end_token() -> None:
    assert write([*say("weekEN"), END], stop_strings=("END",)) == ("weekEN", END)
    assert write([*say("ok 你")[:-1], END], stop_strings=("END",)) == ("ok \ufffd", END)


def test_a_string_that_begins_before_the_shortest_length_and_ends_after() -> None:
    assert write(say("abcSTOPdef"), stop_strings=("STOP",), min_new_tokens=5) == ("abc", "STOP")
    assert write(say("STOPabcSTOP"), stop_strings=("STOP",), min_new_tokens=4) == ("STOPabc", "STOP")
    assert write(say("aSTOSTOP"), stop_strings=("STOP",), min_new_tokens=7) == ("aSTO", "STOP")
    assert write(say("aSTOP"), stop_strings=("STOP",), min_new_tokens=5) == ("aSTOP", None)


units = st.lists(st.sampled_from([START, END, "a", "b", "<|start|>", "你", "<"]), min_size=1, max_size=20)


def characters(units: list[str | int], skip: bool) -> list[tuple[str, str, int]]:
    """Each character, what is shown of it, and the number of tokens with which it is complete."""
    found, count = [], 0
    for unit in units:
        if isinstance(unit, int):
            count += 1
            spelled = TOKENIZER.decode([unit], skip_special_tokens=False)
            found += [(each, "" if skip else each, count) for each in spelled]
            continue
        for each in unit:
            count += len(say(each))
            found.append((each, each, count))
    return found


@given(data=st.data(), least=st.integers(0, 9), include=st.booleans(), skip=st.booleans())
def test_any_text_ends_as_trying_every_character_says(
    data: st.DataObject, least: int, include: bool, skip: bool
) -> None:
    tokens = data.draw(units)
    spoken = characters(tokens, skip)
    whole = "".join(character for character, _, _ in spoken)
    cuts = st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 9)).map(lambda cut: whole[cut[0] :][: cut[1]])
    strings = data.draw(st.lists(cuts | st.sampled_from(["aa", "b<", "<|start|><|"]), max_size=3))
    said, places, expected = "", [""], None
    for character, shown, count in spoken:
        said += character
        places.append(places[-1] + shown)
        complete = [string for string in strings if said.endswith(string)]
        if complete and count > least:
            expected = max(complete, key=len)
            break
    text = places[len(said) - len(expected)] + expected * include if expected else places[-1]
    options: dict[str, Any] = {"stop_strings": tuple(strings), "include_stop_strings": include, "ignore_eos": True}
    assert write(say(*tokens), min_new_tokens=least, skip_special_tokens=skip, **options) == (text, expected)
