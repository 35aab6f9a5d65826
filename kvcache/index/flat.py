"""The exact index: every key is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..ops.page_masses import page_masses
from .protocol import Stateless

if TYPE_CHECKING:
    from ..context import Context, Entries
    from ..spec import CacheSpec
    from .room import Room


@dataclass(frozen=True, slots=True)
class FlatIndex(Stateless):
    """Exact masses by all keys, the reference for the other indexes."""

    scans: ClassVar[bool] = True

    def make(self, spec: CacheSpec, room: Room, others: Iterable[Entries] = ()) -> FlatIndex:
        return self

    def masses(self, q: Tensor, context: Context) -> Tensor:
        frames = context.fetch(context.all())
        return page_masses(q, frames.k, frames.table, context.step.starts, scale=context.spec.softmax_scale)
