"""Prefix hits change what is computed, never what is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from keysift.engine import Request
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens


def test_a_prefix_hit_changes_nothing_but_what_is_computed(make: Make, expected: Callable) -> None:
    engine = make()
    first, second = tokens(150), tokens(150)[:140] + tokens(30, 9)
    engine.add(Request("first", first, greedy(4)))
    drain(engine)
    engine.add(Request("second", second, greedy(8)))
    outputs = drain(engine)
    assert finish_of(outputs, "second").usage.cached_tokens == 128
    assert said(outputs, "second") == expected(list(second), 8)


@pytest.mark.parametrize(
    "change", [{"cache_salt": "other"}, {"strategy": "streaming"}, {"bypass_prefix_cache": True}], ids=str
)
def test_prefixes_are_not_shared_across_salt_strategy_or_bypass(make: Make, change: dict[str, object]) -> None:
    engine = make()
    engine.add(Request("first", tokens(150), greedy(1)))
    drain(engine)
    engine.add(Request("second", tokens(150), greedy(1), **change))  # type: ignore[arg-type]
    assert finish_of(drain(engine), "second").usage.cached_tokens == 0


@pytest.mark.parametrize(
    ("strategy", "args", "cached"),
    [
        ("dense", (), 128),
        ("dense+streaming", (), 128),
        ("dense+streaming", ("streaming.sink=0", "streaming.window=16"), 64),
    ],
    ids=["dense", "a window over everything", "a window that bites"],
)
def test_generated_pages_are_reused_while_decoding_is_exact(
    make: Make, strategy: str, args: tuple[str, ...], cached: int
) -> None:
    engine = make()
    engine.add(Request("first", tokens(64), greedy(70), strategy=strategy, strategy_args=args))
    answer = said(drain(engine), "first")
    engine.add(Request("next", (*tokens(64), *answer, *tokens(20)), greedy(1)))
    assert finish_of(drain(engine), "next").usage.cached_tokens == cached


@pytest.mark.parametrize(
    ("strategy", "args", "first", "second"),
    [
        ("streaming", ("dense_below=130", "window=16"), 129, 140),
        ("streaming+dense", ("streaming.window=16",), 100, 150),
    ],
)
def test_a_prefix_hit_brings_what_the_own_prefill_would(
    make: Make, strategy: str, args: tuple[str, ...], first: int, second: int
) -> None:
    answers = []
    for warm in (False, True):
        engine = make(strategy=strategy, strategy_args=args)
        prompt = tokens(first)
        if warm:
            engine.add(Request("first", prompt, greedy(50)))
            prompt += tuple(said(drain(engine), "first"))
        else:
            engine.add(Request("first", prompt, greedy(50), bypass_prefix_cache=True))
            prompt += tuple(said(drain(engine), "first"))
        engine.add(Request("second", (*prompt, *tokens(9, 5))[:second], greedy(20)))
        answers.append(said(drain(engine), "second"))
    assert answers[0] == answers[1]


def test_pairs_share_the_prefixes_of_their_prompt_strategy(make: Make) -> None:
    engine = make()
    engine.add(Request("first", tokens(150), greedy(1), strategy="dense+streaming"))
    drain(engine)
    engine.add(Request("second", tokens(150), greedy(1), strategy="dense"))
    assert finish_of(drain(engine), "second").usage.cached_tokens == 128
