"""`keysift serve`: the gRPC server as a process."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from keysift.engine.config import EngineConfig

from ..interrupts import importing
from ..limits import Limits
from ..logs import RateLimit
from ..options import ServerConfig
from .flags import Config, from_fields

SWITCH_S = 0.001
"""Time that a thread may hold the interpreter while another one waits for it: a health probe waits several times."""


@from_fields(server=ServerConfig, limits=Limits, engine=EngineConfig)
def serve(server: ServerConfig, limits: Limits, engine: EngineConfig, config: Config = None) -> None:
    """Serve a model over gRPC until SIGTERM or SIGINT.

    [bold]Examples[/bold]

      keysift serve

      keysift serve ./my-model --strategy streaming --strategy-arg streaming.window=4096

      KEYSIFT_API_KEY=secret keysift serve --host 0.0.0.0 --ssl-keyfile key.pem --ssl-certfile cert.pem
    """
    with importing():
        from keysift.engine.engine import Engine

        from ..exporter import Exporter
        from ..server import Server

    _log_to_stderr()
    sys.setswitchinterval(SWITCH_S)
    if server.metrics_port:
        Exporter(server.metrics_host, server.metrics_port).start()
    report = logging.getLogger("keysift.engine").info

    grpc_server = Server(server, lambda: Engine(engine, report), limits)
    asyncio.run(grpc_server.run())
    if grpc_server.alive:
        # A load cannot be interrupted, and an interpreter that ends around a thread in native code aborts.
        logging.shutdown()
        os._exit(0)


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("keysift").setLevel(logging.INFO)
    logging.getLogger("grpc._cython.cygrpc").addFilter(RateLimit(burst=10, seconds=10))
