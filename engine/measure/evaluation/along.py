"""Divergence of a strategy from dense attention along a text, for prompt and generated tokens separately."""

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
from .reader import Mark, Reader, Reading
from .witness import Ledger

SCORED = 512
"""Positions of a prompt whose distributions are compared, evenly spaced over its last three quarters."""
DECODED = 256
"""Tokens at the end of a text that are decoded."""
Row = tuple[str, dict[str, Any]]
"""A strategy's label and its findings."""


@dataclass(slots=True)
class Along:
    """Comparison of strategies along one text."""

    reader: Reader
    tokens: list[int]

    @property
    def positions(self) -> list[int]:
        """Scored positions, ascending and distinct."""
        length = len(self.tokens)
        spread = torch.linspace(length // 4, length - 2, min(SCORED, length // 2)).long()
        return sorted(set(spread.tolist()))

    def prompt(self, strategies: Mapping[str, Strategy]) -> Iterator[Row]:
        """Findings of each strategy, `dense` first, with the whole text as its prompt."""
        dense, exact = self._prefilled(strategies[DENSE])
        followers = torch.tensor([self.tokens[position + 1] for position in self.positions])
        for label, strategy in strategies.items():
            found, ledger = (dense, exact) if label == DENSE else self._prefilled(strategy)
            yield label, row(Divergence.of(dense, found, followers), ledger)

    def _prefilled(self, strategy: Strategy) -> tuple[Tensor, Ledger]:
        """[positions, V], log-probabilities after the scored tokens of the text as a prompt, and the attention kept."""
        rows: list[Tensor] = []
        with self.reader.watching(ledger := Ledger()), self.reader.open([self.tokens], strategy, 0) as (reading,):
            self.reader.read(reading, self.positions, lambda position, logits: rows.append(logits))
        return logs(torch.stack(rows)), ledger

    def decoded(self, strategies: Mapping[str, Strategy]) -> Iterator[Row]:
        """Findings of each strategy, with the last tokens decoded after a dense prompt that all share."""
        start = len(self.tokens) - DECODED
        prompt, rest = self.tokens[:start], self.tokens[start:]
        parts = {label: Split(prompt=Dense(), token=each.part(Phase.DECODE)) for label, each in strategies.items()}
        with self.reader.open([prompt], Dense(), DECODED, also=parts.values()) as (reading,):
            self.reader.read(reading)
            mark = reading.mark()
            dense, exact = self._follow(reading, parts[DENSE], rest, mark)
            for label, strategy in parts.items():
                same = label == DENSE
                found, ledger = (dense, exact) if same else self._follow(reading, strategy, rest, mark)
                yield label, row(Divergence.of(dense, found, torch.tensor(rest[1:])), ledger)

    def _follow(self, reading: Reading, strategy: Strategy, tokens: list[int], mark: Mark) -> tuple[Tensor, Ledger]:
        """[n - 1, V], log-probabilities that predict tokens [n] without the first, which the prompt alone predicts."""
        reading.sequence.strategy = strategy
        with self.reader.watching(ledger := Ledger()):
            found = logs(self.reader.follow(reading, tokens)[1:])
        self.reader.rewind(reading, mark)
        return found, ledger


def row(found: Divergence, ledger: Ledger) -> dict[str, Any]:
    """Journal entry of one strategy, text and phase."""
    heads = {"coverage": ledger.coverage(), "density": ledger.densities()}
    facts = {"coverage": ledger.mean, "coverage_min": ledger.least}
    return {**facts, "divergence": asdict(found), "heads": heads}
