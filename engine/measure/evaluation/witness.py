"""How much of the attention a strategy's selections really hold, layer by layer and head by head."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from keysift.attention import Strategy, Telemetry
from keysift.attention.attend import read
from keysift.kvcache import Context, Phase, Selection
from keysift.kvcache.index import IndexSpec

from ...scheduling.scheduler import Batch

Heads = list[list[float | None]]
"""[layers][heads]"""


@dataclass(slots=True, eq=False)
class Ledger:
    """Attention kept by each layer and query head, and what was read, over some steps of one phase."""

    kept: dict[int, Tensor] = field(default_factory=dict)
    """Of each layer [Hq], sums over queries."""
    queries: dict[int, int] = field(default_factory=dict)
    density: list[tuple[Tensor, float]] = field(default_factory=list)
    """Of each step [L, H], and the (query, key) pairs that causality allowed it."""
    least: float | None = None
    """The least that one query kept in one head; None where nobody chose."""

    def witness(self, batch: Batch) -> Batch:
        """The same step under the same strategy, watched."""
        watched = Watched(inner=batch.strategy, ledger=self)
        return Batch(batch.phase, watched, batch.sequences, batch.spans)

    def hear(self, batch: Batch, telemetry: Telemetry) -> None:
        pairs = sum(span.length * span.start + span.length * (span.length + 1) / 2 for span in batch.spans)
        self.density.append((telemetry.density(), pairs))

    def note(self, layer: int, shares: Tensor) -> None:
        """shares [T, Hq] of the attention that queries kept."""
        self.kept[layer] = self.kept.get(layer, 0) + shares.sum(0).cpu()
        self.queries[layer] = self.queries.get(layer, 0) + len(shares)
        least = float(shares.min())
        self.least = least if self.least is None else min(self.least, least)

    def coverage(self) -> Heads:
        """None for layers that nobody was asked about: they have a window."""
        return self._known([(self.kept[layer] / self.queries[layer]).tolist() for layer in sorted(self.kept)])

    def densities(self) -> Heads:
        """Shares of the pairs; heads that share a selection have the same. None as in `coverage`."""
        width = max((step.shape[1] for step, _ in self.density), default=0)
        possible = sum(pairs for _, pairs in self.density)
        chosen = sum(step.repeat_interleave(width // step.shape[1], 1) * pairs for step, pairs in self.density)
        return self._known((chosen / possible)[sorted(self.kept)].tolist()) if isinstance(chosen, Tensor) else []

    def _known(self, rows: list[list[float]]) -> Heads:
        """The rows of the layers that chose, in order, among those of all layers."""
        layers = len(self.density[0][0]) if self.density else 0
        empty: list[float | None] = [None] * (len(rows[0]) if rows else 0)
        each = iter(rows)
        return [list(next(each)) if layer in self.kept else empty for layer in range(layers)]

    @property
    def mean(self) -> float | None:
        """Over layers, heads and queries; None where every layer has a window."""
        shares = [kept / self.queries[layer] for layer, kept in self.kept.items()]
        return float(torch.cat(shares).mean()) if shares else None


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

    def index_spec(self) -> IndexSpec | None:
        return self.inner.index_spec()

    def part(self, phase: Phase) -> Strategy:
        return self


def kept(q: Tensor, context: Context, selection: Selection) -> Tensor:
    """[T, Hq] fp32, the share of each query's attention that lies in the selected pages, by exact attention."""
    (_, chosen), (_, everything) = (read(q, context, each) for each in (selection, context.all()))
    return torch.exp(chosen - everything).clamp(max=1.0)
