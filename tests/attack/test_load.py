"""A server under load: it drains without losing an answer, and evicts sparse prefixes without changing one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from keysift.engine import Engine, EngineConfig, FinishReason, SamplingParams, TokenOutput
from keysift.server import inference_pb2 as pb
from keysift.server.client import Client
from keysift.server.errors import Unavailable
from tests.server.conftest import Running

NEW = 16
SPARSE = {"sift.dense_below": "0", "sift.sink": "16", "sift.local": "32", "sift.threshold": "0.2"}
DOCUMENTS = [f"document {number} says {number * number} " * 9 for number in range(6)]


@pytest.fixture
def cramped(start: Callable[..., Running], engine_config: EngineConfig) -> Iterator[Running]:
    """A server with pages for two or three requests."""
    page = Engine(engine_config.model_copy(update={"kv_memory": 2**20})).status.page_bytes
    config = engine_config.model_copy(update={"kv_memory": 48 * page, "max_num_seqs": 4})
    running = start(lambda: Engine(config))
    yield running
    running.stop()


def answer(client: Client, text: str, **fields: object) -> list[int]:
    """Tokens of a whole answer under a sparse strategy."""
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    outputs = list(client.generate(text, params, strategy="sift", strategy_args=SPARSE, **fields))  # type: ignore[arg-type]
    assert outputs[-1].reason is FinishReason.LENGTH  # type: ignore[union-attr]
    return [token for output in outputs if isinstance(output, TokenOutput) for token in output.token_ids]


def test_prefixes_are_evicted_under_load_and_no_answer_changes(cramped: Running) -> None:
    evicted: list[int] = []
    allocator = cramped.engine.cache.allocator
    forget = allocator.on_evict
    allocator.on_evict = lambda frame: (evicted.append(frame), forget(frame))[1]  # type: ignore[func-returns-value]
    questions = [f"{document}{question}?" for document in DOCUMENTS for question in ("who", "what is it", "why")] * 2
    with Client(cramped.address) as client, ThreadPoolExecutor(6) as pool:
        wanted = {text: answer(client, text, bypass_prefix_cache=True) for text in dict.fromkeys(questions)}
        said = list(pool.map(lambda text: answer(client, text), questions))
    assert said == [wanted[text] for text in questions]
    assert len(evicted) > len(DOCUMENTS)
    assert cramped.free_pages() == cramped.engine.status.pages_total


def test_a_drain_under_load_loses_no_answer(cramped: Running) -> None:
    with Client(cramped.address) as client, ThreadPoolExecutor(8) as pool:
        wanted = [answer(client, text, bypass_prefix_cache=True) for text in DOCUMENTS]
        with cramped.holding():
            answers = [pool.submit(answer, client, text) for text in DOCUMENTS]
            cramped.wait_for_streams(len(DOCUMENTS))
            drain = pool.submit(cramped.do, cramped.server.drain(60))
            while client.server_info().state != pb.DRAINING:
                time.sleep(0.002)
            with pytest.raises(Unavailable):
                answer(client, "too late")
        assert [each.result(60) for each in answers] == wanted
        drain.result(60)
    assert cramped.engine.status.pages_free == cramped.engine.status.pages_total
