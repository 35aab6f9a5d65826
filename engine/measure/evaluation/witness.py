"""Exact coverage: the attention that a strategy's selections really hold, by layer and head."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from keysift.attention import Strategy, Telemetry
from keysift.attention.attend import read
from keysift.kvcache import Context, Phase, Selection
from keysift.kvcache.index import IndexSpec

from ...scheduling.batch import Batch

Heads = list[list[float | None]]
"""[layers][heads]"""


@dataclass(slots=True, eq=False)
class Ledger:
    """Attention kept by each layer and query head, and what was read, over some steps of one phase."""

    kept: dict[int, Tensor] = field(default_factory=dict)
    """[Hq] for each layer, sums over queries."""
    queries: dict[int, int] = field(default_factory=dict)
    density: list[tuple[Tensor, float]] = field(default_factory=list)
    """[L, H] for each step, and its causal (query, key) pairs."""
    least: float | None = None
    """Least share that one query kept in one head; None if no layer chose."""

    def witness(self, batch: Batch) -> Batch:
        """The same step, with the strategy's selections measured."""
        watched = Watched(inner=batch.strategy, ledger=self)
        return Batch(batch.phase, watched, batch.sequences, batch.spans)

    def add(self, batch: Batch, telemetry: Telemetry) -> None:
        """Add the densities of a step."""
        pairs = sum(span.length * span.start + span.length * (span.length + 1) / 2 for span in batch.spans)
        self.density.append((telemetry.density(), pairs))

    def note(self, layer: int, shares: Tensor) -> None:
        """Add shares [T, Hq] of the attention that queries kept."""
        self.kept[layer] = self.kept.get(layer, 0) + shares.sum(0).cpu()
        self.queries[layer] = self.queries.get(layer, 0) + len(shares)
        least = float(shares.min())
        self.least = least if self.least is None else min(self.least, least)

    def coverage(self) -> Heads:
        """Kept shares; None for layers that did not choose, as they have a window."""
        return self._known([(self.kept[layer] / self.queries[layer]).tolist() for layer in sorted(self.kept)])

    def densities(self) -> Heads:
        """Shares of the causal pairs; heads that share a selection have the same. None as in `coverage`."""
        width = max((step.shape[1] for step, _ in self.density), default=0)
        possible = sum(pairs for _, pairs in self.density)
        chosen = sum(step.repeat_interleave(width // step.shape[1], 1) * pairs for step, pairs in self.density)
        return self._known((chosen / possible)[sorted(self.kept)].tolist()) if isinstance(chosen, Tensor) else []

    def _known(self, rows: list[list[float]]) -> Heads:
        """Rows for all layers, given those of the layers that chose."""
        layers = len(self.density[0][0]) if self.density else 0
        empty: list[float | None] = [None] * (len(rows[0]) if rows else 0)
        each = iter(rows)
        return [list(next(each)) if layer in self.kept else empty for layer in range(layers)]

    @property
    def mean(self) -> float | None:
        """Mean share over layers, heads and queries; None if every layer has a window."""
        shares = [kept / self.queries[layer] for layer, kept in self.kept.items()]
        return float(torch.cat(shares).mean()) if shares else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched(Strategy):
    """Wrapper that measures the attention kept by another strategy's selections."""

    inner: Strategy
    ledger: Ledger

    def __post_init__(self) -> None:
        """Skip the checks of options: `inner` has made them."""

    def prefill(self, q: Tensor, context: Context) -> Selection:
        return self._measured(q, context, self.inner.prefill(q, context))

    def decode(self, q: Tensor, context: Context) -> Selection:
        return self._measured(q, context, self.inner.decode(q, context))

    def _measured(self, q: Tensor, context: Context, selection: Selection) -> Selection:
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
