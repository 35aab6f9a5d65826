"""Refusals by field, limit and value; extreme but legal parameters still run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from keysift.engine import (
    DuplicateRequest,
    Engine,
    EngineConfig,
    InvalidRequest,
    Request,
    ResourceExhausted,
    SamplingParams,
)
from keysift.engine.memory import budget
from tests.engine.driver import Make, drain, greedy, said, tokens
from tests.models import llama


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"prompt": ()}, r"prompt: 1 to 511 tokens \(max_model_len is 512\), got 0"),
        ({"prompt": tokens(512)}, r"prompt: 1 to 511 tokens .* got 512"),
        ({"prompt": (5, 259)}, r"prompt: token ids from 0 to 258, got 259"),
        ({"strategy": "dens"}, r"strategy: unknown 'dens'; did you mean 'dense'\?"),
        ({"strategy_args": ("dense.x=1",)}, r"dense.x: no such option"),
        ({"params": greedy(1, stop_token_ids=(300,))}, r"stop_token_ids: .*259, got 300"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_bad_requests_are_refused_by_field(make: Make, request_fields: dict[str, object], message: str) -> None:
    engine = make()
    with pytest.raises(InvalidRequest, match=message):
        engine.add(Request(**{"request_id": "a", "prompt": (3,)} | request_fields))  # type: ignore[arg-type]
    assert not engine.has_work


def test_a_live_id_cannot_be_used_again(make: Make) -> None:
    engine = make()
    engine.add(Request("a", tokens(3), greedy(1)))
    with pytest.raises(DuplicateRequest, match="'a'"):
        engine.add(Request("a", tokens(3), greedy(1)))
    drain(engine)
    engine.add(Request("a", tokens(3), greedy(1)))


def test_a_request_that_can_never_fit_is_refused_with_both_numbers(make: Make) -> None:
    page = make().status.page_bytes
    engine = make(kv_memory=8 * page)
    with pytest.raises(ResourceExhausted, match=rf"need 13 pages = {13 * page} bytes, the cache has 8 pages") as error:
        engine.add(Request("a", tokens(100), greedy(100)))
    assert error.value.retry_after_s is None


def test_more_memory_than_is_free_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    page = make().status.page_bytes
    monkeypatch.setattr(budget, "free_memory", lambda device: 8.5 * page)
    assert make(kv_memory=8 * page).status.pages_total == 8
    with pytest.raises(InvalidRequest, match=rf"kv_memory: at most the {8.5 * page:.0f} bytes .* cpu, got {9 * page}"):
        make(kv_memory=9 * page)


def test_a_full_queue_names_a_time_to_retry(make: Make) -> None:
    engine = make(max_num_seqs=1, max_queue=1)
    for name in "ab":
        engine.add(Request(name, tokens(3), greedy(2)))
    with pytest.raises(ResourceExhausted, match="max_queue: 2 requests") as error:
        engine.add(Request("c", tokens(3), greedy(2)))
    assert error.value.retry_after_s
    drain(engine)
    engine.add(Request("c", tokens(3), greedy(2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_memory": 10}, "kv_memory: at least one page = .* got 10"),
        ({"prefill_chunk": 100}, r"prefill_chunk: a multiple of queries_per_row \(64\), got 100"),
        ({"queries_per_row": 24}, r"queries_per_row: a multiple of page_size \(16\), got 24"),
        ({"strategy": "nope"}, "strategy: unknown 'nope'"),
        ({"page_sizes": 3}, "page_sizes: Extra inputs are not permitted, got 3"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_a_configuration_that_cannot_run_is_refused_by_field(
    make: Make, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(**fields)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_backend_that_cannot_run_is_refused_at_the_start(write_model: Callable, dtype: str) -> None:
    folder = write_model(llama(head_dim=4))
    with pytest.raises(InvalidRequest, match="backend: 'native' cannot run here"):
        Engine(EngineConfig(model=str(folder), dtype=dtype, backend="native", kv_memory=2**20))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 1e-39}, "temperature: 0 or at least 0.01, got 1e-39"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty: .*greater than or equal to 0.01, got 1e-45"),
        ({"logit_bias": {7: 1e300}}, r"logit_bias: -10000 to 10000 or -inf, got 1e\+300 for token 7"),
        ({"logit_bias": {token: float("-inf") for token in range(259)}}, "logit_bias: at least one token"),
        ({"stop_token_ids": tuple(range(259)), "min_new_tokens": 2}, "stop_token_ids: at least one token"),
        ({"stop_strings": ("x",) * 65}, "stop_strings: .*at most 64 items"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:12],
)
def test_sampling_that_leaves_nothing_to_choose_is_refused(make: Make, params: dict, message: str) -> None:
    engine = make()
    with pytest.raises(InvalidRequest, match=message):
        engine.add(Request("a", tokens(3), SamplingParams(max_new_tokens=4, **params)))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.01, "logit_bias": {5: 1e4}},
        {"temperature": 100.0, "top_p": 1e-30},
        {"temperature": 1.0, "repetition_penalty": 0.01, "logprobs": 3},
        {"temperature": 1.0, "logit_bias": {token: float("-inf") for token in range(258)}},
        {"temperature": 1.0, "min_p": 1.0},
    ],
    ids=lambda params: "-".join(params),
)
def test_extreme_sampling_still_yields_tokens(make: Make, params: dict) -> None:
    engine = make()
    engine.add(Request("a", tokens(20), SamplingParams(max_new_tokens=8, ignore_eos=True, **params)))
    words = said(drain(engine), "a")
    assert len(words) == 8
    assert all(0 <= word < 259 for word in words)
