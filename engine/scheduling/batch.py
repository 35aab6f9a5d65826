"""The work of one step."""

from __future__ import annotations

from dataclasses import dataclass

from keysift.attention import Strategy
from keysift.kvcache import Phase, Span

from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """Work of one step: a chunk of one prompt, or one token of every sequence that decodes under one strategy."""

    phase: Phase
    strategy: Strategy
    sequences: tuple[Sequence, ...]
    spans: tuple[Span, ...]

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """Sequences whose last known token is in this batch, so that the step yields a new one."""
        pairs = zip(self.sequences, self.spans, strict=True)
        return tuple(sequence for sequence, span in pairs if span.stop == len(sequence.tokens))

    @property
    def title(self) -> str:
        """Description for error messages."""
        tokens, longest = sum(span.length for span in self.spans), max(span.stop for span in self.spans)
        return f"a {self.phase.value} step of {tokens} tokens, the longest context {longest}"

    def alone(self) -> list[Batch]:
        """The same work as batches of one sequence each."""
        pairs = zip(self.sequences, self.spans, strict=True)
        return [Batch(self.phase, self.strategy, (sequence,), (span,)) for sequence, span in pairs]
