"""FlexPrefill: pattern and budget of each head, chosen by its last queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import Context, Step

from .. import patterns, probe
from ..probe import Probe
from ..prompt import SLACK, PromptStrategy
from ..strategy import Positive, Share, Tokens, option


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexPrefill(PromptStrategy):
    """Columns and diagonals that hold `gamma` of the last queries' attention, or, per row, of a pooled estimate.

    The last `block_size` queries of each chunk are the representatives. A head whose pooled estimate agrees with their
    exact attention (square root of the Jensen-Shannon divergence below `tau`) is query-aware: every row keeps the pages
    that hold `gamma` of its own estimate. Any other head is vertical-slash: all rows keep the columns, and the
    diagonals, that hold `gamma` of the representatives' attention.

    Other than the published code: mass is counted in the pages that are read, so every probe keeps `gamma`; a diagonal
    keeps every page that it crosses; query-aware rows each cover `gamma` for themselves; the model's scale is used
    throughout; a query-aware head that covers less than `gamma` of its representatives is vertical-slash too. The
    pattern follows from the end of each chunk, so results depend on the chunk size.
    """

    source = "Lai et al., FlexPrefill, arXiv 2502.20766"
    gamma: Share = option(0.95, "attention mass to keep; 1: everything")
    tau: Share = option(0.1, "largest divergence at which the pooled estimate is trusted; 0: never")
    min_budget: Tokens = option(1024, "tokens in columns, and in diagonals, that are kept at least, as published")
    block_size: Positive = option(
        64, "representative queries, at most a row's, and tokens of the blocks that columns and diagonals are chosen in"
    )

    def choose(self, q: Tensor, context: Context) -> tuple[Tensor, Probe]:
        step = context.step
        queries = probe.tails(step, min(self.block_size, step.queries_per_row))
        evidence = probe.take(q, context, queries, bands=True)
        assert evidence.bands is not None
        bands = self._cover(evidence.bands, step).any(0)  # [Hq, F]
        mask = self._cover(evidence.mass, step).any(0) | patterns.spread_bands(bands, step)
        trusted = self._divergence(_mean(q, queries), evidence, context) < self.tau  # [Hq]
        if not q.is_cuda and not trusted.any():  # on a GPU the host would wait for the answer
            return mask, evidence
        return self._query_aware(q, context, evidence, trusted, mask), evidence

    def _fill(self, mask: Tensor, evidence: Probe, step: Step) -> Tensor:
        return mask  # columns and diagonals have had their budgets

    def _cover(self, mass: Tensor, step: Step) -> Tensor:
        """Bool mask of the blocks of mass [..., F] that hold `gamma` of it."""
        unit = max(self.block_size // step.page_size, 1)
        return patterns.cover(mass, self.gamma, -(-self.min_budget // step.page_size), unit)

    def _divergence(self, representative: Tensor, evidence: Probe, context: Context) -> Tensor:
        """[Hq], between the representatives' attention to full pages and its estimate by their mean [1, Hq, D]."""
        step = context.step
        guess = patterns.estimate(representative, step.positions[-1:], context, queries_per_probe=1).mass[0]  # [Hq, F]
        full = (patterns.pages(step) + 1) * step.page_size <= step.lasts[-1] + 1
        true = evidence.columns * full
        return patterns.divergence(guess, true / true.sum(-1, keepdim=True).clamp(min=1e-30))

    def _query_aware(self, q: Tensor, context: Context, evidence: Probe, trusted: Tensor, slashes: Tensor) -> Tensor:
        """Mask [R, Hq, F]: the rows' own estimates for trusted heads that they cover, `slashes` for all others."""
        guess = self._cover(patterns.pooled(q, context, context.step.queries_per_row), context.step)
        guess = guess | patterns.zones(context.step, self.sink, self.local)[:, None]
        enough = (evidence.kept(guess) >= self.gamma - SLACK).all(0)  # [Hq]
        return torch.where((trusted & enough)[:, None], guess, slashes)


def _mean(q: Tensor, queries: Tensor) -> Tensor:
    """[1, Hq, D], mean of the queries at these indices [B, m], of which -1 are padding.

    By weights, as indexing with a mask would wait for the device.
    """
    valid = (queries >= 0).flatten()
    weights = valid / valid.sum()
    return torch.einsum("n,nhd->hd", weights, q[queries.clamp(min=0).flatten()].float())[None]
