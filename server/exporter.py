"""HTTP server of the Prometheus metrics: one thread, few connections, little time for each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from threading import Thread

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from keysift.engine.errors import InvalidRequest

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
SECONDS = 5.0
"""Time of a connection: for its request, and for its reader to take the answer."""
MAX_HEAD_BYTES = 2**13


class Exporter:
    """Server of ``GET /metrics`` on a thread of its own, so that a scrape delays no call.

    When `MAX_CONNECTIONS` are open, a new one ends the oldest: who holds connections cannot keep a scraper out.
    """

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._open: dict[asyncio.Task[None], None] = {}
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="keysift-metrics", daemon=True)

    def start(self) -> int:
        """Listen; returns the port. Raises `InvalidRequest` if the address is not free or not this machine's."""
        host, port = self._address
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, host, port, limit=MAX_HEAD_BYTES), self._loop
        )
        try:
            self._server = starting.result()
        except OSError as error:
            self.stop()
            raise InvalidRequest("metrics_port", f"a free port of {host!r}, got {port} ({error.strerror})") from None
        return int(starting.result().sockets[0].getsockname()[1])

    def stop(self) -> None:
        """End all connections, and the thread."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        if self._server:
            self._server.close()
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.cancel()
        if task := asyncio.current_task():
            self._open[task] = None
            task.add_done_callback(lambda task: self._open.pop(task, None))
        try:
            with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                async with asyncio.timeout(SECONDS):
                    await _answer(reader, writer)
        except asyncio.CancelledError:
            logger.debug("a connection made room for another one")
        finally:
            writer.transport.abort()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request, and take no other one from the connection."""
    method, _, rest = (await reader.readuntil(b"\r\n\r\n")).partition(b" ")
    path = rest.split(b" ")[0].split(b"?")[0]
    if method not in (b"GET", b"HEAD"):
        status, body = "405 Method Not Allowed", b""
    elif path not in (b"/metrics", b"/"):
        status, body = "404 Not Found", b""
    else:
        status, body = "200 OK", generate_latest(REGISTRY)
    head = f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE_LATEST}\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + (b"" if method == b"HEAD" else body))
    writer.write_eof()
    await writer.drain()
    while await reader.read(MAX_HEAD_BYTES):  # until the reader closes: an abort would drop what it has not taken yet
        pass
