"""Fixtures: a tiny random Llama on disk, a server of it on a loopback port, and a runner of commands."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from keysift.engine import Engine, EngineConfig, Output
from keysift.server.client import Client
from keysift.server.commands import cli
from keysift.server.limits import Limits
from keysift.server.options import ServerConfig
from keysift.server.server import Server
from tests.models import llama, save

MAX_LEN = 2048
Run = Callable[..., tuple[int, str, str]]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture
def terminal() -> Iterator[None]:
    """Default handler of SIGINT, which a process in the background of a shell ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama(max_position_embeddings=MAX_LEN, initializer_range=0.5)
    return save(config, tmp_path_factory.mktemp("tiny-llama"), TEMPLATE)


@pytest.fixture(scope="session")
def engine_config(model_folder: Path) -> EngineConfig:
    return EngineConfig(model=str(model_folder), served_model_name="tiny", kv_memory=16 * 2**20, prefill_chunk=64)


class SlowEngine(Engine):
    """Engine with 20 ms more for each step, so that 1,000 tokens outlast the assertions of a test."""

    def step(self) -> list[Output]:
        time.sleep(0.02)
        return super().step()


class Running:
    """`Server` whose event loop runs on another thread, so that tests can call it over the network."""

    def __init__(
        self, config: ServerConfig, limits: Limits, load: Callable[[], Engine], loop: asyncio.AbstractEventLoop
    ) -> None:
        self.loop = loop
        self.server = self.do(_build(config, load, limits))
        self.do(self.server.start())

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def engine(self) -> Engine:
        assert self.server.worker.engine
        return self.server.worker.engine

    def do(self, work: Any, timeout: float = 60) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def wait_until_loaded(self) -> None:
        self.do(_result(self.server.worker.loaded))

    def free_pages(self) -> int:
        """Free pages after all requests have ended, which must take less than 5 s."""
        self.do(self.server.worker.idle(), timeout=5)
        return int(self.do(_result(self.server.worker.call, lambda engine: engine.status.pages_free)))

    @contextmanager
    def holding(self) -> Iterator[None]:
        """The engine waits between two steps until the end of the block, so that requests arrive together."""
        held, go = threading.Event(), threading.Event()

        def hold(_engine: Engine) -> None:
            held.set()
            go.wait(20)

        self.loop.call_soon_threadsafe(self.server.worker.call, hold)
        assert held.wait(10)
        try:
            yield
        finally:
            go.set()

    def wait_for_streams(self, count: int) -> None:
        """Wait until so many requests are live."""
        while len(self.server.worker._streams) < count:
            time.sleep(0.002)

    def stop(self) -> None:
        self.do(self.server.stop())


async def _build(config: ServerConfig, load: Callable[[], Engine], limits: Limits) -> Server:
    return Server(config, load, limits)


async def _result(future: Any, *arguments: Any) -> Any:
    return await (future(*arguments) if arguments else future)


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Event loop of all servers: grpc.aio loses wakeups between several loops in one process."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="session")
def start(engine_config: EngineConfig, loop: asyncio.AbstractEventLoop) -> Iterator[Callable[..., Running]]:
    """Function that starts a server on a free port; its keywords are fields of `ServerConfig` and `Limits`."""
    started: list[Running] = []

    def start_one(load: Callable[[], Engine] | None = None, wait: bool = True, **options: Any) -> Running:
        limits = Limits(**{name: options.pop(name) for name in set(options) & set(Limits.model_fields)})
        running = Running(ServerConfig(port=0, **options), limits, load or (lambda: Engine(engine_config)), loop)
        started.append(running)
        if wait:
            running.wait_until_loaded()
        return running

    yield start_one
    for running in started:
        running.stop()


@pytest.fixture(scope="session")
def running(start: Callable[..., Running]) -> Running:
    return start()


@pytest.fixture(scope="session")
def slow(start: Callable[..., Running], engine_config: EngineConfig) -> Running:
    """Slow server on which one request runs and one may wait."""
    config = engine_config.model_copy(update={"max_num_seqs": 1, "max_queue": 1})
    return start(lambda: SlowEngine(config))


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running.address) as client:
        yield client


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Function that runs a command; returns its exit status, standard output and standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["keysift", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        status = 0
        try:
            cli.main()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
