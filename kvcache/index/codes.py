"""An index of quantised keys: page bounds choose the pages whose codes are scanned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..ops.page_masses import code_masses
from .protocol import Stateless

if TYPE_CHECKING:
    from ..context import Context, Entries
    from ..spec import CacheSpec
    from .room import Room


@dataclass(frozen=True, slots=True)
class CodeIndex(Stateless):
    """Masses by the codes of the most promising pages, which the bounds of all pages choose: see `Codes`."""

    candidates: int = 512
    """Pages of each KV head whose codes are read."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for a number out of range."""
        if not 0 <= self.candidates < 2**31:
            raise ValueError(f"codes candidates: from 0 to {2**31 - 1}, got {self.candidates}")

    def make(self, spec: CacheSpec, room: Room, others: Iterable[Entries] = ()) -> CodeIndex:
        if not spec.code_bits:
            raise ValueError("codes: the cache keeps none (code_bits)")
        return self

    def masses(self, q: Tensor, context: Context) -> Tensor:
        return masses_by_codes(q, context, self.candidates)


def masses_by_codes(q: Tensor, context: Context, candidates: int) -> Tensor:
    """[R, Hq, F], log masses by the codes of so many pages."""
    described, scale = context.described(), context.spec.softmax_scale
    own, starts = context.own_page(), context.step.starts
    return code_masses(q, *own, described.codes, described.table, starts, scale=scale, candidates=candidates)
