"""Per-sequence totals of reads, kept attention and page overlap, summed over layers and steps."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reads:
    """Reads of one sequence over its full-attention layers: (query, key) pairs, a mean over heads, and bytes."""

    chosen: float = 0.0
    possible: float = 0.0
    bytes: int = 0

    def __add__(self, other: Reads) -> Reads:
        return Reads(self.chosen + other.chosen, self.possible + other.possible, self.bytes + other.bytes)

    @property
    def density(self) -> float:
        """1.0 without any possible pair."""
        return self.chosen / self.possible if self.possible else 1.0


@dataclass(frozen=True, slots=True)
class Coverage:
    """Attention mass that one sequence's selections kept, over its full-attention layers; sums weigh by tokens.

    A layer that read everything kept everything. Layers, heads and the probes of a step count alike.
    """

    tokens: int = 0
    kept: float = 0.0
    """Mean kept share of each step, times its tokens; NaN after a selection that dropped unmeasured pages."""
    lowest: float = 1.0
    """Smallest measured share that one probe kept of one head's attention."""
    widened: float = 0.0
    """Share of the probes whose rows were widened for too low a coverage, times the tokens."""
    estimated: float = 0.0
    """Share of the attention that came from page means, times the tokens; the rest was dropped."""
    bound: float = 0.0
    """Upper bound of the dropped share, times the tokens; NaN after a selection that dropped unbounded pages."""
    chose: bool = False
    """Some layer's selection was not flagged `complete`, whatever it chose."""

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(
            self.tokens + other.tokens,
            self.kept + other.kept,
            min(self.lowest, other.lowest),
            self.widened + other.widened,
            self.estimated + other.estimated,
            self.bound + other.bound,
            self.chose or other.chose,
        )

    @property
    def mean(self) -> float | None:
        """Kept share; 1.0 without tokens, None if unknown."""
        return None if math.isnan(self.kept) else self.kept / self.tokens if self.tokens else 1.0

    @property
    def least(self) -> float | None:
        """Kept share of the one probe and head that lost most; None if unknown."""
        return None if math.isnan(self.kept) else self.lowest

    @property
    def widened_share(self) -> float:
        return self.widened / self.tokens if self.tokens else 0.0

    @property
    def estimated_share(self) -> float:
        return self.estimated / self.tokens if self.tokens else 0.0

    @property
    def dropped_bound(self) -> float | None:
        """Upper bound of the dropped share of attention, a mean over layers, heads and tokens; None if unknown."""
        return None if math.isnan(self.bound) else self.bound / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class Locality:
    """Overlap of one sequence's pages with those of the token before, summed over choices.

    A choice is one layer's and KV head's page list of one token; only those compared with the previous token's count.
    """

    choices: int = 0
    overlap: float = 0.0
    """Shares of the chosen pages that the previous token read, too."""
    bound_exceeded: float = 0.0
    """Choices that took in more pages than a locality bound allows."""

    def __add__(self, other: Locality) -> Locality:
        return Locality(
            self.choices + other.choices, self.overlap + other.overlap, self.bound_exceeded + other.bound_exceeded
        )

    @property
    def mean_overlap(self) -> float | None:
        """None without choices."""
        return self.overlap / self.choices if self.choices else None

    @property
    def bound_exceeded_share(self) -> float:
        return self.bound_exceeded / self.choices if self.choices else 0.0
