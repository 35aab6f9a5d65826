"""What a perfect selector would choose: a yardstick, not a saving."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keysift.kvcache import Context

from .. import probe
from ..probe import Probe
from ..prompt import PromptStrategy
from ..strategy import Share


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle(PromptStrategy):
    """Every page that gives any query of the row `threshold` of its attention, by exact attention of every query.

    It computes everything to read little: for measuring how far a strategy is from the possible.
    """

    yardstick = True
    threshold: Share = 0.01
    """Share of a query's attention that makes its row keep a page."""

    def choose(self, q: Tensor, context: Context) -> tuple[Tensor, Probe]:
        evidence = probe.take(q, context, probe.every_row(context.step, context.step.queries_per_row))
        return evidence.peak >= self.threshold, evidence
