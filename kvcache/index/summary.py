"""Indexes that read page summaries only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..ops.page_masses import page_bounds, page_masses
from .protocol import Stateless

if TYPE_CHECKING:
    from ..context import Context, Entries
    from ..spec import CacheSpec
    from .room import Room


@dataclass(frozen=True, slots=True)
class BoundIndex(Stateless):
    """Upper bounds of page masses, from the least and the greatest key in each channel."""

    estimates_mass: ClassVar[bool] = False

    def make(self, spec: CacheSpec, room: Room, others: Iterable[Entries] = ()) -> BoundIndex:
        return self

    def masses(self, q: Tensor, context: Context) -> Tensor:
        described, scale = context.described(), context.spec.softmax_scale
        return page_bounds(
            q, *context.own_page(), described.summaries, described.table, context.step.starts, scale=scale
        )


@dataclass(frozen=True, slots=True)
class MeanIndex(Stateless):
    """Masses by the mean key of each page, insensitive to a single key among others; -inf for the row's own page."""

    estimates_mass: ClassVar[bool] = False

    def make(self, spec: CacheSpec, room: Room, others: Iterable[Entries] = ()) -> MeanIndex:
        return self

    def masses(self, q: Tensor, context: Context) -> Tensor:
        means, step = context.page_means(), context.step
        masses = page_masses(q, means.k, means.table, step.last_pages - 1, scale=context.spec.softmax_scale)
        return masses + math.log(context.spec.page_size)
