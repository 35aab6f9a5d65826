"""Raw HTTP/2 connection: callers that break off, stall or send half a message, which no client library does."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4
INITIAL_WINDOW = 65_535
FRAME = 16_384


class Connection:
    """One connection, which answers pings and settings, and sends within the windows that the server grants."""

    def __init__(self, address: str, reads: bool = True, source: str = "") -> None:
        """`reads`: take replies, else the window of each call is 0. `source`: address to come from."""
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=10, source_address=(source, 0))
        settings = b"" if reads else struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)
        self._socket.sendall(PREFACE + _frame(SETTINGS, 0, 0, settings))
        self._buffer = b""
        self._windows: Counter[int] = Counter({0: INITIAL_WINDOW})
        self._next = 1
        self.ended: set[int] = set()
        """Streams that the server has ended."""

    def open(self, path: str, **metadata: str) -> int:
        """Send the headers of a call; returns its stream."""
        stream, self._next = self._next, self._next + 2
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "x",
            "te": "trailers",
            "content-type": "application/grpc",
            **metadata,
        }
        block = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())
        self._socket.sendall(_frame(HEADERS, END_HEADERS, stream, block))
        self._windows[stream] = INITIAL_WINDOW
        return stream

    def call(self, path: str, message: bytes, **metadata: str) -> int:
        """Send a whole call, of a short message; returns its stream."""
        stream = self.open(path, **metadata)
        self._socket.sendall(_frame(DATA, END_STREAM, stream, struct.pack(">BI", 0, len(message)) + message))
        return stream

    def send(self, stream: int, message_bytes: int, sent: int, patience: float = 0.5) -> int:
        """Begin a message of `message_bytes` and stop after `sent`; returns the bytes that the server let pass."""
        rest = struct.pack(">BI", 0, message_bytes) + bytes(sent)
        total = len(rest)
        while rest and stream not in self.ended:
            room = min(self._windows[stream], self._windows[0], FRAME)
            if room <= 0:
                if not self.receive(patience):
                    break
                continue
            piece, rest = rest[:room], rest[room:]
            self._socket.sendall(_frame(DATA, 0, stream, piece))
            self._windows[stream] -= len(piece)
            self._windows[0] -= len(piece)
            self.receive(0)
        return total - len(rest)

    def wait(self, stream: int, seconds: float) -> bool:
        """The server ends the stream within this time."""
        end = time.monotonic() + seconds
        while stream not in self.ended and (left := end - time.monotonic()) > 0:
            if self.receive(left) is None:
                break
        return stream in self.ended

    def receive(self, seconds: float) -> bool | None:
        """Handle what the server has sent, waiting at most so long; False: nothing, None: it has closed."""
        self._socket.settimeout(seconds or 0.000_1)
        try:
            found = self._socket.recv(2**16)
        except TimeoutError:
            return False
        except ConnectionError:
            return None
        self._buffer += found
        while len(self._buffer) >= 9 and len(self._buffer) >= 9 + (size := int.from_bytes(self._buffer[:3])):
            head, body, self._buffer = self._buffer[:9], self._buffer[9 : 9 + size], self._buffer[9 + size :]
            self._socket.settimeout(10)
            self._handle(head[3], head[4], int.from_bytes(head[5:9]), body)
        return True if found else None

    def close(self) -> None:
        self._socket.close()

    def _handle(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind == WINDOW_UPDATE:
            self._windows[stream] += int.from_bytes(body)
        elif kind in (SETTINGS, PING) and not flags & ACK:
            self._socket.sendall(_frame(kind, ACK, 0, body if kind == PING else b""))
        elif kind == RST or (kind in (HEADERS, DATA) and flags & END_STREAM):
            self.ended.add(stream)


@contextlib.contextmanager
def connection(address: str, reads: bool = True, source: str = "") -> Iterator[Connection]:
    opened = Connection(address, reads, source)
    try:
        yield opened
    finally:
        opened.close()


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + body


def _text(value: str) -> bytes:
    """A string of HPACK, neither indexed nor compressed."""
    assert len(value) < 127
    return bytes([len(value)]) + value.encode("latin-1")


def is_open(connection: socket.socket, seconds: float = 0.05) -> bool:
    """The server has not closed the connection within this time."""
    connection.settimeout(seconds)
    try:
        return bool(connection.recv(1))
    except TimeoutError:
        return True
    except ConnectionError:
        return False
