"""Generate and Abort over a real connection: order of events, ends of a stream, and freed pages."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from keysift.engine import (
    Engine,
    EngineConfig,
    Finish,
    FinishReason,
    InvalidRequest,
    Output,
    PrefillProgress,
    PromptInfo,
    Request,
    SamplingParams,
    TokenOutput,
)
from keysift.server import inference_pb2 as pb
from keysift.server.client import Client
from keysift.server.convert import from_params, from_reply
from keysift.server.errors import DeadlineExceeded
from keysift.server.inference_pb2_grpc import InferenceStub

from .conftest import Running

LONG = SamplingParams(max_new_tokens=1000, ignore_eos=True)


def text(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs if isinstance(output, TokenOutput))


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs if isinstance(output, TokenOutput) for token in output.token_ids]


def finish(outputs: list[Output]) -> Finish:
    assert isinstance(outputs[-1], Finish)
    return outputs[-1]


def in_process(config: EngineConfig, prompt: str, params: SamplingParams) -> list[int]:
    engine = Engine(config)
    engine.add(Request("here", tuple(engine.tokenizer.encode(prompt)), params))
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    return tokens(outputs)


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9, seed=3)], ids=["greedy", "sampled"]
)
def test_a_server_generates_the_tokens_of_an_engine(
    client: Client, engine_config: EngineConfig, params: SamplingParams
) -> None:
    short = params.model_copy(update={"max_new_tokens": 12})
    assert tokens(list(client.generate("The same", short))) == in_process(engine_config, "The same", short)


def test_events_come_in_order(client: Client) -> None:
    outputs = list(client.generate("x" * 200, SamplingParams(max_new_tokens=5, ignore_eos=True), request_id="mine"))
    kinds = [kind for kind, _ in itertools.groupby(type(output) for output in outputs)]
    assert kinds == [PromptInfo, PrefillProgress, TokenOutput, Finish]
    assert {output.request_id for output in outputs} == {"mine"}
    assert finish(outputs).usage.prompt_tokens == 200
    assert finish(outputs).usage.completion_tokens == len(tokens(outputs)) == 5
    assert finish(outputs).reason is FinishReason.LENGTH


def test_every_prompt_form_is_the_same_prompt(client: Client, running: Running) -> None:
    chat = [{"role": "user", "content": "hi"}]
    formatted = "user: hi\nassistant:"
    ids = running.engine.tokenizer.encode(formatted)
    forms: list[Any] = [chat, formatted, ids]
    assert len({tuple(tokens(list(client.generate(form, SamplingParams(max_new_tokens=6))))) for form in forms}) == 1


def test_truncation_keeps_the_end(client: Client) -> None:
    params = SamplingParams(max_new_tokens=6)
    cut = list(client.generate("what is not read" + "the end", params, truncate_prompt_tokens=7))
    assert finish(cut).usage.prompt_tokens == 7
    assert tokens(cut) == tokens(list(client.generate("the end", params)))


def test_a_stop_string_ends_the_text(client: Client) -> None:
    whole = text(list(client.generate("stop", SamplingParams(max_new_tokens=40, ignore_eos=True))))
    stop = whole[10:13]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, stop_strings=(stop,))
    outputs = list(client.generate("stop", params))
    assert text(outputs) == whole[: whole.index(stop)]
    assert (finish(outputs).reason, finish(outputs).matched_stop) == (FinishReason.STOP, stop)


def test_logprobs_cross_the_wire(client: Client) -> None:
    outputs = list(client.generate("x", SamplingParams(max_new_tokens=4, logprobs=2, ignore_eos=True)))
    rows = [row for output in outputs if isinstance(output, TokenOutput) for row in output.logprobs]
    assert [row[0].token_id for row in rows] == tokens(outputs)
    assert all(row[0].logprob <= 0 and len(row) >= 3 for row in rows)


def test_a_strategy_for_one_request(client: Client) -> None:
    arguments = {"streaming.sink": "16", "streaming.window": "16"}
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    outputs = list(client.generate("x" * 600, params, strategy="streaming", strategy_args=arguments))
    sparsity = finish(outputs).sparsity
    assert "streaming" in sparsity.strategy
    assert sparsity.decode_density < 0.2


def test_sixteen_streams_at_once(client: Client, running: Running) -> None:
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    prompts = [f"prompt number {number} " * (number + 1) for number in range(16)]
    alone = [tokens(list(client.generate(prompt, params))) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: tokens(list(client.generate(prompt, params))), prompts))
    assert together == alone
    assert running.free_pages() == running.engine.status.pages_total


def test_closing_the_stream_frees_its_pages(slow: Running) -> None:
    with Client(slow.address) as client:
        outputs = client.generate("x" * 300, LONG)
        while not isinstance(next(outputs), TokenOutput):
            pass
        assert client.server_info().load.pages_free < slow.engine.status.pages_total
        outputs.close()  # type: ignore[attr-defined]
    assert slow.free_pages() == slow.engine.status.pages_total


def test_a_passed_deadline_frees_its_pages(slow: Running) -> None:
    with Client(slow.address) as client, pytest.raises(DeadlineExceeded):
        list(client.generate("x" * 300, LONG, timeout=0.5))
    assert slow.free_pages() == slow.engine.status.pages_total


def test_a_waiting_request_can_be_cancelled(slow: Running) -> None:
    with Client(slow.address) as client:
        first = client.generate("x", LONG)
        next(first)
        with pytest.raises(DeadlineExceeded):
            list(client.generate("waits", LONG, timeout=0.2))
        first.close()  # type: ignore[attr-defined]
    assert slow.free_pages() == slow.engine.status.pages_total


def test_abort_ends_the_stream_without_an_error(slow: Running) -> None:
    with Client(slow.address) as client:
        started, outputs = threading.Event(), list[Output]()

        def read() -> None:
            for output in client.generate("x", LONG, request_id="doomed"):
                outputs.append(output)
                started.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(10)
        assert client.abort(["doomed", "unknown"]) == ["doomed"]
        reader.join(10)
        assert finish(outputs).reason is FinishReason.CANCELLED
        assert finish(outputs).usage.completion_tokens == len(tokens(outputs)) < 1000
        assert client.abort(["doomed"]) == []
    assert slow.free_pages() == slow.engine.status.pages_total


MUCH = SamplingParams(max_new_tokens=800, ignore_eos=True, logprobs=20)
"""A completion that is larger than the window of a connection of `stuck`."""


@contextlib.contextmanager
def stuck(running: Running, request_id: str) -> Iterator[Iterator[pb.GenerateReply]]:
    """Stream of a request that the engine has finished, and of which the client has read one reply."""
    with grpc.insecure_channel(
        running.address, [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    ) as channel:
        message = from_params(MUCH)
        message.MergeFrom(pb.GenerateRequest(text="slow reader", request_id=request_id))
        call = InferenceStub(channel).Generate(message)
        next(call)
        running.do(running.server.worker.idle())
        yield call
        call.cancel()


def test_a_slow_reader_gets_every_token(client: Client, running: Running) -> None:
    expected = tokens(list(client.generate("slow reader", MUCH)))
    with stuck(running, "late") as call:
        outputs = [from_reply(reply, "late") for reply in call]
    assert tokens(outputs) == expected
    assert len(outputs) < len(expected) / 2, "the reader was slow, so queued tokens were joined"


def test_a_blocked_reader_that_disconnects_is_no_bug_and_ends_no_other_request(
    client: Client, running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The second request may have the first one's id, as the engine has finished the first."""
    caplog.set_level(logging.DEBUG, "keysift")
    with stuck(running, "twin"):
        second = client.generate("x", MUCH, request_id="twin")
        next(second)
    assert finish(list(second)).reason is FinishReason.LENGTH
    assert "the caller has disconnected" in caplog.text
    assert "Traceback" not in caplog.text


def test_truncation_makes_a_large_text_small(client: Client) -> None:
    params = SamplingParams(max_new_tokens=3)
    cut, large = "the end", "what is not read " * 450_000
    forms: list[Any] = [large + cut, [{"role": "user", "content": large}, {"role": "user", "content": cut}]]
    for form in forms:
        started = time.monotonic()
        outputs = list(client.generate(form, params, truncate_prompt_tokens=7))
        assert finish(outputs).usage.prompt_tokens == 7
        assert time.monotonic() - started < 5
    with pytest.raises(InvalidRequest, match="characters"):
        list(client.generate(large, params, truncate_prompt_tokens=2**31))
