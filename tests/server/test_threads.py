"""Threads that prepare requests: order, cancellation, and what waits there."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from keysift.server import threads as threads_module
from keysift.server.threads import SHORT_BYTES, PreparationThreads

LONG_BYTES = 10 * SHORT_BYTES


@pytest.fixture
def threads() -> Iterator[PreparationThreads]:
    """Two threads, one of which takes only short tasks."""
    threads = PreparationThreads(2)
    yield threads
    threads.close()


class Gate:
    """Task that occupies its thread until it is opened."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.open.wait(30)


def blocked(threads: PreparationThreads, test: Callable[[Gate], Awaitable[Any]]) -> None:
    """Run `test` while a long task occupies the thread of long ones."""

    async def run() -> None:
        gate = Gate()
        occupied = asyncio.ensure_future(threads.run(LONG_BYTES, gate))
        await asyncio.to_thread(gate.entered.wait, 30)
        try:
            await test(gate)
        finally:
            gate.open.set()
            await occupied

    asyncio.run(run())


def test_results_and_errors_return(threads: PreparationThreads) -> None:
    async def run() -> None:
        assert await threads.run(1, lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await threads.run(1, lambda: 1 // 0)

    asyncio.run(run())


def test_a_short_task_does_not_wait_for_long_ones(threads: PreparationThreads) -> None:
    async def test(gate: Gate) -> None:
        waiting = [asyncio.ensure_future(threads.run(LONG_BYTES, lambda: None)) for _ in range(30)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(threads.run(100, lambda: "short"), 10) == "short"
        assert not any(task.done() for task in waiting)
        gate.open.set()
        await asyncio.gather(*waiting)

    blocked(threads, test)


def test_a_shorter_task_overtakes_a_longer_one(threads: PreparationThreads) -> None:
    order: list[str] = []

    async def test(gate: Gate) -> None:
        sizes = {"long": 10**8, "less long": 10**7, "short": 0}
        waiting = [
            asyncio.ensure_future(threads.run(max(size, LONG_BYTES), lambda name=name: order.append(name)))  # type: ignore[misc]
            for name, size in sizes.items()
        ]
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(*waiting)

    blocked(threads, test)
    assert order == ["short", "less long", "long"]


def test_an_old_task_is_not_overtaken(threads: PreparationThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    async def test(gate: Gate) -> None:
        waiting = []
        for name, size, now in (("old", 10**8, 0.0), ("new", LONG_BYTES, 1000.0)):
            monkeypatch.setattr(threads_module, "time", SimpleNamespace(monotonic=lambda now=now: now))
            waiting.append(asyncio.ensure_future(threads.run(size, lambda name=name: order.append(name))))  # type: ignore[misc]
            await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(*waiting)

    blocked(threads, test)
    assert order == ["old", "new"]


def test_a_cancelled_task_never_runs_and_is_forgotten_at_once(threads: PreparationThreads) -> None:
    class Body:
        pass

    ran: list[object] = []

    async def test(gate: Gate) -> None:
        body = Body()
        held = weakref.ref(body)
        task = asyncio.ensure_future(threads.run(LONG_BYTES, lambda body=body: ran.append(body)))  # type: ignore[misc]
        del body
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])  # whose error nobody takes, as it keeps the frames that raised it
        assert task.cancelled()
        del task
        await asyncio.sleep(0)
        gc.collect()
        assert held() is None

    blocked(threads, test)
    assert ran == []


def test_an_error_keeps_nothing_alive(threads: PreparationThreads) -> None:
    """Without a collection of garbage, which may come late: a message has megabytes."""

    class Body:
        def refuse(self) -> None:
            raise ValueError

    async def run() -> None:
        body = Body()
        held.append(weakref.ref(body))
        work = body.refuse
        del body
        with contextlib.suppress(ValueError):
            await threads.run(LONG_BYTES, work)

    held: list[weakref.ref[Body]] = []
    gc.disable()
    try:
        asyncio.run(run())
        asyncio.run(threads.run(LONG_BYTES, lambda: None))  # type: ignore[arg-type]  # the thread has let go of it
        assert held[0]() is None
    finally:
        gc.enable()


def test_threads_end_when_they_are_closed(threads: PreparationThreads) -> None:
    threads.close()
    for thread in threads._threads:
        thread.join(10)
    assert not threads.alive
