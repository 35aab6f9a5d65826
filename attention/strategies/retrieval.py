"""RetrievalAttention: the pages that an index over the cached keys finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from keysift.kvcache import Context
from keysift.kvcache.index import BoundIndex, CodeIndex, FlatIndex, Graph, IndexSpec, Ivf, MeanIndex

from ..strategy import Few, Positive
from ..token import TokenStrategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval(TokenStrategy):
    """Sinks and window, and of all that lies between the pages that an index finds for this very query.

    After Liu et al., "RetrievalAttention", arXiv 2409.10516: an exact part and a part that is searched, disjoint. Here
    the unit is the page, the heads of a group share what is read, generated tokens are indexed like all others, and as
    many pages are taken as the query's attention needs.
    """

    replayable = True
    index: Literal["flat", "codes", "ivf", "graph", "summary", "bound"] = "codes"
    """What searches: all keys exactly, their codes, clusters, a graph, the pages' mean keys, or their bounds."""
    candidates: Positive = 512
    """Of codes: pages whose codes are read, the most promising by the bounds of all."""
    nprobe: Few = 64
    """Of clusters: those that are read, 16 keys each on average."""
    beam: Few = 128
    """Of the graph: keys that a search keeps in view; long contexts need more, 512 at 128k tokens."""
    top_k: Few = 100
    """Of clusters and the graph: keys that a search of single keys returns for each query head."""
    wait: bool = False
    """Of the graph: build it before the first answer, instead of beside the answers, which codes give meanwhile."""

    def index_spec(self) -> IndexSpec:
        specs: dict[str, IndexSpec] = {
            "flat": FlatIndex(),
            "codes": CodeIndex(self.candidates),
            "graph": Graph(beam=self.beam, top_k=self.top_k, sink=self.sink, window=self.window, wait=self.wait),
            "ivf": Ivf(nprobe=self.nprobe, top_k=self.top_k),
            "summary": MeanIndex(),
            "bound": BoundIndex(),
        }
        return specs[self.index]

    def masses(self, q: Tensor, context: Context) -> Tensor:
        return context.page_mass(q)
