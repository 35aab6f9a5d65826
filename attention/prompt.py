"""Base class of strategies that select pages for prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import Context, Evidence, Phase, Selection, Step

from . import patterns, probe
from .probe import Probe
from .strategy import Count, Dense, Share, Strategy, Tokens, option

SLACK = 1e-4
"""Tolerance of a coverage target: coverage is a sum of many rounded shares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptStrategy(Strategy, ABC):
    """Chooses pages for each row and query head of a prompt chunk; generated tokens read everything.

    A subclass returns from `choose` the pages that it wants and the exact evidence for them. What all share happens
    here: sinks, a local window, dense layers, dense last rows, and coverage. The share of the evidence's attention that
    is kept is measured and reported; where it is less than `coverage`, the rows of that probe read more. Methods whose
    publication promises no coverage have no target by default.

    The default of `dense_below` is measured, as `keysift calibrate` does: on two cores of an AMD EPYC with
    chunks of 1,024 (2026-11-22, table in benchmarks/README.md) sift, sampleattention and xattention are faster than
    dense from a context of 2,048 on, flexprefill from 3,072.
    """

    dense_below: Tokens = option(
        1536,
        "tokens of a prompt up to which everything is read, faster than choosing; a chunk of N queries of a longer one "
        "is sparse once its context exceeds dense_below^2 / N, by default 2,304 tokens for chunks of 1,024",
    )
    sink: Tokens = option(64, "tokens at the start that every query reads")
    local: Tokens = option(256, "last tokens that every query reads, itself included")
    min_budget: Tokens = option(0, "tokens that each row and head keeps at least, those that its probe reads most")
    dense_layers: Count = option(0, "first layers that read everything")
    last_rows_dense: Count = option(1, "rows at the end of the prompt that read everything: a question is often there")
    coverage: Share = option(0.0, "share of a probe's attention to keep, else its rows read more; 0: only reported")

    @abstractmethod
    def choose(self, q: Tensor, context: Context) -> tuple[Tensor, Probe | None]:
        """Mask [R, Hq, F] of wanted pages, arbitrary in a row's future, and the probes that it was made from.

        None: it was made from no exact attention; one query of each row is then probed, for the coverage.
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
        """The mask and at least `min_budget` tokens, those that the probes read most."""
        if self.min_budget == 0:
            return mask
        best = patterns.cover(evidence.mass, 0.0, -(-self.min_budget // step.page_size))
        return mask | evidence.to_rows(best, step.num_rows)

    def _widen(self, mask: Tensor, evidence: Probe, causal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Widen the rows whose probe keeps less than `coverage`.

        Returns the mask, the share that each probe keeps of its attention, and which probes were short of the target,
        both [B, Hq]. Dense last rows are left out of account: their probe stands for the rows before them too.
        """
        kept = evidence.kept(mask)  # [B, Hq]
        short = kept < self.coverage - SLACK
        if self.coverage == 0:
            return mask, kept, short
        more = patterns.level(evidence.mass, self.coverage) & short[..., None]  # [B, Hq, F]
        mask = mask | (evidence.to_rows(more, mask.shape[0]) & causal)
        return mask, evidence.kept(mask), short

    def _dense_rows(self, step: Step) -> Tensor:
        """[R, 1, 1] bool, the rows among the prompt's last `last_rows_dense`."""
        row = torch.arange(step.num_rows, device=step.starts.device)
        return (row >= step.num_rows + min(step.rows_left - self.last_rows_dense, 0))[:, None, None]
