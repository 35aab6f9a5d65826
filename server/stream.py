"""Coalescing output queue of one request."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import chain

from keysift.engine.request import Output, TokenOutput

from .places import Place

AT_ONCE = 64
"""Outputs that become one message at most, so that what a slow reader left keeps neither the loop nor a limit busy."""


class Stream:
    """Outputs of one request, in order, on the event loop's thread.

    A slow reader never blocks the engine: queued tokens are joined and only the latest progress is kept, so that the
    queue is bounded by the completion of the request.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.aborted = self.left = False
        """Its request is no longer wanted; nobody reads it any more."""
        self._queue: deque[Output] = deque()
        self._error: BaseException | None = None
        self._arrived = asyncio.Event()

    def put(self, output: Output) -> None:
        """Queue an output."""
        self._queue.append(output)
        self._arrived.set()

    def fail(self, error: BaseException) -> None:
        """End the stream: the reader receives the queued outputs, then the error."""
        self._error = error
        self._arrived.set()

    async def take(self) -> list[Output]:
        """Wait for outputs, and return the first `AT_ONCE`; raises the error of `fail` once the queue is empty."""
        await self._arrived.wait()
        if not self._queue and self._error:
            raise self._error
        outputs = [self._queue.popleft() for _ in range(min(AT_ONCE, len(self._queue)))]
        if not self._queue and not self._error:
            self._arrived.clear()
        return coalesce(outputs)


def coalesce(outputs: list[Output]) -> list[Output]:
    """Join adjacent token outputs, and drop all but the last of adjacent progress reports."""
    runs: list[list[Output]] = []
    for output in outputs:
        if runs and type(runs[-1][0]) is type(output):
            runs[-1].append(output)
        else:
            runs.append([output])
    return [_join(run) for run in runs]


def _join(run: list[Output]) -> Output:
    tokens = [output for output in run if isinstance(output, TokenOutput)]
    if len(tokens) < 2:
        return run[-1]
    return TokenOutput(
        tokens[0].request_id,
        "".join(output.text for output in tokens),
        tuple(chain.from_iterable(output.token_ids for output in tokens)),
        tuple(chain.from_iterable(output.logprobs for output in tokens)),
    )
