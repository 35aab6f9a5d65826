"""The base class of every strategy: dense attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keysift.kvcache import Context, Phase, Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """Chooses the pages that each row of queries reads. This base chooses all of them: dense attention.

    A strategy is frozen and holds no state of any sequence; its fields are its options. A subclass states only what it
    does differently. Whatever it chooses must be ascending, unique and causal, and must contain the row's own pages.
    """

    dense_below: int = 0
    """Tokens of context up to which this strategy reads everything."""

    def prefill(self, q: Tensor, context: Context) -> Selection:
        """Pages for the rows of one prompt chunk, q [T, Hq, D] after rotary embedding."""
        return context.all()

    def decode(self, q: Tensor, context: Context) -> Selection:
        """Pages for one token of each sequence, q [B, Hq, D]; by default as for a prompt."""
        return self.prefill(q, context)

    def part(self, phase: Phase) -> Strategy:
        """The strategy that is responsible for a phase."""
        return self

    def at(self, phase: Phase, context_len: int) -> Strategy:
        """What runs for this many tokens of context: the part for the phase, or `Dense` below its crossover."""
        part = self.part(phase)
        return part if context_len > part.dense_below else Dense()

    @property
    def name(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense(Strategy):
    """Every page: exact attention, the reference of all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split(Strategy):
    """One strategy for the prompt, another for the generated tokens."""

    prompt: Strategy
    token: Strategy

    def prefill(self, q: Tensor, context: Context) -> Selection:
        return self.prompt.prefill(q, context)

    def decode(self, q: Tensor, context: Context) -> Selection:
        return self.token.decode(q, context)

    def part(self, phase: Phase) -> Strategy:
        return self.prompt if phase is Phase.PREFILL else self.token

    @property
    def name(self) -> str:
        return f"{self.prompt.name}+{self.token.name}"
