"""What a strategy may look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .recent import Past, Recent, turns
from .selection import Selection
from .spec import CacheSpec
from .step import Step
from .tiers.base import Frames, Tier


class PageIndex(Protocol):
    """Answers where a query's attention goes, for all sequences of one cache."""

    estimates_mass: ClassVar[bool]
    """It knows every page, and estimates masses rather than bounds them: their shares tell a selection's coverage."""

    def masses(self, q: Tensor, context: Context) -> Tensor:
        """[R, Hq, F] fp32: natural log of each page's share of a query's attention, up to a factor per row and head.

        q [R, Hq, D], one query in each row of the step, whose keys are cached already. -inf: nothing worth reading was
        found there. Every page behind the last full one, the row's own, is known exactly or not at all.
        """

    def observe(self, q: Tensor, context: Context) -> None:
        """Note a step's queries [T, Hq, D] of one layer, once its keys are cached."""

    def forget(self, frames: Sequence[int]) -> None:
        """These frames are about to become full of other tokens; nothing that was known of their last ones counts."""


@dataclass(frozen=True, slots=True)
class Context:
    """One layer of the cache as this step sees it, the step's own keys and values included."""

    layer: int
    spec: CacheSpec
    step: Step
    tier: Tier
    index: PageIndex | None = None
    recent: Recent | None = None

    @property
    def num_pages(self) -> Tensor:
        """[R] int32, pages that each row may see."""
        return self.step.last_pages + 1

    def all(self) -> Selection:
        """Every page that each row may see."""
        return Selection.all(self.step, self.spec.num_kv_heads)

    def zones(self, *, sink: int, window: int) -> Selection:
        """The first `sink` tokens and every query's last `window`, in whole pages."""
        return Selection.zones(self.step, self.spec.num_kv_heads, sink=sink, window=window)

    def own_page(self) -> tuple[Tensor, Tensor]:
        """Keys [*, Hkv, S, D], and where in them the page of each row's last query is: [R, Hkv] int32."""
        return self.tier.own(self.layer, self.step)

    @property
    def estimates_mass(self) -> bool:
        """Shares of the index's masses are shares of attention, more or less."""
        return self.index is not None and self.index.estimates_mass

    def page_mass(self, q: Tensor) -> Tensor:
        """[R, Hq, F] fp32, log mass of each page by the index: see `PageIndex.masses`."""
        assert self.index is not None, "the strategy names an index"
        return self.index.masses(q, self)

    def summaries(self) -> Tensor:
        """[B, F, Hkv, 4, D]: mean, least and greatest key (after rotary embedding) and mean value of each page.

        Of each sequence in the step; a prompt chunk has one. Only pages that are full carry a summary; a row's last
        page, and what lies behind it, may hold anything.
        """
        table = self.step.table[: len(self.step.spans)].long()  # [B, Hkv, F]
        heads = torch.arange(self.spec.num_kv_heads, device=table.device)[:, None]
        return self.tier.summaries(self.layer)[table, heads].transpose(1, 2)

    def page_means(self) -> Frames:
        """Every page as one token, its mean key and its mean value; the same pages carry them as `summaries`."""
        means = self.tier.summaries(self.layer)[:, :, ::3]  # [N, Hkv, 2, D]
        return Frames(means[:, :, :1], means[:, :, 1:], self.step.table)

    def fetch(self, selection: Selection) -> Frames:
        """The selected pages where an op can read them, until the next fetch.

        Raises:
            OffloadError: the tier cannot have so many at hand at once; see `parts`.
        """
        return self.tier.resident(self.layer, selection, self.step)

    def parts(self, selection: Selection) -> Iterator[tuple[Selection, Frames]]:
        """The same, however much it is: disjoint parts one after the other, whose attention can be merged."""
        return self.tier.parts(self.layer, selection, self.step)

    def turns(self) -> list[list[int]]:
        """The rows of a decode step, one token of each sequence at a time: one list, but where some have several."""
        return turns(self.step)

    def previous(self, rows: Tensor | None = None) -> Past:
        """What `remember` kept of the tokens right before those of these rows [n], none: of all; if it did."""
        assert self.recent is not None
        return self.recent.previous(self.layer, self.step, rows)

    def remember(self, rows: Tensor | None, read: Tensor, averages: Tensor) -> None:
        """Keep pages [n, Hkv, F] and their averages for the tokens behind those of these rows [n], a turn's."""
        assert self.recent is not None
        self.recent.remember(self.layer, self.step, rows, read, averages)
