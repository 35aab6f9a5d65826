"""Fit of the length from which a strategy beats dense attention, to the times of a prompt's chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from keysift.attention.strategy import LARGEST


class Record(BaseModel):
    """Base of stored records. Unknown fields are an error: they are of another version."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Chunk(Record):
    """One chunk of a prompt: number of queries and of keys so far, and milliseconds of attention over some layers."""

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
    """Length from which a strategy wins, as its option `dense_below`."""

    dense_below: int = Field(ge=0, le=LARGEST)
    """Option of the strategy, in tokens; see `Strategy.at`."""
    wins_from: int | None
    """Context in tokens of the first chunk from which on it always won; None: it did not win the last chunk."""
    dense_up_to: int | None
    """Longest prompt in tokens that stays dense, beyond what was measured; None: the strategy won the last chunk."""


class Crossover(Fit):
    """A strategy's fit, with its options and measurements."""

    options: str
    """Options of the strategy but `dense_below`; see `calibration.options`."""
    measured: str
    """Time of the measurement, UTC."""
    chunks: tuple[Chunk, ...] = Field(min_length=1)

    @property
    def longest(self) -> int:
        """Longest context measured, in tokens."""
        return max(chunk.context for chunk in self.chunks)

    @property
    def summary(self) -> str:
        """The fit in words, in tokens."""
        if self.wins_from is not None:
            return f"from {self.wins_from:,}"
        return f"not up to {self.longest:,}: dense up to {self.dense_up_to:,}"


def fit(chunks: Sequence[Chunk], prefill_chunk: int) -> Fit:
    """Largest `dense_below` under which the first chunk that wins for good still runs sparse.

    `chunks`, at least one, are in order of their work; prompts run in chunks of `prefill_chunk` tokens, each dense or
    sparse. If the last chunk does not win, the crossover is unknown: prompts of up to twice the longest measured
    context stay dense, and only longer ones are sparse.
    """
    losing = [index for index, chunk in enumerate(chunks) if not chunk.wins]
    first = losing[-1] + 1 if losing else 0
    if first < len(chunks):
        winner = chunks[first]
        return Fit(dense_below=math.isqrt(winner.work - 1), wins_from=winner.context, dense_up_to=None)
    length = 2 * max(chunk.context for chunk in chunks)
    most = min(prefill_chunk, length) * length  # work of the prompt's last chunk, its largest
    return Fit(dense_below=math.isqrt(most - 1) + 1, wins_from=None, dense_up_to=length)
