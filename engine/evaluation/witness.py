"""How much of the attention a strategy's selections really hold, layer by layer and head by head."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from keysift.attention import Strategy, Telemetry
from keysift.attention.attend import read
from keysift.kvcache import Context, Phase, Selection
from keysift.kvcache.index import IndexSpec

from ..scheduler import Batch

Heads = list[list[float | None]]
"""[layers][heads]"""


@dataclass(slots=True, eq=False)
class Ledger:
    """Attention kept by each layer and query head, and what was read, over some steps of one phase."""

    kept: dict[int, Tensor] = field(default_factory=dict)
    """Of each layer [Hq], sums over queries."""
    queries: dict[int, int] = field(default_factory=dict)
    density: list[tuple[Tensor, int]] = field(default_factory=list)
    """Of each step [L, H], and its tokens."""
    least: float = 1.0
    """The least that one query kept in one head."""

    def witness(self, batch: Batch) -> Batch:
        """The same step under the same strategy, watched."""
        watched = Watched(inner=batch.strategy, ledger=self)
        return Batch(batch.phase, watched, batch.sequences, batch.spans)

    def hear(self, batch: Batch, telemetry: Telemetry) -> None:
        tokens = sum(span.length for span in batch.spans)
        self.density.append((telemetry.density(), tokens))

    def note(self, layer: int, shares: Tensor) -> None:
        """shares [T, Hq] of the attention that queries kept."""
        self.kept[layer] = self.kept.get(layer, 0) + shares.sum(0).cpu()
        self.queries[layer] = self.queries.get(layer, 0) + len(shares)
        self.least = min(self.least, float(shares.min()))

    def coverage(self) -> Heads:
        """None for layers that nobody was asked about: they have a window."""
        width = max((len(kept) for kept in self.kept.values()), default=0)
        layers = len(self.density[0][0]) if self.density else 0
        empty: list[float | None] = [None] * width
        return [
            (self.kept[layer] / self.queries[layer]).tolist() if layer in self.kept else empty
            for layer in range(layers)
        ]

    def densities(self) -> Heads:
        """Means over tokens; heads that share a selection have the same."""
        width = max((step.shape[1] for step, _ in self.density), default=0)
        tokens = sum(count for _, count in self.density)
        total = sum(step.repeat_interleave(width // step.shape[1], 1) * count for step, count in self.density)
        return (total / tokens).tolist() if isinstance(total, Tensor) else []

    @property
    def mean(self) -> float:
        """Over layers, heads and queries."""
        return float(torch.cat([kept / self.queries[layer] for layer, kept in self.kept.items()]).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched(Strategy):
    """Chooses as another strategy does, and has the attention measured that its choice keeps."""

    inner: Strategy
    ledger: Ledger

    def __post_init__(self) -> None:
        """The other one has checked its options."""

    def prefill(self, q: Tensor, context: Context) -> Selection:
        return self._watch(q, context, self.inner.prefill(q, context))

    def decode(self, q: Tensor, context: Context) -> Selection:
        return self._watch(q, context, self.inner.decode(q, context))

    def _watch(self, q: Tensor, context: Context, selection: Selection) -> Selection:
        shares = torch.ones(q.shape[:2]) if selection.complete else kept(q, context, selection)
        self.ledger.note(context.layer, shares)
        return selection

    def make_index(self) -> IndexSpec | None:
        return self.inner.make_index()

    def part(self, phase: Phase) -> Strategy:
        return self


def kept(q: Tensor, context: Context, selection: Selection) -> Tensor:
    """[T, Hq] fp32, the share of each query's attention that lies in the selected pages, by exact attention."""
    (_, chosen), (_, everything) = (read(q, context, each) for each in (selection, context.all()))
    return torch.exp(chosen - everything).clamp(max=1.0)
