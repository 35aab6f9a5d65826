"""RetrievalAttention: the pages that an index over the cached keys finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from keysift.kvcache import Context
from keysift.kvcache.index import BoundIndex, CodeIndex, FlatIndex, IndexSpec, MeanIndex

from ..token import TokenStrategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval(TokenStrategy):
    """Sinks and window, and of all that lies between the pages that the index finds for this very query."""

    index: Literal["flat", "codes", "mean", "bound"] = "codes"
    """What searches the keys."""

    def make_index(self) -> IndexSpec:
        specs: dict[str, IndexSpec] = {
            "flat": FlatIndex(),
            "codes": CodeIndex(),
            "mean": MeanIndex(),
            "bound": BoundIndex(),
        }
        return specs[self.index]

    def masses(self, q: Tensor, context: Context) -> Tensor:
        return context.page_mass(q)
