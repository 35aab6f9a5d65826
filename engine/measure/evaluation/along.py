"""How far a strategy is from dense along a real text: its prompt and its tokens, one without the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from keysift.attention import Dense, Split, Strategy
from keysift.kvcache import Phase

from ..variants import DENSE
from .divergence import Divergence, logs
from .reader import Reader, Reading
from .witness import Ledger

SCORED = 512
"""Positions of a prompt whose distributions are compared, evenly spaced over its last three quarters."""
DECODED = 256
"""Tokens at the end of a text that are decoded."""
Row = tuple[str, dict[str, Any]]
"""A strategy's label, and what was found about it."""


@dataclass(slots=True)
class Along:
    """One text of some length, and what dense attention makes of it."""

    reader: Reader
    tokens: list[int]

    @property
    def positions(self) -> list[int]:
        """Ascending, each once."""
        length = len(self.tokens)
        spread = torch.linspace(length // 4, length - 2, min(SCORED, length // 2)).long()
        return sorted(set(spread.tolist()))

    def prompt(self, strategies: Mapping[str, Strategy]) -> Iterator[Row]:
        """Of each strategy, `dense` first, the whole text as a sparse prompt."""
        dense, exact = self._prefilled(strategies[DENSE])
        followers = torch.tensor([self.tokens[position + 1] for position in self.positions])
        for label, strategy in strategies.items():
            found, ledger = (dense, exact) if label == DENSE else self._prefilled(strategy)
            yield label, row(Divergence.of(dense, found, followers), ledger)

    def _prefilled(self, strategy: Strategy) -> tuple[Tensor, Ledger]:
        """[positions, V], logs after the scored tokens of the whole text as a prompt, and what was kept on the way."""
        heard: list[Tensor] = []
        with self.reader.watching(ledger := Ledger()), self.reader.open([self.tokens], strategy, 0) as (reading,):
            self.reader.read(reading, self.positions, lambda position, row: heard.append(row))
        return logs(torch.stack(heard)), ledger

    def decoded(self, strategies: Mapping[str, Strategy]) -> Iterator[Row]:
        """Of each strategy, the last tokens decoded behind a dense prompt, which they share."""
        start = len(self.tokens) - DECODED
        prompt, rest = self.tokens[:start], self.tokens[start:]
        parts = {label: Split(prompt=Dense(), token=each.part(Phase.DECODE)) for label, each in strategies.items()}
        with self.reader.open([prompt], Dense(), DECODED, also=parts.values()) as (reading,):
            self.reader.read(reading)
            ahead = reading.ahead
            dense, exact = self._follow(reading, parts[DENSE], rest, ahead)
            for label, strategy in parts.items():
                same = label == DENSE
                found, ledger = (dense, exact) if same else self._follow(reading, strategy, rest, ahead)
                yield label, row(Divergence.of(dense, found, torch.tensor(rest[1:])), ledger)

    def _follow(self, reading: Reading, strategy: Strategy, tokens: list[int], ahead: Tensor) -> tuple[Tensor, Ledger]:
        """[n - 1, V], logs that predict all but the first of tokens [n]: that one follows from the prompt alone."""
        reading.sequence.strategy = strategy
        with self.reader.watching(ledger := Ledger()):
            found = logs(self.reader.follow(reading, tokens)[1:])
        self.reader.forget(reading, ahead)
        return found, ledger


def row(found: Divergence, ledger: Ledger) -> dict[str, Any]:
    """What is kept of one strategy, text and phase."""
    heads = {"coverage": ledger.coverage(), "density": ledger.densities()}
    facts = {"coverage": ledger.mean, "coverage_min": ledger.least}
    return {**facts, "divergence": asdict(found), "heads": heads}
