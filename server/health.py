"""Health service: `grpc.health.v1`, whose status changes at once, however slowly a watcher reads."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import DESCRIPTOR, HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer

Context = grpc.aio.ServicerContext[Any, Any]
HEALTH = DESCRIPTOR.services_by_name["Health"].full_name
SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


class Health(HealthServicer):
    """State of the services `names`, on the event loop of the server.

    That of grpcio-health-checking waits for its watchers: one that does not read would keep a server from draining.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._status: int = NOT_SERVING
        self._draining = False
        self._changed = asyncio.Event()

    def set(self, status: int) -> None:
        """State of all services from now on, unless the server drains."""
        if not self._draining:
            self._status = status
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    def drain(self) -> None:
        """Report NOT_SERVING for good."""
        self.set(NOT_SERVING)
        self._draining = True

    async def Check(self, request: HealthCheckRequest, context: Context) -> HealthCheckResponse:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "service: this server has no such one")
        return HealthCheckResponse(status=self._status)

    # The stub expects an iterator, but a cancelled one is cleaned up when it is collected, not at once.
    async def Watch(self, request: HealthCheckRequest, context: Context) -> None:
        known, last = request.service in self._names, None
        while True:
            changed, status = self._changed, self._status if known else HealthCheckResponse.SERVICE_UNKNOWN
            if status != last:
                await context.write(HealthCheckResponse(status=status))
                last = status
            await changed.wait()
