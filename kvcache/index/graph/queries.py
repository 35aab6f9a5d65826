"""Training queries of a graph, few and evenly spread."""

from __future__ import annotations

import torch
from torch import Tensor


class Kept:
    """Queries [*, Hq, D] of one layer of one sequence: every so many positions', twice as many apart when full."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._stride = 1
        self._positions: list[int] = []
        self._queries: Tensor | None = None

    def add(self, q: Tensor, start: int) -> None:
        """Queries q [T, Hq, D] of consecutive positions; earlier ones from `start` on are written over."""
        if not self._room:
            return
        if self._queries is None:
            self._queries = q.new_empty(self._room, *q.shape[1:])
        while self._positions and self._positions[-1] >= start:
            self._positions.pop()
        new = [at for at in range(start, start + len(q)) if at % self._stride == 0]
        while len(self._positions) + len(new) > self._room:
            self._thin(self._queries)
            new = [at for at in new if at % self._stride == 0]
        if new:
            self._queries[len(self._positions) : len(self._positions) + len(new)] = q[[at - start for at in new]]
            self._positions += new

    def _thin(self, queries: Tensor) -> None:
        self._stride *= 2
        kept = [i for i, at in enumerate(self._positions) if at % self._stride == 0]
        queries[: len(kept)] = queries[kept]
        self._positions = [self._positions[i] for i in kept]

    def take(self, first: int) -> Tensor:
        """[M, Hq, D], those from position `first` on; nothing is kept afterwards."""
        here = [i for i, at in enumerate(self._positions) if at >= first]
        queries = torch.empty(0, 1, 1) if self._queries is None else self._queries[here]
        self._stride, self._positions, self._queries = 1, [], None
        return queries
