"""Options stated by a model's configuration are the defaults of the strategy that it was trained with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

from keysift.attention import make as strategy
from keysift.engine import Engine, EngineConfig, InvalidRequest, Request, Unsupported
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens
from tests.models import llama

MINICPM = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 128,
    "topk": 3,
    "use_nope": False,
    "dense_len": 320,
}
OPTIONS = {key: value for key, value in MINICPM.items() if key not in ("use_nope", "dense_len")} | {"dense_below": 319}
"""The same as options of `infllmv2`."""
Write = Callable[[PreTrainedConfig], Path]


@pytest.fixture(scope="module")
def folder(write_model: Write) -> Path:
    return write_model(llama(sparse_config=MINICPM))


def test_the_configuration_fills_options_that_are_not_stated(make: Make, folder: Path) -> None:
    engine = make(model=str(folder), strategy="infllmv2")
    assert engine.default == strategy("infllmv2", **OPTIONS)


@pytest.mark.parametrize("argument", ["topk=7", "infllmv2.topk=7", " infllmv2.topk = 7"])
@pytest.mark.parametrize("name", ["infllmv2", "dense+infllmv2"])
def test_arguments_win(make: Make, folder: Path, argument: str, name: str) -> None:
    engine = make(model=str(folder), strategy=name, strategy_args=(argument,))
    wanted = {f"infllmv2.{key}": value for key, value in (OPTIONS | {"topk": 7}).items()}
    assert engine.default == strategy(name, **wanted)


def test_a_request_has_them_too(make: Make, folder: Path) -> None:
    """Read sparsely from a context of 320 tokens on: 5 blocks of 6 and of 7."""
    prompt, read = tokens(383), {}
    for name, which, arguments in (
        ("trained", "infllmv2", ()),
        ("always", "infllmv2", ("topk=1000",)),
        ("dense", "dense", ()),
    ):
        engine = make(model=str(folder))
        engine.add(Request(name, prompt, greedy(3), which, arguments))
        outputs = drain(engine)
        assert len(said(outputs, name)) == 3
        read[name] = finish_of(outputs, name).sparsity.kv_bytes_read
    assert read["trained"] < read["always"] == read["dense"]


def test_other_strategies_and_other_models_have_none(make: Make, folder: Path, tiny_llama: Path) -> None:
    assert make(model=str(folder), strategy="streaming").default == strategy("streaming")
    assert make(model=str(tiny_llama), strategy="infllmv2").default == strategy("infllmv2")


def test_nothing_stated_is_nothing(make: Make, write_model: Write) -> None:
    engine = make(model=str(write_model(llama(sparse_config=None))), strategy="infllmv2")
    assert engine.default == strategy("infllmv2")


def refused(make: Make, write_model: Write, **changes: Any) -> Engine:
    return make(model=str(write_model(llama(sparse_config=MINICPM | changes))), strategy="dense+infllmv2")


def test_unknown_options_are_named(make: Make, write_model: Write) -> None:
    with pytest.raises(Unsupported, match="sparse_config has pooling, sinks, unknown to infllmv2"):
        refused(make, write_model, sinks=4, pooling="mean")


@pytest.mark.parametrize(("changes", "message"), [({"use_nope": True}, "use_nope"), ({"topk": "many"}, "topk")])
def test_options_that_cannot_be_honoured_are_named(
    make: Make, write_model: Write, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        refused(make, write_model, **changes)


def test_an_unknown_strategy_of_a_request(make: Make, folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="strategy: unknown 'infllmv3'"):
        make(model=str(folder)).add(Request("r", tokens(5), greedy(1), "infllmv3"))


@pytest.mark.parametrize("name", ["nosa-trained", "streaming+nosa-trained"])
def test_a_strategy_that_needs_a_bias_refuses_a_model_without(make: Make, name: str) -> None:
    with pytest.raises(Unsupported, match=r"strategy .*nosa-trained: the model's keys carry no learned bias"):
        make(strategy=name)
    with pytest.raises(Unsupported, match="no learned bias"):
        make().add(Request("r", tokens(5), greedy(1), name))


def test_pages_that_do_not_fit(tiny_llama: Path) -> None:
    config = EngineConfig(model=str(tiny_llama), dtype="float32", kv_memory=2**22, page_size=32, strategy="infllmv2")
    with pytest.raises(Unsupported, match="strategy infllmv2: page_size: a divisor of kernel_stride"):
        Engine(config)
