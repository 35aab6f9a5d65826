"""Quest: the pages that could hold the best keys, by the bounds of their channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keysift.kvcache import Context
from keysift.kvcache.index import BoundIndex

from ..strategy import Count, Positive, Share, Tokens
from ..token import TokenStrategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Quest(TokenStrategy):
    """The pages with the greatest score that a key between their least and greatest could have.

    As published: a budget of 1,024, the first two layers dense, neither sinks nor a window but the row's own page. Here
    both zones are options, and the heads of a group share a list.
    """

    source = "Tang et al., Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774"
    replayable = True
    sink: Tokens = 0
    window: Positive = 1
    epsilon: Share = 0.0
    dense_layers: Count = 2

    def index_spec(self) -> BoundIndex:
        return BoundIndex()

    def masses(self, q: Tensor, context: Context) -> Tensor:
        return context.page_mass(q)
