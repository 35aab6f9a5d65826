"""Every limit of the table, over the wire: what it allows is served, and one more refused with field, limit, value."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from keysift.engine import Engine, EngineConfig, ResourceExhausted, SamplingParams
from keysift.server import bodies
from keysift.server import inference_pb2 as pb
from keysift.server.client import Client
from keysift.server.inference_pb2_grpc import InferenceStub
from keysift.server.limits import Limits
from keysift.server.options import server_options
from keysift.server.parsing import parse

from . import http2
from .conftest import Running

TIGHT: dict[str, Any] = {
    "max_control_size": 2000,
    "max_public_size": 1024,
    "max_string_size": 1024,
    "max_token_ids": 6,
    "max_turns": 3,
    "max_role_length": 8,
    "max_id_length": 32,
    "max_model_length": 5,
    "max_strategy_length": 9,
    "max_strategy_args": 2,
    "max_strategy_arg_length": 20,
    "max_salt_length": 4,
    "max_stop_strings": 3,
    "max_stop_string_length": 6,
    "max_stop_characters": 10,
    "max_stop_token_ids": 4,
    "max_logit_bias": 3,
    "max_allowed_token_ids": 5,
    "max_abort_ids": 3,
}
Message = pb.GenerateRequest | pb.AbortRequest


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**({"text": "x", "stopping": pb.Stopping(max_new_tokens=1)} | fields))


def turns(count: int, role: str = "user") -> pb.GenerateRequest:
    return request(text=None, chat=pb.Chat(messages=[pb.ChatMessage(role=role, content="x")] * count))


def stops(*strings: str) -> pb.GenerateRequest:
    return request(stopping=pb.Stopping(max_new_tokens=1, stop_strings=strings))


CONTENT: dict[str, tuple[str, Message, Message, int]] = {
    "max_id_length": ("request_id", request(request_id="i" * 32), request(request_id="i" * 33), 33),
    "max_model_length": ("model", request(model="tiny"), request(model="tinier"), 6),
    "max_strategy_length": ("strategy", request(strategy="streaming"), request(strategy="x" * 900), 900),
    "max_strategy_args": (
        "strategy_args",
        request(strategy="streaming", strategy_args={"streaming.sink": "16", "streaming.window": "64"}),
        request(strategy_args=dict.fromkeys("abc", "1")),
        3,
    ),
    "max_strategy_arg_length": (
        "strategy_args",
        request(strategy="streaming", strategy_args={"streaming.window": "64"}),
        request(strategy_args={"streaming.window": "9" * 21}),
        21,
    ),
    "max_salt_length": ("cache_salt", request(kv=pb.Kv(cache_salt="salt")), request(kv=pb.Kv(cache_salt="salts")), 5),
    "max_token_ids": (
        "token_ids",
        request(text=None, token_ids=pb.TokenIds(ids=[200] * 6)),
        request(text=None, token_ids=pb.TokenIds(ids=[200] * 7)),
        7,
    ),
    "max_turns": ("chat.messages", turns(3), turns(4), 4),
    "max_role_length": ("chat.messages.role", turns(1, "r" * 8), turns(1, "r" * 900), 900),
    "max_stop_strings": ("stop_strings", stops("a", "b", "c"), stops("a", "b", "c", "d"), 4),
    "max_stop_string_length": ("stop_strings", stops("s" * 6), stops("s" * 7), 7),
    "max_stop_characters": ("stop_strings", stops("s" * 5, "t" * 5), stops("s" * 5, "t" * 6), 11),
    "max_stop_token_ids": (
        "stop_token_ids",
        request(stopping=pb.Stopping(max_new_tokens=1, stop_token_ids=range(4))),
        request(stopping=pb.Stopping(stop_token_ids=range(5))),
        5,
    ),
    "max_logit_bias": (
        "logit_bias",
        request(decoding=pb.Decoding(logit_bias=dict.fromkeys(range(3), 1.0))),
        request(decoding=pb.Decoding(logit_bias=dict.fromkeys(range(4), 1.0))),
        4,
    ),
    "max_allowed_token_ids": (
        "allowed_token_ids",
        request(decoding=pb.Decoding(allowed_token_ids=range(5))),
        request(decoding=pb.Decoding(allowed_token_ids=range(6))),
        6,
    ),
    "max_abort_ids": ("request_ids", pb.AbortRequest(request_ids="abc"), pb.AbortRequest(request_ids="abcd"), 4),
}
PROVED: dict[str, str] = {}
"""Limit -> the test of it, for those that are not of a message's content."""


