"""MInference's vertical-slash pattern: fixed numbers of columns and diagonals, chosen by the last queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import Context

from .. import patterns, probe
from ..probe import Probe
from ..prompt import PromptStrategy
from ..strategy import Positive, Tokens, option

FIRST_COLUMNS = 30
"""Tokens at the start whose columns are always chosen."""
NEAREST_OFFSETS = 100
"""Distances from the query whose diagonals are always chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MInference(PromptStrategy):
    """As many columns and diagonals as fixed sizes allow, those that the last queries read most.

    The paper's vertical-slash pattern, with the sizes that its code falls back to; no released configuration has the
    block-sparse one. The first 30 columns and the last 100 offsets count into the sizes and are always in.

    Other than the published code: sizes are tokens but whole pages and bands of a page's width are chosen; a diagonal
    keeps every page that it crosses; all heads have the same sizes, where a search per model would give each head its
    own; a short last row is joined by the row before it, so a little more than `last_q` queries may be probed.
    """

    source = "Jiang et al., MInference 1.0, arXiv 2407.02490"
    vertical_size: Tokens = option(1000, "tokens in columns")
    slash_size: Tokens = option(6096, "tokens in diagonals: distances from the query")
    last_q: Positive = option(64, "last queries of the chunk that are probed, at most a row's")

    def choose(self, q: Tensor, context: Context) -> tuple[Tensor, Probe]:
        step = context.step
        queries = probe.tails(step, min(self.last_q, step.queries_per_row))
        evidence = probe.take(q, context, queries, bands=True)
        columns = _largest(evidence.columns, self.vertical_size, FIRST_COLUMNS, step.page_size)
        bands = _largest(evidence.diagonals, self.slash_size, NEAREST_OFFSETS, step.page_size)
        return columns | patterns.spread_bands(bands, step), evidence


def _largest(mass: Tensor, size: int, always: int, page_size: int) -> Tensor:
    """Bool mask of the greatest entries of mass [Hq, F], for `size` tokens, among them the first `always` tokens."""
    count, first = (-(-tokens // page_size) for tokens in (size, always))
    lifted = mass + (torch.arange(mass.shape[-1], device=mass.device) < first)  # no mass exceeds 1
    return patterns.cover(lifted, 0.0, max(count, first))
