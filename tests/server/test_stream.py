"""Output queue of one request: coalescing, errors and waiting."""

from __future__ import annotations

import asyncio

import pytest

from keysift.engine import Logprob, PrefillProgress, PromptInfo, TokenOutput
from keysift.server.places import Place, Places
from keysift.server.stream import Stream, coalesce
from keysift.server.tenants import ANYONE

INFO = PromptInfo("r", 9, 0, "dense", 0.0)
A = TokenOutput("r", "a", (1,), ((Logprob(1, -1.0, 1),),))
B = TokenOutput("r", "b", (2, 3), ((Logprob(2, -1.0, 1),), (Logprob(3, -2.0, 2),)))
PLACE = Place(Places(), ANYONE)
HALF, DONE = PrefillProgress("r", 9, 0, 4), PrefillProgress("r", 9, 0, 9)


def test_tokens_are_joined_and_progress_is_the_latest() -> None:
    joined = TokenOutput("r", "ab", (1, 2, 3), A.logprobs + B.logprobs)
    assert coalesce([INFO, HALF, DONE, A, B]) == [INFO, DONE, joined]


def test_nothing_is_joined_across_other_outputs() -> None:
    assert coalesce([A, DONE, B]) == [A, DONE, B]


def test_an_error_comes_after_the_queued_outputs() -> None:
    async def read() -> None:
        stream = Stream(PLACE)
        stream.put(A)
        stream.fail(RuntimeError("gone"))
        assert await stream.take() == [A]
        with pytest.raises(RuntimeError, match="gone"):
            await stream.take()

    asyncio.run(asyncio.wait_for(read(), 5))


def test_a_reader_waits_for_outputs() -> None:
    async def read() -> None:
        stream = Stream(PLACE)
        asyncio.get_running_loop().call_later(0.01, stream.put, A)
        assert await stream.take() == [A]
        waiting = asyncio.create_task(stream.take())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        stream.put(B)
        assert await waiting == [B]

    asyncio.run(asyncio.wait_for(read(), 5))
