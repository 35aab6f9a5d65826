"""gRPC server of one engine: services, health, draining and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from keysift.engine.engine import Engine

from . import inference_pb2 as pb
from .errors import Internal, Unavailable
from .guard import Guard
from .health import HEALTH, NOT_SERVING, SERVING, Health
from .inference_pb2_grpc import add_InferenceServicer_to_server
from .limits import Limits
from .logs import ForeignMetadata
from .options import ServerConfig, server_options
from .security import server_credentials, tokens
from .service import InferenceService
from .threads import PreparationThreads
from .worker import Worker

logger = logging.getLogger(__name__)
logging.getLogger("grpc._cython.cygrpc").addFilter(ForeignMetadata(burst=1, seconds=10))

NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
STOP_GRACE_S = 2.0
"""Time for handlers to send their last message after the drain, and for a model that is still loading."""
ENGINE_GRACE_S = 10.0
"""Time for the engine to end: its last step, and its other processes, which get half of it."""


class Server:
    """Server of one engine on one port. `start`, `drain` and `stop` run inside one event loop."""

    def __init__(self, config: ServerConfig, load: Callable[[], Engine], limits: Limits | None = None) -> None:
        """Raises `InvalidRequest` for files of tokens that cannot be used."""
        self.config, self.limits = config, limits or Limits()
        self._threads = PreparationThreads(self.limits.preparation_threads)
        self._guard = Guard(self.limits, tokens(config), self._threads)
        self.worker = Worker(load, self._threads)
        self.service = InferenceService(self.worker, self._guard, self.limits, config.share_prefix_cache)
        self.health = Health("", NAME)
        self.port = 0

    async def start(self) -> None:
        """Listen and start to load the model.

        Raises `Unavailable` if the port is taken, and `InvalidRequest` for TLS files that cannot be used.
        """
        if self.config.exposed:
            logger.warning("%s is not loopback, and there is %s", self.config.host, self.config.exposed)
        self._grpc = self._build()
        self.port = self._bind()
        await self._grpc.start()
        logger.info("listening on %s:%d", self.config.host, self.port)
        self.worker.start()
        self._health_task = asyncio.create_task(self._follow_health())

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain; a second signal kills. Raises the error that ended the engine."""
        await self.start()
        signalled = asyncio.create_task(_signal())
        await asyncio.wait((signalled, self._health_task), return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        failure = self._health_task.exception() if self._health_task.done() else None
        await self.drain(self.config.drain_timeout)
        await self.stop()
        if failure:
            raise failure

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, wait `timeout` seconds for the running ones, then abort them."""
        self.worker.drain()
        self.health.drain()
        logger.info("draining: running requests get %g s", timeout)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.worker.idle(), timeout)
        self.worker.abort_all()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.worker.idle(), STOP_GRACE_S)

    async def stop(self) -> None:
        """Close the port and end the engine's thread."""
        await self._grpc.stop(STOP_GRACE_S)
        self._threads.close()
        await self.worker.close(ENGINE_GRACE_S if self.worker.loaded.done() else STOP_GRACE_S)
        self._health_task.cancel()
        await asyncio.gather(self._health_task, return_exceptions=True)
        logger.info("stopped")

    def _build(self) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[self._guard], options=server_options(self.limits))
        add_InferenceServicer_to_server(self.service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        reflection.enable_server_reflection((NAME, HEALTH, reflection.SERVICE_NAME), server)
        return server

    def _bind(self) -> int:
        host = self.config.host
        address = f"[{host}]:{self.config.port}" if ":" in host and "[" not in host else f"{host}:{self.config.port}"
        credentials = server_credentials(self.config)
        try:
            if credentials:
                return self._grpc.add_secure_port(address, credentials)
            return self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise Unavailable(f"cannot listen on {address}: address or port taken or not available ({error})") from None

    @property
    def alive(self) -> bool:
        """True after `stop` if a thread did not end in time: the engine's, or one that prepares a request."""
        return self.worker.alive or self._threads.alive

    async def _follow_health(self) -> None:
        """Report SERVING while the engine runs; raises the error that ended it."""
        engine = await self.worker.loaded
        self.health.set(SERVING)
        logger.info("ready: %s", engine.model.name)
        await self.worker.failed.wait()
        self.health.set(NOT_SERVING)
        raise Internal("the engine has failed; see the log")


async def _signal() -> None:
    """Wait for the first SIGTERM or SIGINT; the next one ends the process."""
    arrived, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, arrived.set)
    try:
        await arrived.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
