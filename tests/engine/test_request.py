"""Parameters of requests: what is out of bounds is refused with field, limit and value, in short."""

from __future__ import annotations

import math
from typing import Any

import pytest

from keysift.engine.errors import InvalidRequest
from keysift.engine.request import SamplingParams

NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
COUNTS = ("top_k", "seed", "max_new_tokens", "min_new_tokens", "logprobs")


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -9.0, 1e9, True, "1", None], ids=str)
def test_numbers(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{field}: .*, got {value!r}$"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [-1, 2**63, 10**200, 1.5, math.nan, True, "1"], ids=str)
def test_counts(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{field}: .*, got "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
@pytest.mark.parametrize("value", [(-1,), (2**63,), (1.5,), (True,), ("1",), "12", 3, None], ids=str)
def test_token_ids(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{field}.*: .*, got "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("value", [{-1: 0.0}, {2**63: 0.0}, {"x": 0.0}, {1: "x"}, {1: None}, [1], None], ids=str)
def test_logit_bias(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^logit_bias.*: .*, got "):
        SamplingParams(logit_bias=value)


@pytest.mark.parametrize("value", [("",), ("\ud800",), (b"\xff",), (1,), "abc", ("x",) * 65, None], ids=ascii)
def test_stop_strings(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^stop_strings.*: .*, got "):
        SamplingParams(stop_strings=value)


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 10**5000},
        {"seed": -(10**5000)},
        {"stop_strings": ("a" * 10**6,) * 65},
        {"allowed_token_ids": (-1,) * 100_000},
        {"ignore_eos": "x" * 10**6},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_messages_are_short_however_long_the_value(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        SamplingParams(**fields)
    assert len(str(raised.value)) < 2000


def test_a_request_ends_later_than_its_shortest_length() -> None:
    with pytest.raises(InvalidRequest, match=r"min_new_tokens: at most max_new_tokens \(3\), got 4"):
        SamplingParams(max_new_tokens=3, min_new_tokens=4)
    with pytest.raises(InvalidRequest, match=r"temperature: 0 or at least 0.01, got 0.001"):
        SamplingParams(temperature=0.001)
