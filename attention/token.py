"""Base class of strategies that select pages for generated tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from keysift.kvcache import Context, Evidence, Phase, Selection, Step

from . import estimates
from .laws import check_masses
from .ops.top_pages import top_pages
from .strategy import Count, Dense, Positive, Share, Strategy, Tokens, option


class Zones(NamedTuple):
    """Sinks and windows of a step, in pages."""

    firsts: Tensor
    """[R] int32, first page of each row's window."""
    sinks: int
    window: int
    """Most pages from the first of a row's window to its last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStrategy(Strategy, ABC):
    """Chooses pages for one token of each sequence, one list for each KV head; prompts read everything.

    A subclass returns from `masses` how much each page weighs. What all share happens here: sinks, a window, dense
    layers, the budget, and how much of it is needed.
    """

    removed: ClassVar[Mapping[str, str]] = {
        "tail": "pages that are not read are dropped, as letting their means stand in lost more on every text; a lower "
        "epsilon reads more",
    }
    dense_below: Tokens = option(2048, "tokens of a context up to which everything is read, faster than choosing")
    sink: Tokens = option(64, "tokens at the start that every token reads")
    window: Positive = option(256, "last tokens that every token reads, itself included")
    budget: Tokens = option(1024, "most tokens to read besides, in whole pages")
    epsilon: Share = option(0.075, "share of the attention to do without, so that fewer pages do; 0: the whole budget")
    certify: bool = option(False, "report the most attention that dropped pages can hold; costs a look at all bounds")
    dense_layers: Count = option(0, "first layers that read everything")

    @abstractmethod
    def masses(self, q: Tensor, context: Context) -> Tensor:
        """[R, Hq, F], log mass of each page for queries q [R, Hq, D], one in each row: see `PageIndex.masses`."""

    def prefill(self, q: Tensor, context: Context) -> Selection:
        return context.all()

    def decode(self, q: Tensor, context: Context) -> Selection:
        if context.layer < self.dense_layers:
            return context.all()
        check_masses(masses := self.masses(q, context), q, context)
        selection = self.choose(masses, context)
        if self.certify:
            selection = self._certified(q, context, selection)
        return (
            replace(selection, prefetch=nearly(masses, selection, context))
            if context.tier.prefetch_pages
            else selection
        )

    def choose(self, masses: Tensor, context: Context) -> Selection:
        """The selection by masses [R, Hq, F]: zones, and the heaviest pages until `epsilon` is left."""
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
        """Sinks and window of each row, in pages."""
        window = min(self.window, step.max_pages * step.page_size)  # positions are int32
        firsts = (step.starts - window + 1).clamp(min=0) // step.page_size
        return Zones(firsts, -(-self.sink // step.page_size), (window - 2) // step.page_size + 2)

    def _certified(self, q: Tensor, context: Context, selection: Selection) -> Selection:
        """The selection with a bound on the mass of the pages that are neither read nor estimated."""
        mask = selection.mask(context.step.max_pages)
        if selection.estimated is not None:
            mask = mask | Selection(selection.estimated).mask(context.step.max_pages)
        evidence = replace(selection.evidence, dropped_bound=estimates.bound(q, context, mask))
        return replace(selection, evidence=evidence)

    @property
    def scans(self) -> bool:
        spec = self.index_spec()
        return spec is not None and spec.scans

    def part(self, phase: Phase) -> Strategy:
        return self if phase is Phase.DECODE else Dense()


def nearly(masses: Tensor, selection: Selection, context: Context) -> Tensor:
    """[R, H, P] int32, the heaviest pages outside the selection, by masses [R, Hq, F]: see `Selection.prefetch`."""
    heads, count = selection.pages.shape[1], min(context.tier.prefetch_pages, masses.shape[2])
    shares = torch.unflatten(masses.softmax(-1).nan_to_num(0.0), 1, (heads, -1)).mean(2)  # [R, H, F]
    shares = shares.masked_fill(selection.mask(masses.shape[2]), 0.0)
    best = shares.topk(count)
    return Selection.from_mask(
        torch.zeros_like(shares, dtype=torch.bool).scatter(2, best.indices, best.values > 0)
    ).pages[..., :count]


def check_index_options(strategy: Strategy, index: str, acts_with: Mapping[str, str]) -> None:
    """Raises `ValueError` for an option that was set and acts with another index only; `acts_with` names that."""
    for field in fields(strategy):
        needed, value = acts_with.get(field.name, index), getattr(strategy, field.name)
        if needed != index and value != field.default:
            raise ValueError(f"{field.name}: acts with index={needed} only, got {value!r} with index={index}")
