"""Strategies by name, their options from text, and errors that say what would have been right."""

from __future__ import annotations

import pytest

from keysift.attention import Dense, Split, Strategy, StrategyError, known, make, parse
from keysift.attention.strategies.streaming import Streaming


def test_known_lists_the_built_in_ones() -> None:
    assert known()["dense"] is Dense
    assert known()["streaming"] is Streaming
    assert all(issubclass(strategy, Strategy) and strategy.__doc__ for strategy in known().values())


def test_options_come_as_values_or_as_text() -> None:
    assert make("streaming", window=512) == Streaming(window=512)
    assert parse("streaming", ["streaming.window=512", "sink=0"]) == Streaming(window=512, sink=0)


def test_a_pair_has_one_strategy_for_each_phase() -> None:
    assert parse("dense+streaming", ["streaming.sink=64"]) == Split(prompt=Dense(), token=Streaming(sink=64))
    assert make("dense+streaming").name == "dense+streaming"


def test_an_option_of_a_pair_goes_to_the_parts_that_have_it() -> None:
    assert parse("sift+streaming", ["looks=2", "window=512", "sink=8"]) == Split(
        prompt=make("sift", looks=2, sink=8), token=Streaming(window=512, sink=8)
    )
    with pytest.raises(StrategyError, match=r"widow: no such option"):
        parse("sift+streaming", ["widow=2"])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("streeming", [], r"unknown 'streeming'; did you mean 'streaming'\? \(known: .*dense, .*streaming"),
        ("streaming", ["widow=3"], r"streaming.widow: no such option \(known: dense_below, sink, window\)"),
        ("streaming", ["window=many"], r"streaming.window: .*integer.*got 'many'"),
        ("streaming", ["window=0"], r"streaming.window: Input should be greater than or equal to 1, got '0'"),
        ("streaming", ["dense.window=3"], r"dense.window: belongs to 'dense', but the strategy is 'streaming'"),
        ("streaming", ["window=" + "9" * 30], r"streaming.window: .*less than or equal to 2147483647, got '9999"),
        ("streaming", ["window"], r"NAME.FIELD=VALUE expected, got 'window'"),
    ],
)
def test_errors_name_field_limit_and_value(name: str, arguments: list[str], message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        parse(name, arguments)
