"""`keysift serve`: the gRPC server as a process."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from keysift.engine.config import EngineConfig
from keysift.engine.errors import InvalidRequest

from ..interrupts import importing
from ..options import ServerConfig
from .flags import Config, from_fields


@from_fields(server=ServerConfig, engine=EngineConfig)
def serve(server: ServerConfig, engine: EngineConfig, config: Config = None) -> None:
    """Serve a model over gRPC until SIGTERM or SIGINT.

    [bold]Examples[/bold]

      keysift serve

      keysift serve ./my-model --strategy streaming --strategy-arg streaming.window=4096

      KEYSIFT_API_KEY=secret keysift serve --host 0.0.0.0 --ssl-keyfile key.pem --ssl-certfile cert.pem
    """
    with importing():
        from keysift.engine.engine import Engine

        from ..server import Server

    _log_to_stderr()
    if server.metrics_port:
        _export_metrics(server.host, server.metrics_port)
    report = logging.getLogger("keysift.engine").info

    grpc_server = Server(server, lambda: Engine(engine, report))
    asyncio.run(grpc_server.run())
    if grpc_server.worker.alive:
        # A load cannot be interrupted, and an interpreter that ends around a thread in native code aborts.
        logging.shutdown()
        os._exit(0)


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("keysift").setLevel(logging.INFO)


def _export_metrics(host: str, port: int) -> None:
    from prometheus_client import start_http_server

    try:
        start_http_server(port, host)
    except OSError as error:
        raise InvalidRequest("metrics_port", f"a free port, got {port} ({error.strerror})") from None
