"""Losses of a strategy for tokens against dense attention on one text with a dense prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from keysift.attention import Dense, Strategy
from keysift.engine.measure.evaluation.reader import Mark, Reading
from keysift.engine.measure.evaluation.witness import Ledger
from keysift.kvcache import Phase

from .quality import ROOM, Bench, Outcome

T = TypeVar("T")
SCORED = 256
"""Positions at the end of a text that are decoded, and whose next-token distributions are compared."""


@dataclass(slots=True)
class Text:
    """A text with needles in it, prefilled densely but for its last tokens, which are decoded under any strategy."""

    bench: Bench
    tokens: list[int]
    reading: Reading
    start: Mark
    dense: Outcome = field(init=False)

    @classmethod
    @contextmanager
    def open(cls, bench: Bench, kind: str, length: int, strategies: Iterable[Strategy]) -> Iterator[Text]:
        """The text with its dense outcome; the indexes of all `strategies` see the prompt."""
        tokens = bench.haystack(kind, length)
        room = SCORED + ROOM
        with bench.reader.open([tokens[:-SCORED]], Dense(), room, also=strategies) as (reading,):
            bench.reader.read(reading)
            text = cls(bench, tokens, reading, reading.mark())
            text.dense = text.read(Dense())
            yield text

    def compare(self, strategy: Strategy) -> dict[str, float | None]:
        """One strategy on the last tokens and on the needles, against dense. The last token has no follower."""
        return self.read(strategy).against(self.dense, torch.tensor(self.tokens[1 - SCORED :]))

    def read(self, strategy: Strategy) -> Outcome:
        """Decode the last tokens and each needle's question and answer, then forget them."""
        bench, reading = self.bench, self.reading
        reading.sequence.strategy = strategy
        with bench.reader.watching(ledger := Ledger()):
            found = bench.decode(reading, self.tokens[-SCORED:])
        end = reading.mark()
        answers = bench.answers(lambda *pair: bench.ask_decoded(reading, end, *pair))
        bench.reader.rewind(reading, self.start)
        return Outcome(found, answers, facts(end, ledger))


def facts(end: Mark, ledger: Ledger) -> dict[str, float | None]:
    """Pages read by `SCORED` tokens, the coverage that the strategy estimates, and the coverage as measured."""
    reads, coverage = end.reads[Phase.DECODE], end.coverage[Phase.DECODE]
    return {
        "density": reads.density,
        "mb": reads.bytes / SCORED / 1e6,
        "coverage": coverage.mean,
        "coverage_min": coverage.least,
        "kept": ledger.mean,
        "kept_min": ledger.least,
    }


class OneOpen(Generic[T]):
    """One text at a time: asking for another one closes the last, as one of 8,000 tokens is half a gigabyte."""

    def __init__(self, open_text: Callable[[str, int], AbstractContextManager[T]]) -> None:
        self._open, self._stack = open_text, ExitStack()
        self._texts: dict[tuple[str, int], T] = {}

    def __enter__(self) -> OneOpen[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._texts.clear()
        self._stack.close()

    def __call__(self, kind: str, length: int) -> T:
        if (kind, length) not in self._texts:
            self.__exit__()
            self._texts[kind, length] = self._stack.enter_context(self._open(kind, length))
        return self._texts[kind, length]
