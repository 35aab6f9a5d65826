"""Turns to receive a body: who waits, whose turn ends, and who is next."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from keysift.engine.errors import ResourceExhausted
from keysift.server import bodies
from keysift.server.bodies import Bodies

PATIENCE_S = 0.05


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE_S", PATIENCE_S)


class Callers:
    """Callers whose bodies come when they are told to, or never."""

    def __init__(self, turns: int) -> None:
        self._bodies = Bodies(turns, 30, 2**20)
        self.began: list[str] = []
        self.go = asyncio.Event()

    async def call(self, owner: str, name: str = "") -> asyncio.Task[bool]:
        """A caller that has begun to receive or to wait."""
        task = asyncio.create_task(self._bodies.receive(owner, lambda: self._body(name or owner)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return task

    async def _body(self, name: str) -> bool:
        self.began.append(name)
        return await self.go.wait()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


def test_nobody_ends_the_only_body_of_another_owner() -> None:
    async def test() -> None:
        callers = Callers(4)
        alice = await callers.call("alice")
        others = [await callers.call("mallory") for _ in range(9)]
        done, _ = await asyncio.wait(others[:6])
        assert all(isinstance(task.exception(), ResourceExhausted) for task in done)
        assert not alice.done()
        callers.go.set()
        assert await alice

    run(test())


def test_owners_of_one_turn_each_do_not_hurry_each_other() -> None:
    async def test() -> None:
        callers = Callers(2)
        first = [await callers.call("alice"), await callers.call("bob")]
        carol = await callers.call("carol")
        await asyncio.sleep(4 * PATIENCE_S)
        assert callers.began == ["alice", "bob"]
        callers.go.set()
        assert await asyncio.gather(*first, carol) == [True] * 3

    run(test())


def test_a_waiter_hurries_one_turn_alone_and_of_its_own_if_need_be() -> None:
    async def test() -> None:
        callers = Callers(4)
        first = [await callers.call("alice") for _ in range(4)]
        last = await callers.call("alice")
        await asyncio.sleep(4 * PATIENCE_S)
        assert [task.done() for task in first] == [True, False, False, False]
        with pytest.raises(ResourceExhausted, match="max_receiving: 4 requests are received at once, and others wait"):
            await first[0]
        callers.go.set()
        assert await asyncio.gather(*first[1:], last) == [True] * 4

    run(test())


def test_waiters_hurry_each_turn_that_begins() -> None:
    """Without a newcomer that would do it."""

    async def test() -> None:
        callers = Callers(2)
        tasks = [await callers.call("mallory") for _ in range(10)]
        done, _ = await asyncio.wait(tasks[:8])
        assert all(isinstance(task.exception(), ResourceExhausted) for task in done)
        callers.go.set()
        assert await asyncio.gather(*tasks[8:]) == [True, True]

    run(test())


def test_the_owner_with_least_turns_is_next_and_of_its_waiters_the_first() -> None:
    async def test() -> None:
        callers = Callers(2)
        tasks = [await callers.call("mallory", f"mallory {number}") for number in range(6)]
        tasks += [await callers.call("alice", name) for name in ("alice 0", "alice 1")]
        while len(callers.began) < 4:
            await asyncio.sleep(PATIENCE_S / 5)
        assert callers.began[:4] == ["mallory 0", "mallory 1", "alice 0", "mallory 2"]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(test())
