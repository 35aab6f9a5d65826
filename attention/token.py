"""The base of every strategy that chooses what a generated token reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from keysift.kvcache import Context, Evidence, Phase, Selection, Step

from . import estimates, patterns
from .ops.top_pages import top_pages
from .strategy import Count, Dense, Positive, Share, Strategy, Tokens


class Zones(NamedTuple):
    """Pages that every token of a step reads."""

    firsts: Tensor
    """[R] int32, first page of each row's window."""
    sinks: int
    window: int
    """The most pages from a row's first to its last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStrategy(Strategy, ABC):
    """Chooses pages for one token of each sequence, one list for each KV head; prompts read everything.

    A subclass says in `masses` how much each page weighs. What is the same for all happens here: sinks and a window,
    the budget, and how much of it is needed.
    """

    dense_below: Tokens = 2048
    sink: Tokens = 64
    """Tokens at the start that every token reads."""
    window: Positive = 256
    """Last tokens that every token reads, itself included."""
    budget: Tokens = 1024
    """Most tokens to read besides, in whole pages."""
    epsilon: Share = 0.075
    """Share of the attention that may be left out: fewer pages are read where they hold enough. 0: the whole budget."""
    tail: Literal["drop", "mean"] = "drop"
    """Pages that are not read: dropped, or standing in by their mean key and mean value."""
    certify: bool = False
    """Tell the most attention that dropped pages can hold, by the bounds of their keys; costs a look at all of them."""
    dense_layers: Count = 0
    """First layers that read everything."""

    @abstractmethod
    def masses(self, q: Tensor, context: Context) -> Tensor:
        """[R, Hq, F] log mass of each page for queries q [R, Hq, D], one in each row: see `PageIndex.masses`."""

    def prefill(self, q: Tensor, context: Context) -> Selection:
        return context.all()

    def decode(self, q: Tensor, context: Context) -> Selection:
        if context.layer < self.dense_layers:
            return context.all()
        masses = self.masses(q, context)
        selection = self._account(q, context, self.choose(masses, context))
        return (
            replace(selection, prefetch=nearly(masses, selection, context))
            if context.tier.prefetch_pages
            else selection
        )

    def choose(self, masses: Tensor, context: Context) -> Selection:
        """The pages that a token reads, by their masses [R, Hq, F]."""
        zones = self.zones(context.step)
        chosen = top_pages(
            masses,
            zones.firsts,
            context.step.last_pages,
            heads=context.spec.num_kv_heads,
            sinks=zones.sinks,
            window=zones.window,
            budget=self.budget // context.step.page_size,
            epsilon=self.epsilon,
        )
        evidence = Evidence(coverage=chosen.kept if context.estimates_mass else None)
        return Selection(chosen.pages, evidence=evidence)

    def zones(self, step: Step) -> Zones:
        """What every token reads, in pages."""
        window = min(self.window, step.max_pages * step.page_size)  # positions are int32
        firsts = (step.starts - window + 1).clamp(min=0) // step.page_size
        return Zones(firsts, -(-self.sink // step.page_size), (window - 2) // step.page_size + 2)

    def _account(self, q: Tensor, context: Context, selection: Selection) -> Selection:
        """The selection, and what becomes of the pages outside it."""
        if self.tail == "drop" and not self.certify:
            return selection
        mask = selection.mask(context.step.max_pages)
        if self.tail == "mean":
            rest = ~mask & (patterns.pages(context.step) < context.step.last_pages[:, None])[:, None]
            return replace(selection, estimated=Selection.from_mask(rest).pages)
        if selection.estimated is not None:
            mask = mask | Selection(selection.estimated).mask(context.step.max_pages)
        evidence = replace(selection.evidence, dropped_bound=estimates.bound(q, context, mask))
        return replace(selection, evidence=evidence)

    @property
    def scans(self) -> bool:
        which = self.index_spec()
        return which is not None and which.scans

    def part(self, phase: Phase) -> Strategy:
        return self if phase is Phase.DECODE else Dense()


def nearly(masses: Tensor, selection: Selection, context: Context) -> Tensor:
    """[R, H, P] int32, the heaviest pages that were not chosen, by masses [R, Hq, F]: see `Selection.prefetch`."""
    heads, count = selection.pages.shape[1], min(context.tier.prefetch_pages, masses.shape[2])
    shares = torch.unflatten(masses.softmax(-1).nan_to_num(0.0), 1, (heads, -1)).mean(2)  # [R, H, F]
    shares = shares.masked_fill(selection.mask(masses.shape[2]), 0.0)
    best = shares.topk(count)
    return Selection.from_mask(
        torch.zeros_like(shares, dtype=torch.bool).scatter(2, best.indices, best.values > 0)
    ).pages[..., :count]
