"""Requests in preparation: their places, their end, and that neither they nor hostile messages delay others."""

from __future__ import annotations

import contextlib
import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keysift.engine import EngineConfig, Finish, ResourceExhausted, SamplingParams
from keysift.engine.engine import Engine
from keysift.server import inference_pb2 as pb
from keysift.server.client import Client
from keysift.server.guard import Guard
from keysift.server.inference_pb2_grpc import InferenceStub

from .conftest import Running
from .test_serve import PLAIN, serving

ONE = SamplingParams(max_new_tokens=1)
LONG = "x" * 100_000


class Held:
    """Tokenising of the long texts, which waits until `go` is set."""

    def __init__(self, running: Running, patch: pytest.MonkeyPatch) -> None:
        self.go, self.entered, self.texts = threading.Event(), threading.Event(), 0
        self._encode = running.engine.tokenizer.encode
        patch.setattr(running.engine.tokenizer, "encode", self)

    def __call__(self, text: str, *arguments: Any, **options: Any) -> list[int]:
        self.texts += 1
        if text.startswith("xx"):
            self.entered.set()
            assert self.go.wait(60)
        return self._encode(text, *arguments, **options)


@pytest.fixture(scope="module")
def narrow(start: Callable[..., Running], engine_config: EngineConfig) -> Running:
    """Server with room for three requests."""
    config = engine_config.model_copy(update={"max_num_seqs": 1, "max_queue": 2})
    return start(lambda: Engine(config))


