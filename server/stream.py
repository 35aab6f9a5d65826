"""What the engine has said about one request and its reader has not taken yet."""

from __future__ import annotations

import asyncio
from itertools import chain

from keysift.engine.request import Output, TokenOutput


class Stream:
    """Outputs of one request, in order; lives on the event loop's thread.

    A slow reader never holds the engine up: while it is away, tokens are joined into one output and only the latest
    progress is kept, so that what waits is bounded by the request's own completion.
    """

    def __init__(self) -> None:
        self._waiting: list[Output] = []
        self._error: BaseException | None = None
        self._arrived = asyncio.Event()

    def put(self, output: Output) -> None:
        self._waiting.append(output)
        self._arrived.set()

    def fail(self, error: BaseException) -> None:
        """The reader gets what is waiting, then the error."""
        self._error = error
        self._arrived.set()

    async def take(self) -> list[Output]:
        """What is waiting, as soon as there is something; raises what `fail` was given once nothing is."""
        await self._arrived.wait()
        waiting, self._waiting = self._waiting, []
        if not waiting and self._error:
            raise self._error
        if not self._error:
            self._arrived.clear()
        return coalesce(waiting)


def coalesce(outputs: list[Output]) -> list[Output]:
    """Joins neighbouring token outputs and drops all but the last of neighbouring progress reports."""
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
