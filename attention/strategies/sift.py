"""Sift: pages by a few exact queries of every row and a pooled estimate of all; a method of this project."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import Context

from .. import patterns, probe
from ..probe import Probe
from ..prompt import PromptStrategy
from ..strategy import Positive, Share, Tokens, option


@dataclass(frozen=True, slots=True, kw_only=True)
class Sift(PromptStrategy):
    """Every page that gives some query of the row `threshold` of its attention, by a few exact queries and an estimate.

    Published selections probe a chunk's last queries and lose pages that only earlier rows read. This one probes every
    row: `looks` of its queries exactly, and all of them, `group` at a time, over the means of the pages' keys. A row's
    selection depends on its own queries alone, whatever chunk it is in. The exact queries cost ``looks / M`` of the
    score half of dense attention, the estimate ``1 / (group * S)`` of it.
    """

    threshold: Share = option(0.003, "share of a query's attention, by probe or estimate, from which a page is read")
    looks: Positive = option(4, "queries of each row whose attention is computed exactly, evenly spaced")
    group: Positive = option(8, "queries that share a mean in the estimate")
    local: Tokens = 64
    coverage: Share = 0.8
    trust: Share = option(0.7, "weight of estimated shares, which are too high: mean keys flatten the softmax")

    def choose(self, q: Tensor, context: Context) -> tuple[Tensor, Probe]:
        evidence = probe.take(q, context, probe.every_row(context.step, self.looks))
        guess = patterns.pooled(q, context, self.group)
        return torch.maximum(evidence.peak, guess * self.trust) >= self.threshold, evidence