@pytest.fixture
def held(narrow: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(narrow, monkeypatch)
    yield held
    held.go.set()
    narrow.free_pages()


@pytest.fixture
def client(narrow: Running) -> Iterator[Client]:
    with Client(narrow.address) as client:
        yield client


def long_request(client: Client, name: str, text: str = LONG) -> Any:
    """A call whose text is being tokenised, or waits for it."""
    message = pb.GenerateRequest(request_id=name, text=text, truncate_prompt_tokens=5)
    message.stopping.max_new_tokens = 1
    return InferenceStub(client._channel).Generate(message, timeout=60)


def wait_for(client: Client, waiting: int) -> None:
    end = time.monotonic() + 20
    while client.server_info(timeout=30).load.waiting != waiting:
        assert time.monotonic() < end


def test_a_short_prompt_passes_long_ones(held: Held, client: Client) -> None:
    calls = [long_request(client, str(number)) for number in range(2)]
    assert held.entered.wait(20)
    wait_for(client, 2)
    outputs = list(client.generate("short", ONE, timeout=30))
    assert isinstance(outputs[-1], Finish)
    held.go.set()
    assert all(list(call)[-1].finish.usage.prompt_tokens == 5 for call in calls)


def test_a_full_queue_refuses_before_any_work(held: Held, client: Client) -> None:
    calls = [long_request(client, str(number)) for number in range(3)]
    wait_for(client, 3)
    texts = held.texts
    with pytest.raises(
        ResourceExhausted, match="max_queue: 3 requests are prepared, waiting or running, at most 3"
    ) as e:
        list(client.generate("short", ONE, timeout=30))
    assert e.value.retry_after_s
    assert held.texts == texts == 1
    held.go.set()
    assert all(list(call) for call in calls)
    wait_for(client, 0)
    assert list(client.generate("short", ONE, timeout=30))


def test_a_full_queue_refuses_before_the_message_is_there(held: Held, client: Client) -> None:
    calls = [long_request(client, str(number)) for number in range(3)]
    wait_for(client, 3)
    end = threading.Event()

    def never() -> Iterator[bytes]:
        end.wait(30)
        yield from ()

    with pytest.raises(grpc.RpcError) as caught:
        list(client._channel.stream_stream("/keysift.v1.Inference/Generate")(never(), timeout=30))
    end.set()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    held.go.set()
    assert all(list(call) for call in calls)


def test_abort_ends_a_request_in_preparation(held: Held, client: Client) -> None:
    """Short texts, as the id of a long message is known once a thread has parsed it."""
    running, waiting = (long_request(client, name, "xx") for name in ("running", "waiting"))
    wait_for(client, 2)
    assert client.abort(["waiting", "running", "none"]) == ["waiting", "running"]
    for call in (running, waiting):
        *_, last = call
        assert last.finish.reason == pb.CANCELLED
    wait_for(client, 0)


def test_a_caller_that_goes_gives_its_place_back(held: Held, client: Client) -> None:
    calls = [long_request(client, str(number)) for number in range(3)]
    wait_for(client, 3)
    for call in calls:
        call.cancel()
    wait_for(client, 0)
    assert list(client.generate("short", ONE, timeout=30))


def test_the_time_to_the_first_token_counts_the_preparation(held: Held, client: Client) -> None:
    call = long_request(client, "timed")
    assert held.entered.wait(20)
    started = time.monotonic()
    while time.monotonic() - started < 0.2:
        pass
    held.go.set()
    *_, last = call
    assert last.finish.timings.ttft_ms >= 200


def test_drain_waits_for_requests_in_preparation(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start()
    held = Held(running, monkeypatch)
    with Client(running.address) as client:
        call = long_request(client, "one")
        assert held.entered.wait(20)
        drain = threading.Thread(target=lambda: running.do(running.server.drain(20)))
        drain.start()
        while client.server_info(timeout=30).state != pb.DRAINING:
            pass
        held.go.set()
        *_, last = call
        assert last.finish.reason == pb.LENGTH
        drain.join(20)


def test_a_refused_message_is_freed_at_once(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a collection of garbage: what refused messages hold is megabytes in a few objects."""

    class Body(bytes):
        def __del__(self) -> None:
            freed.append(len(self))

    async def receive(guard: Guard, call: Any, context: Any) -> bytes | None:
        body = await original(guard, call, context)
        return body and Body(body)

    freed: list[int] = []
    original = Guard._receive
    monkeypatch.setattr(Guard, "_receive", receive)
    bodies = [
        pb.GenerateRequest(text="word " * 40_000).SerializeToString(),
        pb.GenerateRequest(text="x", strategy="s" * 70_000).SerializeToString(),
        b"\xff" * 70_000,
    ]
    gc.disable()
    try:
        with grpc.insecure_channel(start().address) as channel:
            for body in bodies:
                with pytest.raises(grpc.RpcError):
                    list(channel.unary_stream("/keysift.v1.Inference/Generate")(body, timeout=30))
        end = time.monotonic() + 10
        while freed != [len(body) for body in bodies]:
            assert time.monotonic() < end
    finally:
        gc.enable()


SIZE = 2**20
HOSTILE = {
    "turns": pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 40_000)),
    "role": pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="r" * SIZE)])),
    "stop strings": pb.GenerateRequest(text="x", stopping=pb.Stopping(stop_strings=["s" * SIZE])),
    "strategy": pb.GenerateRequest(text="x", strategy="s" * SIZE),
    "tokens": pb.GenerateRequest(token_ids=pb.TokenIds(ids=[200] * SIZE)),
    "large text": pb.GenerateRequest(text="word " * (SIZE // 5), truncate_prompt_tokens=1000),
}


@contextlib.contextmanager
def attack(address: str, threads: int = 4) -> Iterator[list[str]]:
    """Callers that send all hostile messages again and again; yields the codes that they got."""
    codes: list[str] = []
    end = threading.Event()
    bodies = [message.SerializeToString() for message in HOSTILE.values()]

    def send() -> None:
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = channel.unary_stream("/keysift.v1.Inference/Generate")
            while not end.is_set():
                for body in bodies:
                    try:
                        list(call(body, timeout=60))
                        codes.append("OK")
                    except grpc.RpcError as error:
                        codes.append(error.code().name)

    senders = [threading.Thread(target=send) for _ in range(threads)]
    for sender in senders:
        sender.start()
    try:
        yield codes
    finally:
        end.set()
        for sender in senders:
            sender.join()


def latencies(address: str, probes: int) -> list[float]:
    """Seconds of health probes, in a row."""
    found = []
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for _ in range(probes):
            started = time.perf_counter()
            check(health_pb2.HealthCheckRequest(), timeout=60)
            found.append(time.perf_counter() - started)
            time.sleep(0.01)
    return sorted(found)


def test_health_is_answered_under_attack(model_folder: Path) -> None:
    """Half of the probes within 100 ms, on a machine that others may use too; before, each one took seconds."""
    with serving(PLAIN, model_folder) as (process, address):
        drain = threading.Thread(target=lambda: list(process.stderr or ()), daemon=True)
        drain.start()
        with attack(address) as codes:
            under = latencies(address, 60)
        with Client(address) as client:
            assert list(client.generate("still there", ONE, timeout=30))
    assert set(codes) <= {"INVALID_ARGUMENT", "OK", "RESOURCE_EXHAUSTED"}
    assert len(codes) > 20
    assert statistics.median(under) < 0.1
