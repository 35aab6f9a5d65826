"""RetrievalAttention: the pages that an index over the cached keys finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from keysift.kvcache import Context
from keysift.kvcache.index import BoundIndex, CodeIndex, FlatIndex, Graph, IndexSpec, Ivf, MeanIndex

from ..strategy import Few, Positive, option
from ..token import TokenStrategy, check_index_options

ACTS_WITH = {"candidates": "codes", "nprobe": "ivf", "beam": "graph", "top_k": "graph", "wait": "graph"}
"""Index that each of these options belongs to; with any other it would do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval(TokenStrategy):
    """Sinks, window, and of the pages between them those that an index finds for this query.

    As in the paper an exact part and a disjoint searched part. Here the unit is the page, the heads of a group share a
    list, generated tokens are indexed like all others, and as many pages are taken as the query's attention needs.
    """

    source = "Liu et al., RetrievalAttention, arXiv 2409.10516"
    replayable = True
    index: Literal["flat", "codes", "ivf", "graph", "summary", "bound"] = option(
        "codes", "search by all keys exactly, their codes, clusters, a graph, the pages' mean keys, or their bounds"
    )
    candidates: Positive = option(512, "of codes: pages whose codes are read, the heaviest by the bounds of all")
    nprobe: Few = option(64, "of ivf: clusters that are read, 16 keys each on average")
    beam: Few = option(128, "of graph: keys that a search keeps in view; long contexts need more, 512 at 128k tokens")
    top_k: Few = option(100, "of graph: keys that a search returns for each query head")
    wait: bool = option(False, "of graph: build it before the first token; false: codes give tokens meanwhile")

    def __post_init__(self) -> None:
        """Raises `ValueError` for an option of another index than the chosen one."""
        TokenStrategy.__post_init__(self)
        check_index_options(self, self.index, ACTS_WITH)

    def index_spec(self) -> IndexSpec:
        specs: dict[str, IndexSpec] = {
            "flat": FlatIndex(),
            "codes": CodeIndex(self.candidates),
            "graph": Graph(beam=self.beam, top_k=self.top_k, sink=self.sink, window=self.window, wait=self.wait),
            "ivf": Ivf(nprobe=self.nprobe),
            "summary": MeanIndex(),
            "bound": BoundIndex(),
        }
        return specs[self.index]

    def masses(self, q: Tensor, context: Context) -> Tensor:
        return context.page_mass(q)
