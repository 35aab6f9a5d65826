"""Rate limit of log lines that callers can cause."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from keysift.server import guard, inference_pb2
from keysift.server.errors import logger as errors_logger
from keysift.server.logs import ForeignMetadata, RateLimit

from . import http2
from .conftest import Running
from .test_limits import GENERATE, connected, refusal


def test_a_place_in_the_code_says_little_and_counts_the_rest() -> None:
    now = 0.0
    limit = RateLimit(burst=2, seconds=10, clock=lambda: now)

    def passes(line: int, text: str = "%s") -> str | None:
        record = logging.LogRecord("x", logging.WARNING, "file", line, text, ("said",), None)
        return record.getMessage() if limit.filter(record) else None

    assert [passes(1) for _ in range(5)] == ["said", "said", None, None, None]
    assert passes(2) == "said"
    now = 10.0
    assert [passes(1) for _ in range(3)] == ["said (and 3 more like it before)", "said", None]
    assert passes(2) == "said"
    now = 100.0
    assert passes(1) == "said (and 1 more like it before)"


def test_what_callers_cause_is_limited() -> None:
    for logger in (guard.logger, errors_logger):
        assert any(isinstance(each, RateLimit) for each in logger.filters)


def test_malformed_messages_are_one_line(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard.logger, "filters", [RateLimit(burst=1, seconds=60)])
    with connected(start()) as channel:
        for _ in range(5):
            refusal(lambda: list(channel.unary_stream(GENERATE)(b"\xff" * 9, timeout=30)))
    name = inference_pb2.GenerateRequest.DESCRIPTOR.full_name
    lines = [record.getMessage() for record in caplog.records if "bytes that are none" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith(f"{GENERATE} from ipv4:127.0.0.1:")
    assert lines[0].endswith(f"message: a {name}, got 9 bytes that are none")
    assert "Traceback" not in caplog.text


def test_metadata_that_is_no_text_is_not_shown(
    running: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("grpc._cython.cygrpc")
    assert any(isinstance(each, ForeignMetadata) for each in log.filters)
    monkeypatch.setattr(log, "filters", [ForeignMetadata(burst=1, seconds=60)])
    with http2.connection(running.address) as connection:
        for _ in range(3):
            stream = connection.call("/grpc.health.v1.Health/Check", b"", authorization="Bearer secret\xff")
            assert connection.wait(stream, 10)
    assert caplog.text.count("metadata of a call: text in UTF-8, got other bytes") == 1
    assert "secret" not in caplog.text
    assert "Traceback" not in caplog.text
