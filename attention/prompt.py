"""The base of every strategy that chooses what a prompt reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import Context, Phase, Selection, Step

from . import patterns, probe
from .probe import Probe
from .strategy import Dense, Share, Strategy, Tokens

SLACK = 1e-4
"""Coverage is a sum of many rounded shares; less than this below its target is not below it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptStrategy(Strategy):
    """Chooses pages for each row and query head of a prompt chunk; generated tokens read everything.

    A subclass says in `choose` which pages it wants and by which exact evidence. What is the same for all happens
    here: sinks, a local window, dense layers and dense last rows, and the coverage: the share of the evidence's
    attention that is kept is measured, reported, and, where it falls short of `coverage`, the rows behind it read
    everything.
    """

    dense_below: Tokens = 2048
    """A chunk runs dense unless queries x context exceeds the square of this: shorter prompts are not worth choosing
    for. `keysift doctor --calibrate` measures it."""
    sink: Tokens = 64
    """Tokens at the start that every query reads."""
    local: Tokens = 256
    """Last tokens that every query reads, itself included."""
    dense_layers: Tokens = 0
    """First layers that read everything."""
    last_rows_dense: Tokens = 1
    """Rows at the end of the prompt, 64 tokens each, that read everything: the question is often there."""
    coverage: Share = 0.0
    """Least share of a probe's attention to keep; rows whose probe keeps less read everything. 0: it is only told."""

    def choose(self, q: Tensor, context: Context) -> tuple[Tensor, Probe | None]:
        """Mask [R, Hq, F] of wanted pages, anything where the row sees nothing, and the probes that it came from.

        None: it came from no exact attention; one query of each row is probed then, to know the coverage.
        """
        raise NotImplementedError

    def prefill(self, q: Tensor, context: Context) -> Selection:
        if context.layer < self.dense_layers:
            return context.all()
        mask, evidence = self.choose(q, context)
        evidence = evidence or probe.take(q, context, probe.every_row(context.step, 1))
        mask = (mask | self._forced(context.step)[:, None]) & patterns.causal(context.step)[:, None]
        return self._settle(mask, evidence, context.step)

    def decode(self, q: Tensor, context: Context) -> Selection:
        return context.all()

    def part(self, phase: Phase) -> Strategy:
        return self if phase is Phase.PREFILL else Dense()

    def _forced(self, step: Step) -> Tensor:
        """[R, F] bool"""
        dense = max(self.last_rows_dense - step.rows_behind, 0)
        row = torch.arange(step.num_rows, device=step.starts.device)
        return patterns.zones(step, self.sink, self.local) | (row >= step.num_rows - dense)[:, None]

    def _settle(self, mask: Tensor, evidence: Probe, step: Step) -> Selection:
        kept = evidence.kept(mask)  # [B, Hq]
        short = kept < self.coverage - SLACK
        if self.coverage > 0:
            wide = evidence.spread(short, step.num_rows)[..., None]  # [R, Hq, 1]
            mask = mask | (wide & patterns.causal(step)[:, None])
            kept = kept.masked_fill(short, 1.0)
        return Selection.from_mask(mask, coverage=kept, widened=short)
