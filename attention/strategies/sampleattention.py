"""SampleAttention: columns by a sample of the prompt's queries, and a window that grows with the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from keysift.kvcache import Context, Step

from .. import patterns, probe
from ..probe import Probe
from ..prompt import PromptStrategy
from ..strategy import Share, option


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleAttention(PromptStrategy):
    """Columns that hold `alpha` of a sample of queries' attention, and a window that grows with the context.

    A share `row_ratio` of the chunk's queries is computed exactly. Each head keeps the columns that hold `alpha` of
    their summed attention, for all rows, and every row the last `window_ratio` of its own context. No code was
    published.

    Other than the papers: masses are counted in pages, the unit that is read; sinks are kept always, not left to the
    sample; the window is never shorter than `local`; each chunk takes a sample of its own. A window of 8 % loses what
    was copied from a little further back; benchmarks/README.md compares it with one of 25 %.
    """

    source = "Zhu et al., SampleAttention, arXiv 2406.15486 and MLSys 2025"
    alpha: Share = option(0.95, "attention mass of the sample to keep in columns; 1: everything")
    slash_alpha: Share = option(
        0.0, "attention mass to keep in diagonals too, as in the later version; 0: columns only"
    )
    window_ratio: Share = option(0.08, "window of each row, as a share of its own context; 0.25 where quality counts")
    row_ratio: Annotated[float, Field(ge=1e-6, le=1.0)] = option(
        0.05, "share of the queries that are computed exactly, rounded to one of every so many"
    )
    sampling: Literal["stride", "tail"] = option(
        "stride",
        "sample by absolute position, and the chunk's end: every (1 / row_ratio)-th query, or the last row of every "
        "1 / row_ratio rows",
    )

    def choose(self, q: Tensor, context: Context) -> tuple[Tensor, Probe]:
        step = context.step
        evidence = probe.take(q, context, self._sample(step), bands=self.slash_alpha > 0)
        mask = patterns.cover(evidence.columns, self.alpha) | self._window(step)[:, None]  # [R, Hq, F]
        if self.slash_alpha > 0:
            mask = mask | patterns.spread_bands(patterns.cover(evidence.diagonals, self.slash_alpha), step)
        return mask, evidence

    def _sample(self, step: Step) -> Tensor:
        """[B, m] int64, indices of the sampled queries in the chunk, one line a probe; -1 is padding."""
        every = round(1 / self.row_ratio)
        if self.sampling == "stride":
            return strided(step, every)
        return probe.tails(step, step.queries_per_row, every * step.queries_per_row)

    def _window(self, step: Step) -> Tensor:
        """[R, F] bool, the last `window_ratio` of each row's context."""
        tokens = ((step.lasts + 1).double() * self.window_ratio).ceil().int()  # [R]
        return patterns.zones(step, 0, tokens)


def strided(step: Step, every: int) -> Tensor:
    """[B, m]: the last of every `every` tokens, by absolute position, and the chunk's last one; -1 pads the end.

    One probe for each row that has such a query. Computed from host integers, so nothing waits for the device.
    """
    width, tokens = step.queries_per_row, step.positions.shape[0]
    first = (-step.spans[0].start - 1) % every
    picks = sorted({*range(first, tokens, every), tokens - 1})
    rows: dict[int, list[int]] = {}
    for pick in picks:
        rows.setdefault(pick // width, []).append(pick)
    most = max(map(len, rows.values()))
    padded = [row + [-1] * (most - len(row)) for row in rows.values()]
    return probe.on_device(padded, step)
