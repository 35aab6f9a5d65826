"""Input and result of a forward pass, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from keysift.attention import Coverage, Locality, Reads, Strategy
from keysift.kvcache import Phase, Span, Traffic

from ..scheduling.batch import Batch
from ..scheduling.sequence import Statistics
from .sampler import Sampled


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of a step: a token for each sampled sequence, and the statistics of each sequence of the batch."""

    sampled: list[Sampled]
    reads: list[Reads]
    coverage: list[Coverage]
    traffic: Traffic
    """Of all sequences together."""
    locality: list[Locality]

    def statistics(self, place: int) -> Statistics:
        """The share of the batch's sequence at this place."""
        shared = self.traffic // len(self.reads)
        return Statistics(self.reads[place], self.coverage[place], shared, self.locality[place])


@dataclass(frozen=True, slots=True)
class ForwardInput:
    """Input of one forward pass, as plain data: ranks exchange it."""

    phase: Phase
    strategy: Strategy
    spans: tuple[Span, ...]
    tokens: list[int]
    """Tokens of all spans, packed."""
    tokens_left: int
    """Tokens of the prompt after this chunk; 0 while decoding."""

    @classmethod
    def of(cls, batch: Batch) -> ForwardInput:
        """The input of a batch."""
        pairs = zip(batch.sequences, batch.spans, strict=True)
        tokens = [token for sequence, span in pairs for token in sequence.tokens[span.start : span.stop]]
        tokens_left = batch.sequences[0].prompt_len - batch.spans[0].stop
        return cls(batch.phase, batch.strategy, batch.spans, tokens, max(tokens_left, 0))
