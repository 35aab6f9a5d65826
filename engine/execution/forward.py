"""What goes into a forward pass, and what comes out of it, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from keysift.attention import Coverage, Locality, Reads, Strategy
from keysift.kvcache import Phase, Span, Traffic

from ..scheduling.scheduler import Batch
from .sampler import Sampled


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought: one token for each sampled sequence, and what each sequence of the batch read and kept."""

    sampled: list[Sampled]
    reads: list[Reads]
    coverage: list[Coverage]
    traffic: Traffic
    locality: list[Locality]


@dataclass(frozen=True, slots=True)
class ForwardInput:
    """The work of one forward pass, as plain data."""

    phase: Phase
    strategy: Strategy
    spans: tuple[Span, ...]
    tokens: list[int]
    """Of all spans, packed."""
    tokens_left: int
    """Tokens of the prompt that come later."""

    @classmethod
    def of(cls, batch: Batch) -> ForwardInput:
        pairs = zip(batch.sequences, batch.spans, strict=True)
        tokens = [token for sequence, span in pairs for token in sequence.tokens[span.start : span.stop]]
        tokens_left = batch.sequences[0].prompt_len - batch.spans[0].stop
        return cls(batch.phase, batch.strategy, batch.spans, tokens, max(tokens_left, 0))
