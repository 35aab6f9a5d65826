"""Interface of the cache to strategies and indexes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from .contents import Contents
from .ops.encode import Codes
from .recent import Past, Recent, turns
from .selection import Selection
from .spec import CacheSpec
from .step import Step
from .tiers.base import Frames, Tier


class Entries(Protocol):
    """Notes of indexes about the pages of sequences whose strategy names one of them.

    A method that raises leaves entries that are right, if fewer: the step that it belongs to fails, or runs again.
    """

    @property
    def bytes(self) -> int:
        """Bytes that the entries take, those that are being built included."""

    def observe(self, q: Tensor, context: Context, rows: Sequence[int]) -> None:
        """Learn from one layer of a step, queries [T, Hq, D], after its keys are cached.

        `rows`: numbers of the spans whose sequences named the index; the others are not to be looked at.
        """

    def known(self, pages: Sequence[Contents]) -> int:
        """Number of the first pages of a prompt, of these, of which it has all that keys do not tell."""

    def forget(self, frames: Set[int]) -> None:
        """Discard what was made from these frames' pages, which are about to become full of other tokens."""

    def claim(self, frames: Set[int]) -> None:
        """Discard all that belongs to these frames, which are about to hold pages of another sequence."""

    def clear(self) -> None:
        """Discard everything; no search follows."""


class PageIndex(Protocol):
    """Estimate of each page's share of a query's attention, for all sequences of one cache."""

    estimates_mass: ClassVar[bool]
    """It estimates the mass of every page rather than bounding it: shares of it give a selection's coverage."""

    def masses(self, q: Tensor, context: Context) -> Tensor:
        """[R, Hq, F] fp32: natural log of each page's share of a query's attention, up to a factor per row and head.

        q [R, Hq, D], one query in each row of the step, whose keys are cached already. -inf: the search found nothing
        in the page. The page after the last full one, the row's own, is known exactly or not at all.
        """

    @property
    def entries(self) -> Entries | None:
        """Notes that it searches, maybe shared with other indexes; None: nothing but pages, summaries and codes."""


@dataclass(frozen=True, slots=True)
class Described:
    """Summaries and codes of full pages, and the table of each row's pages in them."""

    summaries: Tensor
    """[N, Hkv, 4, D]: see `Tier.summaries`."""
    codes: Codes
    """See `Tier.codes`."""
    table: Tensor
    """[R, Hkv, F] int32, page -> place."""


@dataclass(frozen=True, slots=True)
class Context:
    """One layer of the cache in one step, the step's own keys and values included."""

    layer: int
    spec: CacheSpec
    step: Step
    tier: Tier
    index: PageIndex | None = None
    recent: Recent | None = None

    def all(self) -> Selection:
        """Every page that each row may see."""
        return Selection.all(self.step, self.spec.num_kv_heads)

    def zones(self, *, sink: int, window: int) -> Selection:
        """The first `sink` tokens and every query's last `window`, in whole pages."""
        return Selection.zones(self.step, self.spec.num_kv_heads, sink=sink, window=window)

    def own_page(self) -> tuple[Tensor, Tensor]:
        """Keys [*, Hkv, S, D], and the place in them of the page of each row's last query: [R, Hkv] int32."""
        return self.tier.own(self.layer, self.step)

    @property
    def estimates_mass(self) -> bool:
        """True if shares of the index's masses estimate shares of attention."""
        return self.index is not None and self.index.estimates_mass

    def page_mass(self, q: Tensor) -> Tensor:
        """[R, Hq, F] fp32, log mass of each page by the index: see `PageIndex.masses`."""
        assert self.index is not None, "the strategy names an index"
        return self.index.masses(q, self)

    def described(self) -> Described:
        """Summaries and codes of every page: of full pages, others may have any."""
        return Described(self.tier.summaries(self.layer), self.tier.codes(self.layer), self.step.table)

    def page_means(self) -> Frames:
        """Every page as one token, its mean key and its mean value: of full pages, others may hold anything."""
        means = self.tier.summaries(self.layer)[:, :, ::3]  # [N, Hkv, 2, D]
        return Frames(means[:, :, :1], means[:, :, 1:], self.step.table)

    def fetch(self, selection: Selection) -> Frames:
        """Make the selected pages readable by an op, until the next fetch.

        Raises:
            OffloadError: they are more than the tier can make readable at once; see `parts`.
        """
        return self.tier.resident(self.layer, selection, self.step)

    def parts(self, selection: Selection) -> Iterator[tuple[Selection, Frames]]:
        """Make the selected pages readable in disjoint parts, one after the other, whose attention can be merged."""
        return self.tier.parts(self.layer, selection, self.step)

    def turns(self) -> list[list[int]]:
        """Rows of a decode step in groups of one token of each sequence: one group, unless a sequence has several."""
        return turns(self.step)

    def previous(self, rows: Tensor | None = None) -> Past:
        """History of the tokens right before those of rows [n], None: of all rows. See `Recent`."""
        assert self.recent is not None
        return self.recent.previous(self.layer, self.step, rows)

    def remember(self, rows: Tensor | None, read: Tensor, averages: Tensor) -> None:
        """Record pages [n, Hkv, F] and their averages for the tokens after those of rows [n], of one turn."""
        assert self.recent is not None
        self.recent.remember(self.layer, self.step, rows, read, averages)