def proves(*limits: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the test is that of these limits."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        PROVED.update(dict.fromkeys(limits, test.__name__))
        return test

    return mark


def test_every_limit_has_a_test() -> None:
    assert set(CONTENT) | set(PROVED) == set(Limits.model_fields)
    assert all(name in globals() for name in PROVED.values())


@pytest.fixture(scope="module")
def tight(start: Callable[..., Running]) -> Running:
    return start(**TIGHT)


@pytest.fixture
def channel(tight: Running) -> Iterator[grpc.Channel]:
    with connected(tight) as channel:
        yield channel


@contextlib.contextmanager
def connected(running: Running) -> Iterator[grpc.Channel]:
    """A channel with a connection of its own."""
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(running.address, options) as channel:
        yield channel


def send(channel: grpc.Channel, message: Message) -> list[Any]:
    stub = InferenceStub(channel)
    if isinstance(message, pb.AbortRequest):
        return [stub.Abort(message, timeout=30)]
    return list(stub.Generate(message, timeout=30))


def refusal(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def field_of(error: grpc.RpcError) -> str:
    bad = BadRequest()
    assert rpc_status.from_call(error).details[0].Unpack(bad)
    return str(bad.field_violations[0].field)


@pytest.mark.parametrize("limit", CONTENT)
def test_content(channel: grpc.Channel, limit: str) -> None:
    field, allowed, refused, value = CONTENT[limit]
    assert send(channel, allowed)
    error = refusal(lambda: send(channel, refused))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(error) == field
    assert f"{field}: at most {TIGHT[limit]} " in error.details()
    assert f"({limit}), got {value}" in error.details()


def test_fields_on_the_wire(channel: grpc.Channel) -> None:
    """Half a million empty messages, of which a parser would make 14 MB, and a chat of as many turns."""
    call = channel.unary_stream("/keysift.v1.Inference/Generate")
    sampling, turn = b"\x3a\x00", b"\x0a\x00"
    nested = b"\x2a" + varint(len(turn) * 500_000) + turn * 500_000
    for body in (sampling * 500_000, nested):
        error = refusal(lambda body=body: list(call(body, timeout=30)))  # type: ignore[misc]
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == f"message: at most {Limits(**TIGHT).max_fields} fields, got more"


def test_all_limits_of_content_can_be_met_at_once() -> None:
    limits = Limits(max_turns=3000, max_logit_bias=5000)
    message = turns(limits.max_turns)
    message.decoding.logit_bias.update(dict.fromkeys(range(limits.max_logit_bias), 1.0))
    message.strategy_args.update({f"a{number}": "1" for number in range(limits.max_strategy_args)})
    message.stopping.stop_strings.extend(["s"] * limits.max_stop_strings)
    message.stopping.stop_token_ids.extend(range(limits.max_stop_token_ids))
    message.decoding.allowed_token_ids.extend(range(limits.max_allowed_token_ids))
    assert parse(pb.GenerateRequest, message.SerializeToString(), limits) == message


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


@proves("max_string_size")
def test_strings_are_measured_before_they_are_parsed(channel: grpc.Channel) -> None:
    """A name of 4 MB would be compared with all strategies, a role go through the template."""
    for message, field in ((request(strategy="x" * 4_000_000), "strategy"), (turns(1, "r" * 2_000_000), "role")):
        error = refusal(lambda message=message: send(channel, message))  # type: ignore[misc]
        assert field_of(error) == field
        assert error.details().startswith(f"{field}: at most 1024 bytes (max_string_size), got ")
    assert send(channel, request(text="x" * 1500))


def test_tokens_are_counted_before_they_are_parsed() -> None:
    """Those of all lists together, in few fields."""
    ids = b"\x85\x01" * 4
    body = b"\x22" + varint(len(ids) + 2) + b"\x0a" + varint(len(ids)) + ids
    assert list(parse(pb.GenerateRequest, body, Limits(max_token_ids=4)).token_ids.ids) == [133] * 4
    with pytest.raises(ValueError, match=r"token_ids: at most 7 tokens \(max_token_ids\), got 8"):
        parse(pb.GenerateRequest, body * 2, Limits(max_token_ids=7))


def test_unpacked_lists_are_parsed_as_well() -> None:
    assert list(parse(pb.GenerateRequest, b"\x22\x04\x08\x05\x08\x06", Limits()).token_ids.ids) == [5, 6]


@pytest.mark.parametrize(
    "body",
    [b"\xff" * 20, b"\x3a\x05", b"\x1a\x01\xff", b"\x3b\x3c", b"\x1a\xff\xff\xff\xff\x7f", b"\x31\x00", b"\x36"],
    ids=["overlong", "cut", "not UTF-8", "group", "beyond the end", "short number", "wire type"],
)
@pytest.mark.parametrize(
    "method",
    [
        "keysift.v1.Inference/Generate",
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/Watch",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_bytes_that_are_no_message(tight: Running, caplog: pytest.LogCaptureFixture, method: str, body: bytes) -> None:
    if body == b"\x1a\x01\xff" and "Health" in method:
        body = b"\x0a\x01\xff"
    with connected(tight) as channel:
        call = channel.stream_stream(f"/{method}")
        error = refusal(lambda: list(call(iter([body]), timeout=30)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"got {len(body)} bytes that are none" in error.details()
    assert "Traceback" not in caplog.text


GENERATE = "/keysift.v1.Inference/Generate"


@contextlib.contextmanager
def silent(channel: grpc.Channel, count: int = 1, method: str = GENERATE) -> Iterator[None]:
    """Open calls that never send their message."""
    end = threading.Event()

    def nothing() -> Iterator[bytes]:
        end.wait(60)
        yield from ()

    calls = [channel.stream_stream(method)(nothing()) for _ in range(count)]
    try:
        yield
    finally:
        end.set()
        for call in calls:
            call.cancel()


def retried(call: Callable[[], grpc.RpcError], code: grpc.StatusCode, seconds: float = 10) -> grpc.RpcError:
    """The first error with this code: calls that were opened before may not have arrived yet."""
    end = time.monotonic() + seconds
    while (error := call()).code() is not code:
        assert time.monotonic() < end, error
    return error


@proves("max_message_size", "max_control_size", "max_public_size")
def test_message_sizes(start: Callable[..., Running], tight: Running) -> None:
    exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
    with connected(start(max_message_size="1MiB")) as channel:
        error = refusal(lambda: send(channel, request(text="x" * 2**20)))
        assert error.code() is exhausted
        assert re.search(r"larger than max \(10485\d\d vs. 1048576\)", error.details())
    with connected(tight) as channel:
        error = refusal(lambda: send(channel, pb.AbortRequest(request_ids=["x" * 2000])))
        assert error.code() is exhausted
        assert error.details() == "message: at most 2000 bytes (max_control_size), got 2003"
        probe = health_pb2.HealthCheckRequest(service="x" * 1100)
        error = refusal(lambda: health_pb2_grpc.HealthStub(channel).Check(probe, timeout=30))
        assert error.code() is exhausted
        assert error.details() == "message: at most 1024 bytes (max_public_size), got 1103"


def test_a_small_message_that_unpacks_to_a_large_one_is_refused(start: Callable[..., Running]) -> None:
    """gRPC counts the bytes after decompression, and names neither limit nor value then."""
    running = start(max_message_size="1MiB")
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(running.address, options, compression=grpc.Compression.Gzip) as channel:
        error = refusal(lambda: send(channel, request(text="x" * 2**25)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "Decompressed message larger than max"


@proves("max_metadata_size")
def test_metadata(start: Callable[..., Running]) -> None:
    running = start(max_metadata_size="4KiB")
    with connected(running) as channel:
        stub = InferenceStub(channel)
        assert stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=(("x", "y" * 2000),)).version
        error = refusal(lambda: stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=(("x", "y" * 5000),)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "5000 vs. 4096" in error.details()


@proves("max_connections")
def test_connections(start: Callable[..., Running]) -> None:
    running = start(max_connections=4)
    host, _, port = running.address.rpartition(":")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(12)]
        end = time.monotonic() + 10
        while sum(map(http2.is_open, opened)) > 4:
            assert time.monotonic() < end
    with connected(running) as channel:
        options = {"timeout": 30, "wait_for_ready": True}
        assert InferenceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), **options).version


@proves("max_streams_per_connection")
def test_streams_of_a_connection(start: Callable[..., Running]) -> None:
    running = start(max_streams_per_connection=2)
    with connected(running) as channel, silent(channel, 2), connected(running) as other:
        retried(
            lambda: refusal_or_ok(lambda: InferenceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=0.2)),
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )
        assert InferenceStub(other).GetServerInfo(pb.GetServerInfoRequest(), timeout=30).version


class Ok(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK


def refusal_or_ok(call: Callable[[], object]) -> grpc.RpcError:
    try:
        call()
    except grpc.RpcError as error:
        return error
    return Ok()


@proves("max_streams")
def test_streams_in_all(start: Callable[..., Running]) -> None:
    running = start(max_streams=2)
    with connected(running) as channel, silent(channel, 2), connected(running) as other:
        info = InferenceStub(other).GetServerInfo
        error = retried(
            lambda: refusal_or_ok(lambda: info(pb.GetServerInfoRequest(), timeout=30)),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        )
        assert error.details() == "max_streams: at most 2 calls are open at once, got another one"
        assert health_pb2_grpc.HealthStub(other).Check(health_pb2.HealthCheckRequest(), timeout=30).status == 1
    with connected(running) as channel:
        info = InferenceStub(channel).GetServerInfo
        retried(lambda: refusal_or_ok(lambda: info(pb.GetServerInfoRequest(), timeout=30)), grpc.StatusCode.OK)


@proves("max_health_streams")
def test_streams_of_the_health_service(start: Callable[..., Running]) -> None:
    running = start(max_health_streams=2)
    with connected(running) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        assert [next(watch).status for watch in watches] == [1, 1]
        error = refusal(lambda: next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=30)))
        problem = r"max_health_streams of ipv4:127.0.0.1:\d+: at most 2 calls are open at once, got another one"
        assert re.fullmatch(problem, error.details())
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=30).status == 1
        with connected(running) as other:
            watch = health_pb2_grpc.HealthStub(other).Watch(health_pb2.HealthCheckRequest(), timeout=30)
            assert next(watch).status == 1
        for watch in watches:
            watch.cancel()


@proves("reply_timeout")
def test_who_does_not_read(start: Callable[..., Running], engine_config: EngineConfig) -> None:
    """What nobody reads keeps its place in the queue, and neither that nor its call for longer than the limit."""
    config = engine_config.model_copy(update={"max_num_seqs": 1, "max_queue": 1})
    running = start(lambda: Engine(config), max_streams=3, reply_timeout=2)
    with http2.connection(running.address, reads=False) as connection, Client(running.address) as client:
        for _ in range(2):
            connection.call(GENERATE, request().SerializeToString())
        end = time.monotonic() + 20
        while running.server.worker._places.taken < 2:  # before another request may take one of theirs
            assert time.monotonic() < end
        while client.server_info().load.running or client.server_info().load.waiting:
            assert time.monotonic() < end
        assert refused(client)
        while refused(client):
            assert time.monotonic() < end
            connection.receive(0.1)
        with connected(running) as channel, silent(channel, 2):  # so the calls have given back theirs
            assert client.server_info().version


def refused(client: Client) -> bool:
    """The queue is full."""
    try:
        list(client.generate("x", SamplingParams(max_new_tokens=1), timeout=30))
    except ResourceExhausted as error:
        return "max_queue: 2 requests are prepared, waiting or running, at most 2" in str(error)
    return False


@proves("body_timeout")
@pytest.mark.parametrize("method", [GENERATE, "/keysift.v1.Inference/Abort", "/grpc.health.v1.Health/Check"])
def test_a_message_that_does_not_come(start: Callable[..., Running], method: str) -> None:
    """Neither half of it nor nothing at all holds a call for longer than the limit."""
    running = start(body_timeout=0.4)
    with http2.connection(running.address) as connection:
        stream = connection.open(method)
        connection.send(stream, 1000, 100)
        assert connection.wait(stream, 10)
    with connected(running) as channel:
        error = refusal(lambda: list(channel.stream_stream(method)(never(), timeout=30)))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.details() == "body_timeout: a request must be there within 0.4 s, it was not"


def never() -> Iterator[bytes]:
    threading.Event().wait(5)
    yield from ()


def test_a_call_that_ends_without_a_message(tight: Running) -> None:
    with connected(tight) as channel:
        started = time.monotonic()
        error = refusal(lambda: list(channel.stream_stream(GENERATE)(iter(()), timeout=60)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "message: one keysift.v1.GenerateRequest, got none"
    assert time.monotonic() - started < 20


@proves("max_receiving")
def test_who_stops_in_the_middle_does_not_keep_others_waiting(start: Callable[..., Running]) -> None:
    """Eight callers of one address hold turns, wait for more of them, and come back; another is served meanwhile."""
    running = start(max_receiving=2, body_timeout=60)
    with contextlib.ExitStack() as stack:
        opened = (http2.connection(running.address, source="127.0.0.2") for _ in range(8))
        stuck = [stack.enter_context(connection) for connection in opened]
        client = stack.enter_context(Client(running.address))
        for _ in range(3):
            for connection in stuck:
                connection.send(connection.open(GENERATE), 5_000_000, 30_000)
            started = time.monotonic()
            assert list(client.generate("x", SamplingParams(max_new_tokens=1), timeout=30))
            assert time.monotonic() - started < 5


def test_what_nobody_reads_yet_is_not_taken_in(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that waits for its turn gets HTTP/2's first window of 64 KiB, however fast it sends."""
    monkeypatch.setattr(bodies, "PATIENCE_S", 60)
    running = start(max_receiving=1, body_timeout=60)
    with http2.connection(running.address) as first, http2.connection(running.address) as second:
        assert first.send(first.open(GENERATE), 5_000_000, 4_000_000) == 4_000_005
        assert second.send(second.open(GENERATE), 5_000_000, 4_000_000, patience=0.3) <= 2**16


def test_a_call_without_a_token_is_not_read(start: Callable[..., Running]) -> None:
    running = start(api_key="sesame")
    with http2.connection(running.address) as stranger, http2.connection(running.address) as friend:
        stream = stranger.open(GENERATE)
        assert stranger.wait(stream, 20)
        assert stranger.send(stream, 5_000_000, 4_000_000) == 0
        stream = friend.open(GENERATE, authorization="Bearer sesame")
        assert friend.send(stream, 5_000_000, 4_000_000) == 4_000_005


@proves("max_body_bytes")
def test_bodies_in_memory(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    running = start(max_body_bytes="1MiB")
    arrived, go = threading.Event(), threading.Event()
    encode = type(running.engine.tokenizer).encode

    def slow(*arguments: Any, **options: Any) -> list[int]:
        arrived.set()
        go.wait(60)
        return encode(running.engine.tokenizer, *arguments, **options)

    monkeypatch.setattr(running.engine.tokenizer, "encode", slow)
    large = request(text="x" * 700_000, truncate_prompt_tokens=5)
    with connected(running) as channel:
        first = InferenceStub(channel).Generate(large, timeout=60)
        assert arrived.wait(30)
        error = refusal(lambda: send(channel, large))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert re.fullmatch(
            r"max_body_bytes: at most 1048576 bytes of requests .*, got 7000\d\d and 7000\d\d more", error.details()
        )
        small = InferenceStub(channel).Generate(request(), timeout=60)
        go.set()
        assert len(list(first)) == len(list(small)) == 4


@proves("handshake_timeout")
def test_a_connection_that_says_nothing(start: Callable[..., Running]) -> None:
    running = start(handshake_timeout=0.3)
    host, _, port = running.address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        end = time.monotonic() + 20
        while http2.is_open(connection):
            assert time.monotonic() < end


@proves("idle_timeout")
def test_a_connection_without_a_call(start: Callable[..., Running]) -> None:
    running = start(idle_timeout=1)
    states: list[grpc.ChannelConnectivity] = []
    idle = threading.Event()
    with connected(running) as channel:
        InferenceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=30)
        channel.subscribe(lambda state: (states.append(state), state is grpc.ChannelConnectivity.IDLE and idle.set()))
        assert idle.wait(20)


def test_times_without_an_end() -> None:
    options = dict(server_options(Limits(idle_timeout=float("inf"), handshake_timeout=float("inf"))))
    assert options["grpc.max_connection_idle_ms"] == options["grpc.server_handshake_timeout_ms"] == 2**31 - 1


@proves("preparation_threads")
def test_threads_of_the_preparation(start: Callable[..., Running]) -> None:
    before = len(preparing())
    running = start(preparation_threads=3)
    assert len(preparing()) == before + 3
    running.stop()
    end = time.monotonic() + 10
    while len(preparing()) > before:
        assert time.monotonic() < end


def preparing() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("keysift-prepare")]
