"""Graphs over the keys, built from the prompt's own queries: RetrievalAttention's index (arXiv 2409.10516)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..codes import masses_by_codes
from .graphs import Graphs, Sizes
from .ops import Found, KeyGraph, Reach, search_graphs

if TYPE_CHECKING:
    from ...context import Context, Entries
    from ...spec import CacheSpec
    from ..room import Room

CANDIDATES = 512
"""Pages of each KV head whose codes are read while a graph is built."""
BOUNDS = {
    "degree": (0, 1024),  # links of every token take memory
    "beam": (1, 2**31 - 1),
    "top_k": (1, 2**31 - 1),
    "queries": (0, 2**31 - 1),
    "lag": (1, 2**31 - 1),
    "sink": (0, 2**31 - 1),
    "window": (0, 2**31 - 1),
}
"""Least and greatest value of each option."""


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph for each KV head of each layer, walked best first; what it does not cover yet is scanned."""

    scans: ClassVar[bool] = True
    host: ClassVar[bool] = True

    degree: int = 32
    """Links of a key, besides those to its neighbours in the sequence."""
    beam: int = 128
    """Keys that a walk keeps; more find more and scan more."""
    top_k: int = 100
    """Hits of each query head."""
    queries: int = 512
    """Most tokens of a prompt whose queries train a graph; 0: keys train it, and queries find less."""
    lag: int = 1024
    """Tokens by which graphs grow; up to one and a half times as many are scanned after a graph."""
    sink: int = 64
    """First tokens, which are scanned and are no hits, as every row reads them anyway."""
    window: int = 256
    """Last tokens, which are scanned and are no hits."""
    wait: bool = False
    """Build a graph before the first search; otherwise one thread builds it, and masses come from codes until then:
    which tokens these answer depends on how long that takes."""

    def __post_init__(self) -> None:
        """Raises `ValueError` naming a number out of range."""
        for name, (least, most) in BOUNDS.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"graph {name}: from {least} to {most}, got {value}")

    def make(self, spec: CacheSpec, room: Room, others: Iterable[Entries] = ()) -> GraphIndex:
        sizes = Sizes(self.degree, self.queries, self.lag, self.sink, self.wait)
        graphs = [other for other in others if isinstance(other, Graphs)]
        alike = (other for other in graphs if other.sizes == sizes)
        return GraphIndex(self, next(alike, None) or Graphs(spec, room, sizes, graphs))


class GraphIndex:
    """A search of key graphs: see `Graph`."""

    estimates_mass: ClassVar[bool] = False

    def __init__(self, options: Graph, entries: Graphs) -> None:
        self.options = options
        self.entries = entries

    def masses(self, q: Tensor, context: Context) -> Tensor:
        graphs, starts = self._graphs(context), context.step.starts
        ready = torch.tensor([not self._lacks(graph, tokens) for graph, tokens in graphs], device=starts.device)
        found = [graph for graph, _ in graphs]
        # A CPU index: no wait for a device.
        if self.entries.waits(context) or not context.spec.code_bits or bool(ready.all()):
            return self._search(q, context, found, starts).masses
        masses = self._search(q, context, found, starts.where(ready, -1)).masses
        return torch.where(ready[:, None, None], masses, masses_by_codes(q, context, CANDIDATES))

    def _lacks(self, graph: KeyGraph | None, tokens: int) -> bool:
        """True if a row that ends so many tokens should have a graph and has none."""
        return graph is None and self.entries.pages(tokens) > 0

    def _graphs(self, context: Context) -> list[tuple[KeyGraph | None, int]]:
        """The graph of each row, and the tokens of its sequence; all rows of a prompt's chunk belong to one."""
        step = context.step
        graphs = [(graph, span.stop) for graph, span in zip(self.entries.of(context), step.spans, strict=True)]
        return graphs if len(graphs) > 1 else graphs * step.num_rows

    def _search(self, q: Tensor, context: Context, graphs: Sequence[KeyGraph | None], positions: Tensor) -> Found:
        own, frames = self.options, context.fetch(context.all())
        top_k = min(own.top_k, context.step.max_pages * context.spec.page_size)  # each takes memory
        reach = Reach(own.degree, own.beam, top_k, own.sink, own.window)
        return search_graphs(q, frames.k, frames.table, positions, graphs, reach, context.spec.softmax_scale)
