"""Oracle: pages by exact attention of every query, a yardstick for prompt strategies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keysift.kvcache import Context

from .. import probe
from ..probe import Probe
from ..prompt import PromptStrategy
from ..strategy import Share, option


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle(PromptStrategy):
    """Every page that gives any query of the row `threshold` of its attention, by exact attention of every query.

    Slower than dense, as every score is computed first: for measuring how far a strategy is from the best selection.
    """

    yardstick = True
    threshold: Share = option(0.01, "share of a query's attention that makes its row keep a page")

    def choose(self, q: Tensor, context: Context) -> tuple[Tensor, Probe]:
        evidence = probe.take(q, context, probe.every_row(context.step, context.step.queries_per_row))
        return evidence.peak >= self.threshold, evidence
