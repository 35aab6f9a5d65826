"""Where a strategy begins to beat dense attention, from the times of chunks of a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from keysift.attention.strategy import LARGEST


class Record(BaseModel):
    """Something that is stored; what it does not know was written by another version."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Chunk(Record):
    """One chunk of a prompt: its queries, its keys so far, and milliseconds of attention summed over some layers."""

    queries: int
    context: int
    dense_ms: float
    strategy_ms: float

    @property
    def work(self) -> int:
        return self.queries * self.context

    @property
    def wins(self) -> bool:
        return self.strategy_ms < self.dense_ms


class Fit(Record):
    """Where a strategy begins to win, and what it does until then."""

    dense_below: int = Field(ge=0, le=LARGEST)
    """The strategy's option, in tokens; see `Strategy.at`."""
    wins_from: int | None
    """Tokens of context of the first chunk from which on it always won; None: it did not by the end."""
    dense_up_to: int | None
    """Tokens of the longest prompt that is dense throughout though it was not measured; None: it wins from somewhere"""


class Crossover(Fit):
    """A strategy's fit, what it was measured with, and what was measured."""

    options: str
    """Of the strategy, all but `dense_below`; see `options`."""
    measured: str
    """UTC."""
    chunks: tuple[Chunk, ...] = Field(min_length=1)

    @property
    def longest(self) -> int:
        """Tokens of the longest context that was measured."""
        return max(chunk.context for chunk in self.chunks)

    @property
    def told(self) -> str:
        """For people, in tokens."""
        if self.wins_from is not None:
            return f"from {self.wins_from:,}"
        return f"not up to {self.longest:,}: dense up to {self.dense_up_to:,}"


def fit(chunks: Sequence[Chunk], prefill_chunk: int) -> Fit:
    """The greatest `dense_below` that still lets the first of the chunks run that win for good.

    The chunks are in order of their work, at least one; prompts are read in chunks of `prefill_chunk` tokens. Such a
    prompt takes whichever is faster chunk by chunk. If the last chunk does not win, nothing is known about where one
    would: prompts of up to twice the longest measured context are dense, and only longer ones are the strategy's.
    """
    losing = [index for index, chunk in enumerate(chunks) if not chunk.wins]
    first = losing[-1] + 1 if losing else 0
    if first < len(chunks):
        winner = chunks[first]
        return Fit(dense_below=math.isqrt(winner.work - 1), wins_from=winner.context, dense_up_to=None)
    length = 2 * max(chunk.context for chunk in chunks)
    most = min(prefill_chunk, length) * length  # the work of the prompt's last chunk, which is its greatest
    return Fit(dense_below=math.isqrt(most - 1) + 1, wins_from=None, dense_up_to=length)
