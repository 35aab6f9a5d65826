"""Page selections: the pages that each row and head of a step reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .step import Step


@dataclass(frozen=True, slots=True)
class Evidence:
    """Measurements of a selection, read by telemetry alone; None: not measured.

    A decode step has one probe for each row, a prompt chunk as many as the strategy takes.
    """

    coverage: Tensor | None = None
    """[B, Hq] fp32, share of each probe's attention that the chosen pages hold."""
    widened: Tensor | None = None
    """[B, Hq] bool, probes whose rows read more pages than the strategy chose, as the coverage was below its target."""
    dropped_bound: Tensor | None = None
    """[R, Hq] fp32, upper bound of the log mass of dropped pages, which are neither chosen nor estimated."""
    overlap: Tensor | None = None
    """[R, Hkv] fp32, share of the chosen pages that the previous token read, too; NaN: its pages are unknown."""
    bound_exceeded: Tensor | None = None
    """[R, Hkv] bool, lists that took in more pages than the strategy's locality bound allows."""


UNMEASURED = Evidence()


@dataclass(frozen=True, slots=True)
class Selection:
    """Ascending, unique page numbers per row and head; the row's own pages are always among them."""

    pages: Tensor
    """[R, H, P] int32, page numbers of the row's sequence, -1 pads the end; the head axis may have stride 0."""
    complete: bool = False
    """Every page that a row may see is chosen, as far as the host knows without counting."""
    estimated: Tensor | None = None
    """[R, H, P] int32, padded as `pages`: full pages besides these, approximated by mean key and mean value."""
    prefetch: Tensor | None = None
    """[R, H, P] int32, padded as `pages`: the best pages that were not chosen, likely candidates of the next token."""
    evidence: Evidence = UNMEASURED

    @classmethod
    def all(cls, step: Step, heads: int) -> Selection:
        """Every page up to each row's own."""
        every = torch.arange(step.max_pages, dtype=torch.int32, device=step.starts.device)
        pages = every.masked_fill(every > step.last_pages[:, None], -1)  # [R, F]
        return cls(pages[:, None].expand(-1, heads, -1), complete=True)

    @classmethod
    def own(cls, step: Step, heads: int) -> Selection:
        """The page of each row's last query alone."""
        return cls(step.last_pages[:, None, None].expand(-1, heads, 1))

    @classmethod
    def zones(cls, step: Step, heads: int, *, sink: int, window: int) -> Selection:
        """The first `sink` tokens and, for every query of the row, the last `window`, rounded out to whole pages."""
        page_size = step.page_size
        window = min(window, step.max_pages * page_size)  # positions are int32
        sinks = min(-(-sink // page_size), step.max_pages)
        width = min((window + step.queries_per_row - 2) // page_size + 2, step.max_pages)
        first = ((step.starts - window + 1).clamp(min=0) // page_size).clamp(min=sinks)  # [R]
        offsets = torch.arange(sinks + width, dtype=torch.int32, device=first.device)
        pages = torch.where(offsets < sinks, offsets, first[:, None] + (offsets - sinks))  # [R, P]
        pages = pages.masked_fill(pages > step.last_pages[:, None], -1)
        return cls(pages[:, None].expand(-1, heads, -1))

    @classmethod
    def from_mask(cls, mask: Tensor, evidence: Evidence = UNMEASURED) -> Selection:
        """The true pages of mask [R, H, F]."""
        width = mask.shape[-1]
        every = torch.arange(width, dtype=torch.int32, device=mask.device)
        targets = (mask.cumsum(-1) - 1).masked_fill_(~mask, width)  # false pages share one slot after the end
        pages = torch.full((*mask.shape[:-1], width + 1), -1, dtype=torch.int32, device=mask.device)
        pages.scatter_(-1, targets, every.expand(mask.shape))
        return cls(pages[..., :width], evidence=evidence)

    def mask(self, max_pages: int) -> Tensor:
        """[R, H, F] bool, true for chosen pages."""
        rows, heads, _ = self.pages.shape
        mask = torch.zeros(rows, heads, max_pages + 1, dtype=torch.bool, device=self.pages.device)
        return mask.scatter_(-1, self.pages.long() % (max_pages + 1), True)[..., :max_pages]

    def counts(self) -> Tensor:
        """[R, H] int64, number of chosen pages."""
        return (self.pages >= 0).sum(-1)

    def frames(self, step: Step) -> Tensor:
        """[n] int32, ascending and unique frames of all chosen pages; heads share the table; waits for the device."""
        pages = self.pages.flatten(1)
        frames = step.table[:, 0].gather(1, pages.clamp(min=0).long())
        unique: Tensor = frames[pages >= 0].unique()  # type: ignore[no-untyped-call]
        return unique

    def density(self, step: Step) -> Tensor:
        """[R, H] fp32, chosen share of the (query, key) pairs that causality allows each row."""
        chosen, causal = pairs(step, self.counts())
        return (chosen / causal[:, None]).float()


def pairs(step: Step, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of (query, key) pairs, float64: chosen [..., R, H] for page counts [..., R, H], and causal [R].

    A row's own pages are always chosen, so all of its triangle is, and every other chosen page counts in full.
    """
    starts = step.starts.double()
    queries = (step.lasts - step.starts + 1).double()
    causal = queries * starts + queries * (queries + 1) / 2
    first_own = (step.starts // step.page_size).double()
    own_before = starts - first_own * step.page_size  # tokens of the row's first own page that precede the row
    own_pages = step.last_pages.double() - first_own + 1
    triangle = queries * own_before + queries * (queries + 1) / 2
    chosen = (counts.double() - own_pages[:, None]) * step.page_size * queries[:, None] + triangle[:, None]
    return chosen, causal
