"""Keysift's own: every row of queries looked at, by a few exact queries and one cheap estimate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import Context

from .. import patterns, probe
from ..probe import Probe
from ..prompt import PromptStrategy
from ..strategy import Positive, Share, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Sift(PromptStrategy):
    """Every page that gives some query of the row `threshold` of its attention, as far as a few looks can tell.

    Published selections look at a chunk's last queries and lose the rows whose copies those never saw. This one looks
    at every row: `looks` of its queries exactly, and all of them, `group` at a time, through the means of the pages'
    keys. What a row reads follows from its own queries alone, whatever chunk it comes in. The looks cost ``looks / M``
    of the score half of dense attention, the estimate ``1 / (group * S)`` of it.
    """

    threshold: Share = 0.003
    """Largest share of a query's attention that a page may hold and be skipped, by what was seen. 0: nothing is."""
    looks: Positive = 4
    """Queries of each row whose attention is computed exactly, evenly spaced."""
    group: Positive = 8
    """Queries that share a mean in the estimate."""
    local: Tokens = 64
    coverage: Share = 0.8
    trust: Share = 0.7
    """Weight of an estimated share against an exact one: means of keys flatten the softmax and claim too much."""

    def choose(self, q: Tensor, context: Context) -> tuple[Tensor, Probe]:
        evidence = probe.take(q, context, probe.every_row(context.step, self.looks))
        guess = patterns.pooled(q, context, self.group)
        return torch.maximum(evidence.peak, guess * self.trust) >= self.threshold, evidence
