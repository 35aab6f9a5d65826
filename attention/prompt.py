"""The base of every strategy that chooses what a prompt reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import Context, Evidence, Phase, Selection, Step

from . import patterns, probe
from .probe import Probe
from .strategy import Count, Dense, Share, Strategy, Tokens

SLACK = 1e-4
"""Coverage is a sum of many rounded shares; less than this below its target is not below it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptStrategy(Strategy, ABC):
    """Chooses pages for each row and query head of a prompt chunk; generated tokens read everything.

    A subclass says in `choose` which pages it wants and by which exact evidence. What is the same for all happens
    here: sinks, a local window, dense layers and dense last rows, and the coverage: the share of the evidence's
    attention that is kept is measured, reported, and, where it falls short of `coverage`, the rows behind it read
    more. Methods whose publication promises no coverage have no target by default.
    """

    dense_below: Tokens = 1536
    """A chunk of Nq queries is sparse when its context exceeds dense_below**2 / Nq: 2,304 tokens for chunks of 1,024.

    `keysift doctor --calibrate` measures it; on two cores of an AMD EPYC with chunks of 1,024 (2026-11-22, table in
    benchmarks/README.md) sift, sampleattention and xattention win from a context of 2,048 on, flexprefill from 3,072.
    """
    sink: Tokens = 64
    """Tokens at the start that every query reads."""
    local: Tokens = 256
    """Last tokens that every query reads, itself included."""
    min_budget: Tokens = 0
    """Tokens that are kept at least, by head: those that a row's probe reads most, as far as the row may see them."""
    dense_layers: Count = 0
    """First layers that read everything."""
    last_rows_dense: Count = 1
    """Rows of queries at the end of the prompt that read everything: the question is often there."""
    coverage: Share = 0.0
    """Least share of a probe's attention to keep; rows whose probe keeps less read more. 0: it is only told."""

    @abstractmethod
    def choose(self, q: Tensor, context: Context) -> tuple[Tensor, Probe | None]:
        """Mask [R, Hq, F] of wanted pages, anything where the row sees nothing, and the probes that it came from.

        None: it came from no exact attention; one query of each row is probed then, to know the coverage.
        """

    def prefill(self, q: Tensor, context: Context) -> Selection:
        if context.layer < self.dense_layers:
            return context.all()
        step, causal = context.step, patterns.causal(context.step)[:, None]
        mask, evidence = self.choose(q, context)
        evidence = evidence or probe.take(q, context, probe.every_row(step, 1))
        mask = (self._fill(mask, evidence, step) | patterns.zones(step, self.sink, self.local)[:, None]) & causal
        mask, kept, short = self._widen(mask, evidence, causal)
        return Selection.from_mask(mask | (self._dense_rows(step) & causal), Evidence(coverage=kept, widened=short))

    def decode(self, q: Tensor, context: Context) -> Selection:
        return context.all()

    def part(self, phase: Phase) -> Strategy:
        return self if phase is Phase.PREFILL else Dense()

    @property
    def scans(self) -> bool:
        return True

    @property
    def rows_at_the_end(self) -> int:
        return self.last_rows_dense

    def _fill(self, mask: Tensor, evidence: Probe, step: Step) -> Tensor:
        """The mask with at least `min_budget` tokens of what the probes read most."""
        if self.min_budget == 0:
            return mask
        best = patterns.cover(evidence.mass, 0.0, -(-self.min_budget // step.page_size))
        return mask | evidence.to_rows(best, step.num_rows)

    def _widen(self, mask: Tensor, evidence: Probe, causal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mask, wider for rows whose probe keeps too little; what each probe keeps then, and which were widened.

        Rows that are dense because they are the last do not count: their probe stands for the rows before it, too.
        """
        kept = evidence.kept(mask)  # [B, Hq]
        short = kept < self.coverage - SLACK
        if self.coverage == 0:
            return mask, kept, short
        more = patterns.level(evidence.mass, self.coverage) & short[..., None]  # [B, Hq, F]
        mask = mask | (evidence.to_rows(more, mask.shape[0]) & causal)
        return mask, evidence.kept(mask), short

    def _dense_rows(self, step: Step) -> Tensor:
        """[R, 1, 1] bool, rows at the end of the prompt that read everything."""
        row = torch.arange(step.num_rows, device=step.starts.device)
        return (row >= step.num_rows + min(step.rows_left - self.last_rows_dense, 0))[:, None, None]
