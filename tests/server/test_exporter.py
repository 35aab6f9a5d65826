"""HTTP server of the metrics: its answers, and readers that are slow or many."""

from __future__ import annotations

import http.client
import socket
import threading
import tracemalloc
import urllib.request
from collections.abc import Iterator

import pytest

from keysift.engine import InvalidRequest
from keysift.server import exporter
from keysift.server.exporter import MAX_CONNECTIONS, MAX_HEAD_BYTES, Exporter

from . import http2


@pytest.fixture
def port() -> Iterator[int]:
    server = Exporter("127.0.0.1", 0)
    yield server.start()
    server.stop()


def get(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
        return str(reply.read().decode())


@pytest.mark.parametrize("path", ["/metrics", "/", "/metrics?name[]=x"])
def test_the_metrics(port: int, path: str) -> None:
    assert "# HELP keysift_tenant_requests_total" in get(port, path)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("HEAD", "/metrics", 200), ("GET", "/etc/passwd", 404), ("POST", "/metrics", 405)],
)
def test_anything_else(port: int, method: str, path: str, status: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path)
    reply = connection.getresponse()
    assert (reply.status, reply.read()) == (status, b"")
    connection.close()


def test_300_slow_readers_keep_nobody_out_and_make_no_threads(port: int) -> None:
    before = threading.active_count()
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
    for connection in slow:
        connection.sendall(b"GET /metrics HT")
    for _ in range(3):
        assert "keysift_num_requests_waiting" in get(port)
    assert threading.active_count() == before
    open_ones = sum(map(http2.is_open, slow))
    assert open_ones <= MAX_CONNECTIONS
    for connection in slow:
        connection.close()


def test_a_slow_reader_is_ended(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert not http2.is_open(connection, 10)


def test_a_long_head_is_refused(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"x" * 4 * MAX_HEAD_BYTES)
        assert not http2.is_open(connection, 10)


def test_what_comes_after_the_head_is_dropped(port: int) -> None:
    body = bytes(2**20)
    tracemalloc.start()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        for _ in range(32):
            connection.sendall(body)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(body)


def test_a_taken_port_is_an_error(port: int) -> None:
    with pytest.raises(InvalidRequest, match=f"metrics_port: a free port of '127.0.0.1', got {port} "):
        Exporter("127.0.0.1", port).start()
