"""Life cycle of a server: loading, health, drain, and failure of the engine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keysift.engine import Engine, EngineConfig, Finish, FinishReason, Output, SamplingParams, TokenOutput
from keysift.server import inference_pb2 as pb
from keysift.server.client import Client
from keysift.server.errors import Internal, Unavailable
from keysift.server.options import ServerConfig
from keysift.server.server import NAME, Server

from . import http2
from .conftest import Running, SlowEngine

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LONG = SamplingParams(max_new_tokens=1000, ignore_eos=True)


def health(running: Running, service: str = "") -> int:
    with grpc.insecure_channel(running.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)


def watch(running: Running) -> Iterator[int]:
    with grpc.insecure_channel(running.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for reply in stub.Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=30):
            yield reply.status


def read_in_background(client: Client, outputs: list[Output]) -> threading.Thread:
    """Thread that reads a long completion; returns after its first token."""
    started = threading.Event()

    def read() -> None:
        for output in client.generate("x", LONG):
            outputs.append(output)
            if isinstance(output, TokenOutput):
                started.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert started.wait(10)
    return thread


def test_not_serving_until_the_model_is_loaded(start: Callable[..., Running], engine_config: EngineConfig) -> None:
    go = threading.Event()

    def load() -> Engine:
        go.wait(30)
        return Engine(engine_config)

    running = start(load, wait=False)
    statuses = watch(running)
    assert next(statuses) == health(running) == NOT_SERVING
    with Client(running.address) as client:
        assert client.server_info().state == pb.LOADING
        for call in (client.info, lambda: list(client.generate("x"))):
            with pytest.raises(Unavailable, match="the model is loading") as caught:
                call()
            assert caught.value.retry_after_s
        go.set()
        assert next(statuses) == health(running) == SERVING
        assert client.server_info().state == pb.READY
        assert list(client.generate("x", SamplingParams(max_new_tokens=1)))


class FragileEngine(SlowEngine):
    """Engine whose next step fails once `broken` is set."""

    broken = False

    def step(self) -> list[Output]:
        if self.broken:
            raise RuntimeError("out of order")
        return super().step()


def test_a_failed_engine_fails_requests_and_health(
    start: Callable[..., Running], engine_config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    running = start(lambda: FragileEngine(engine_config))
    assert health(running) == SERVING
    with Client(running.address) as client:
        outputs = client.generate("x", LONG)
        while not isinstance(next(outputs), TokenOutput):
            pass
        running.engine.broken = True  # type: ignore[attr-defined]
        with pytest.raises(Internal, match="RuntimeError"):
            list(outputs)
        assert client.server_info().state == pb.FAILED
        with pytest.raises(Unavailable, match="restarted"):
            list(client.generate("x", timeout=5))
    assert health(running) == health(running, NAME) == NOT_SERVING
    assert caplog.text.count("RuntimeError: out of order") == 1


def test_a_model_that_cannot_be_loaded(start: Callable[..., Running], engine_config: EngineConfig) -> None:
    missing = engine_config.model_copy(update={"model": "/no/such/folder"})
    running = start(lambda: Engine(missing), wait=False)
    with Client(running.address) as client:
        deadline = time.monotonic() + 10
        while client.server_info().state != pb.FAILED:
            assert time.monotonic() < deadline
        with pytest.raises(Unavailable, match="failed"):
            list(client.generate("x"))
    assert health(running) == NOT_SERVING


def test_drain_lets_running_requests_finish(start: Callable[..., Running], engine_config: EngineConfig) -> None:
    running, outputs = start(lambda: SlowEngine(engine_config)), list[Output]()
    with Client(running.address) as client:
        short = SamplingParams(max_new_tokens=30, ignore_eos=True)
        stream = client.generate("x", short)
        outputs.append(next(stream))
        drain = threading.Thread(target=lambda: running.do(running.server.drain(20)))
        drain.start()
        while client.server_info().state != pb.DRAINING:
            pass
        assert health(running) == NOT_SERVING
        with pytest.raises(Unavailable, match="shutting down") as caught:
            list(client.generate("x"))
        assert caught.value.retry_after_s
        outputs += stream
        drain.join(10)
    assert isinstance(outputs[-1], Finish)
    assert outputs[-1].reason is FinishReason.LENGTH


def test_drain_aborts_requests_after_its_timeout(start: Callable[..., Running], engine_config: EngineConfig) -> None:
    running, outputs = start(lambda: SlowEngine(engine_config)), list[Output]()
    with Client(running.address) as client:
        reader = read_in_background(client, outputs)
        running.do(running.server.drain(0.2))
        reader.join(5)
    assert isinstance(outputs[-1], Finish)
    assert outputs[-1].reason is FinishReason.CANCELLED
    assert running.free_pages() == running.engine.status.pages_total


def test_a_watcher_that_does_not_read_keeps_no_server_from_draining(start: Callable[..., Running]) -> None:
    running = start()
    with http2.connection(running.address, reads=False) as stranger, Client(running.address) as client:
        stranger.call("/grpc.health.v1.Health/Watch", b"")
        while stranger.receive(0.3):  # the server's part of the handshake, and the headers of the reply
            pass
        assert client.server_info().state == pb.READY
        running.do(running.server.drain(0), timeout=10)
        assert health(running) == NOT_SERVING


def test_a_service_of_another_name(running: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        health(running, "another")
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with grpc.insecure_channel(running.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="another")
        assert next(stub.Watch(request, timeout=30)).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def test_a_taken_port_is_an_error(running: Running, engine_config: EngineConfig) -> None:
    async def start_another() -> None:
        await Server(ServerConfig(port=running.server.port), lambda: Engine(engine_config)).start()

    with pytest.raises(Unavailable, match=rf"{running.server.port}: address or port .*Failed to bind"):
        running.do(start_another())


def test_ipv6(start: Callable[..., Running]) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    running = start(host="::", insecure=True)
    with Client(f"[::1]:{running.server.port}") as client:
        assert client.info().model == "tiny"
