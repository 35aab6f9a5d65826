"""What a step's selections amount to: density per layer and head, bytes read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import CacheSpec, Phase, Selection, Step
from keysift.kvcache.selection import pairs


@dataclass(frozen=True, slots=True)
class Reads:
    """(query, key) pairs and bytes that one sequence read, over its full-attention layers."""

    chosen: float = 0.0
    possible: float = 0.0
    bytes: int = 0

    def __add__(self, other: Reads) -> Reads:
        return Reads(self.chosen + other.chosen, self.possible + other.possible, self.bytes + other.bytes)

    @property
    def density(self) -> float:
        """1.0 where nothing was read."""
        return self.chosen / self.possible if self.possible else 1.0


class Telemetry:
    """Counts pages while a step runs, one small tensor per layer; does the arithmetic once, after it."""

    def __init__(self, spec: CacheSpec, step: Step) -> None:
        self._spec = spec
        self._step = step
        self._counts: dict[int, Tensor | None] = {}

    def record(self, layer: int, selection: Selection) -> None:
        """Note what this layer chose; a complete selection costs nothing."""
        self._counts[layer] = None if selection.complete else selection.counts()

    def density(self) -> Tensor:
        """[L, Hkv or Hq] fp32, share of the possible pairs per layer and head; 1 for layers with a window."""
        sparse = {layer: counts for layer, counts in self._counts.items() if counts is not None}
        heads = max((counts.shape[1] for counts in sparse.values()), default=self._spec.num_kv_heads)
        density = torch.ones(self._spec.num_layers, heads)
        for layer, counts in sparse.items():
            chosen, possible = pairs(self._step, counts)
            density[layer] = (chosen.sum(0) / possible.sum()).float().repeat_interleave(heads // counts.shape[1]).cpu()
        return density

    def reads(self) -> list[Reads]:
        """What each sequence of the step read; waits for the device."""
        every = (self._step.last_pages + 1)[:, None].expand(-1, self._spec.num_kv_heads)  # [R, Hkv]
        layers = [every if counts is None else counts for counts in self._counts.values()]
        if not layers:  # every layer has a window
            return [Reads()] * len(self._step.spans)
        rows = [_row_reads(self._step, counts, self._spec.read_bytes) for counts in _by_heads(layers)]
        return [sum(parts, Reads()) for parts in zip(*(_by_sequence(self._step, row) for row in rows), strict=True)]


def _by_heads(layers: list[Tensor]) -> list[Tensor]:
    """Counts stacked [L, R, H], one tensor per number of heads."""
    groups: dict[int, list[Tensor]] = {}
    for counts in layers:
        groups.setdefault(counts.shape[1], []).append(counts)
    return [torch.stack([counts.long() for counts in group]) for group in groups.values()]


def _row_reads(step: Step, counts: Tensor, page_bytes: int) -> list[Reads]:
    chosen, possible = pairs(step, counts)  # [L, R, H], [R]
    share = counts.shape[0] * counts.shape[2]
    table = torch.stack([chosen.sum((0, 2)), possible * share, counts.sum((0, 2)).double() * page_bytes])
    return [Reads(chosen, possible, int(size)) for chosen, possible, size in table.T.tolist()]


def _by_sequence(step: Step, rows: list[Reads]) -> list[Reads]:
    return [sum(rows, Reads())] if step.phase is Phase.PREFILL else rows
