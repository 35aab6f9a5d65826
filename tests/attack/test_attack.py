"""A short attack on a real server, in a process of its own. `make attack MINUTES=30` is the long one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from .attack import SETTLED_S, Attack, Report
from .target import Holdings, start

SECONDS = 10.0
HEALTH_MS = 3000.0
"""Generous, as the tests' other process takes a core of two; the long attack is held to 100 ms."""


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offload"])
def test_a_server_holds(tmp_path: Path, offload: bool) -> None:
    target = start(tmp_path, offload=offload)
    try:
        report = Attack(target, SECONDS).run()
    finally:
        status = target.stop()
    assert report.faults(HEALTH_MS) == []
    assert report.statuses["OK"] > 5
    assert report.statuses["INVALID_ARGUMENT"] > 5
    assert status == 0
    assert "Traceback" not in target.log.read_text()


def held() -> Report:
    rest = Holdings(0.0, 100, 20, 10)
    return Report(
        health_ms=[1.0], serving=True, golden=[True], holdings=[rest], before=rest, after=rest, free_pages=(9, 9)
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"internal": {("a", "b"): "a: INTERNAL b"}}, "INTERNAL"),
        ({"health_ms": [1.0, 5000.0]}, "health took"),
        ({"serving": False}, "SERVING"),
        ({"golden": [True, False]}, "golden"),
        ({"free_pages": (8, 9)}, "pages are lost"),
        ({"after": Holdings(0.0, 100, 99, 10)}, "file descriptors"),
        ({"after": Holdings(0.0, 100, 20, 99)}, "threads"),
        ({"holdings": [Holdings(SETTLED_S + i, 100 + i, 20, 10) for i in range(20)]}, "memory grew"),
    ],
)
def test_a_server_that_did_not_hold_is_told(change: dict[str, object], word: str) -> None:
    assert held().faults(HEALTH_MS) == []
    (fault,) = dataclasses.replace(held(), **change).faults(HEALTH_MS)  # type: ignore[arg-type]
    assert word in fault
