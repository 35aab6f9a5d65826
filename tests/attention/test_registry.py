"""Strategies by name, their options as text and as data, plug-ins, and errors that name the limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from keysift.attention import Dense, Split, Strategy, StrategyError, known, make, parse
from keysift.attention.plugins import GROUP
from keysift.attention.registry import Option, has_option, options
from keysift.attention.strategies.streaming import Streaming
from keysift.attention.strategy import option


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin(Streaming):
    """A plug-in of another package."""

    window: int = 7
    speed: Annotated[float, Field(gt=0.0)] = option(2.0, "pages a token")
    mode: Literal["near", "far"] = option("near", "pages to begin with")
    maker: Path | None = option(None, "anything")
    size: int


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a strategy of an installed package."""
    package = tmp_path / "keysift_plugin-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: keysift-plugin\nVersion: 1\n")
    (package / "entry_points.txt").write_text(f"[{GROUP}]\nplugged-in = {__name__}:Plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "plugged-in"


def test_everything_is_explained(plugin: str) -> None:
    assert plugin in known()
    for name, strategy in known().items():
        assert strategy.__doc__, name
        for each in options(strategy):
            assert each.description or (name, each.name) == (plugin, "size"), f"{name}.{each.name}: no description"
            assert each.bounds or each.type == "boolean" or name == plugin, f"{name}.{each.name}: no bounds"


def test_papers_are_named() -> None:
    without = {name for name, strategy in known().items() if not strategy.source}
    assert without == {"dense", "oracle", "sift", "topk"}
    assert all("arXiv" in strategy.source for strategy in known().values() if strategy.source)


def test_options_are_data(plugin: str) -> None:
    inherited = "last tokens that every query reads, itself included"
    assert options(Streaming)[-1] == Option("window", "integer", 1024, {"minimum": 1, "maximum": 2**31 - 1}, inherited)
    assert {each.name: each[1:] for each in options(known()[plugin])[2:]} == {
        "window": ("integer", 7, {}, inherited),
        "speed": ("number", 2.0, {"exclusiveMinimum": 0.0}, "pages a token"),
        "mode": ("string", "near", {"enum": ["near", "far"]}, "pages to begin with"),
        "maker": ("Path | None", None, {}, "anything"),
        "size": ("integer", None, {}, ""),
    }
    assert {each.name: each.bounds for each in options(known()["nosa"])}["delta"] == {"maximum": 10.0}, (
        "-inf is no bound"
    )


def test_a_plugin_is_made_and_checked_like_others(plugin: str) -> None:
    assert parse(plugin, ["size=3", "mode=far"]) == Plugin(size=3, mode="far")
    assert has_option(f"sift+{plugin}", "speed")
    with pytest.raises(StrategyError, match=r"plugged-in.speed: Input should be greater than 0, got '0'"):
        parse(f"sift+{plugin}", ["size=3", "speed=0"])


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("retrieval", "tail=mean", "retrieval.tail: removed: pages that are not read are dropped"),
        ("sift+retrieval", "tail=drop", "retrieval.tail: removed"),
        ("sift+nosa", "nosa.tail=mean", "nosa.tail: removed"),
        ("dense+infllmv2", "dense_len=9", "infllmv2.dense_len: removed: use dense_below"),
        ("infllmv2", "use_nope=true", "infllmv2.use_nope: removed"),
        ("sift", "tail=mean", "sift.tail: no such option"),
    ],
)
def test_removed_options_name_what_to_use_instead(name: str, argument: str, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        parse(name, [argument])


@pytest.mark.parametrize("argument", ["top_k=50", "beam=64", "nprobe=8", "candidates=99", "wait=true"])
@pytest.mark.parametrize("index", ["flat", "codes", "ivf", "graph", "summary", "bound"])
def test_options_of_another_index_are_refused(index: str, argument: str) -> None:
    own = {"codes": ["candidates"], "ivf": ["nprobe"], "graph": ["top_k", "beam", "wait"]}
    option = argument.partition("=")[0]
    if option in own.get(index, []):
        assert parse("retrieval", [f"index={index}", argument]) != make("retrieval", index=index)
        return
    with pytest.raises(StrategyError, match=rf"{option}: acts with index=\w+ only, got .* with index={index}"):
        parse("retrieval", [f"index={index}", argument])


def test_candidates_of_nosa_are_of_codes() -> None:
    assert parse("nosa", ["candidates=99"]) != make("nosa")
    with pytest.raises(StrategyError, match="candidates: acts with index=codes only, got 99 with index=flat"):
        parse("nosa", ["candidates=99", "index=flat"])
