"""Admission of request bodies: how many are received at once, for how long, and how many bytes wait in memory.

gRPC assembles a message out of reach of Python, up to `max_message_size`, and tells neither its length nor its
progress. So the number of messages that are being received is bounded, and the time that each one has.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from keysift.engine.errors import ResourceExhausted

from .errors import DeadlineExceeded

T = TypeVar("T")

SHORT = 2**16
"""Bytes of a short body. Short ones always find memory, as the places in the queue bound their number."""
PATIENCE_S = 1.0
"""Time that a body has at least, when others wait for their turn."""
RETRY_S = 1.0


@dataclass(eq=False, slots=True)
class _Turn:
    """One body that is being received."""

    owner: str
    since: float
    timeout: asyncio.Timeout
    hurried: bool = False

    def hurry(self) -> None:
        """End it `PATIENCE_S` after it began."""
        self.hurried = True
        if (end := self.timeout.when()) is not None:
            self.timeout.reschedule(min(end, self.since + PATIENCE_S))


@dataclass(eq=False, slots=True)
class _Waiter:
    owner: str
    ready: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Bodies:
    """Turns to receive a body. Its methods belong to the event loop's thread.

    When all turns are taken, each waiter hurries one: it ends `PATIENCE_S` after it began. That is the longest one of
    the owner that has most, if that is more than the waiter's owner would have then, or else of its own. A free turn
    goes to the owner that has least, and of its waiters to the first. So an owner that stops in the middle of bodies
    keeps no other one from its share of the turns, and nobody ends the only body of another one.
    """

    def __init__(self, turns: int, seconds: float, max_waiting_bytes: int) -> None:
        self._turns, self._seconds, self._max_bytes = turns, seconds, max_waiting_bytes
        self._current: set[_Turn] = set()
        self._waiters: list[_Waiter] = []
        self._bytes = 0

    @property
    def full(self) -> bool:
        """Every turn is taken, or promised to a waiter that has not run since."""
        return len(self._current) + sum(waiter.ready.done() for waiter in self._waiters) >= self._turns

    async def receive(self, owner: str, read: Callable[[], Awaitable[T]]) -> T:
        """Body that `read` returns, in its turn. Raises `DeadlineExceeded` or `ResourceExhausted`."""
        async with self._turn(owner) as turn:
            try:
                async with turn.timeout:
                    self._hurry()
                    return await read()
            except TimeoutError:
                raise self._late(turn) from None

    def _late(self, turn: _Turn) -> DeadlineExceeded | ResourceExhausted:
        if not turn.hurried:
            return DeadlineExceeded(f"body_timeout: a request must be there within {self._seconds:g} s, it was not")
        waited = asyncio.get_running_loop().time() - turn.since
        return ResourceExhausted(
            f"max_receiving: {self._turns} requests are received at once, and others wait; got {waited:.1f} s", RETRY_S
        )

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Count the bytes of a body until it has been prepared. Raises `ResourceExhausted` for one too many."""
        size = size if size > SHORT else 0
        if self._bytes + size > self._max_bytes:
            raise ResourceExhausted(
                f"max_body_bytes: at most {self._max_bytes} bytes of requests wait for their preparation, got "
                f"{self._bytes} and {size} more",
                RETRY_S,
            )
        self._bytes += size
        try:
            yield
        finally:
            self._bytes -= size

    @asynccontextmanager
    async def _turn(self, owner: str) -> AsyncIterator[_Turn]:
        if self.full:
            await self._wait(owner)
        now = asyncio.get_running_loop().time()
        turn = _Turn(owner, now, asyncio.timeout_at(now + self._seconds))
        self._current.add(turn)
        try:
            yield turn
        finally:
            self._current.discard(turn)
            self._wake()

    async def _wait(self, owner: str) -> None:
        waiter = _Waiter(owner)
        self._waiters.append(waiter)
        self._hurry()
        try:
            async with asyncio.timeout(self._seconds):
                await waiter.ready
        except BaseException as error:
            self._waiters.remove(waiter)
            self._wake()  # if a turn came together with the end of the wait
            if not isinstance(error, TimeoutError):
                raise
            limit = f"max_receiving: {self._turns} requests are received at once"
            raise ResourceExhausted(f"{limit}; no turn within {self._seconds:g} s", RETRY_S) from None
        self._waiters.remove(waiter)

    def _hurry(self) -> None:
        """Shorten a turn for each waiter, but for those that get the turns which end soon in any case."""
        calm = [turn for turn in self._current if not (turn.hurried or turn.timeout.expired())]
        ending, shares = len(self._current) - len(calm), self._shares(calm)
        waiting = Counter(waiter.owner for waiter in self._waiting)
        while calm and waiting:
            owner = min(waiting, key=shares.__getitem__)
            if ending:
                ending -= 1
            elif turn := _longest(calm, shares, owner):
                turn.hurry()
                calm.remove(turn)
                shares[turn.owner] -= 1
            else:  # others may still hurry turns of their own
                waiting = +Counter({turn.owner: waiting[turn.owner] for turn in calm if turn.owner != owner})
                continue
            shares[owner] += 1
            waiting[owner] -= 1
            waiting = +waiting

    def _wake(self) -> None:
        """Give a free turn to the waiter whose owner has least turns, and of these to the first."""
        if (waiting := self._waiting) and not self.full:
            shares = self._shares(self._current)
            min(waiting, key=lambda waiter: shares[waiter.owner]).ready.set_result(None)

    @property
    def _waiting(self) -> list[_Waiter]:
        """Waiters without a promise, in order of arrival."""
        return [waiter for waiter in self._waiters if not waiter.ready.done()]

    def _shares(self, turns: Iterable[_Turn]) -> Counter[str]:
        """Turns of each owner: these, and the promised ones."""
        shares = Counter(turn.owner for turn in turns)
        shares.update(waiter.owner for waiter in self._waiters if waiter.ready.done())
        return shares


def _longest(turns: Iterable[_Turn], shares: Counter[str], owner: str) -> _Turn | None:
    """Longest turn of the owner that has most, which `owner` may hurry."""
    allowed = (turn for turn in turns if turn.owner == owner or shares[turn.owner] > shares[owner] + 1)
    return max(allowed, key=lambda turn: (shares[turn.owner], -turn.since), default=None)
