"""What a step's selections amount to: density and coverage per layer and head, bytes read, attention kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import CacheSpec, Phase, Selection, Step
from keysift.kvcache.selection import pairs


@dataclass(frozen=True, slots=True)
class Reads:
    """(query, key) pairs, a mean over heads, and bytes that one sequence read, over its full-attention layers."""

    chosen: float = 0.0
    possible: float = 0.0
    bytes: int = 0

    def __add__(self, other: Reads) -> Reads:
        return Reads(self.chosen + other.chosen, self.possible + other.possible, self.bytes + other.bytes)

    @property
    def density(self) -> float:
        """1.0 where nothing was read."""
        return self.chosen / self.possible if self.possible else 1.0


@dataclass(frozen=True, slots=True)
class Coverage:
    """Attention mass that one sequence's selections kept, over its full-attention layers; sums weigh by tokens.

    A layer that read everything kept everything. Layers, heads and the probes of a step count alike.
    """

    tokens: int = 0
    kept: float = 0.0
    """Mean kept share of each step, times its tokens; NaN once a selection dropped pages that nobody had measured."""
    lowest: float = 1.0
    """The least that a probe kept of one head's attention, as far as it was measured."""
    widened: float = 0.0
    """Share of the probes whose rows read more because too little was covered, times the tokens."""
    chose: bool = False
    """Some layer was asked to choose, whatever it chose."""

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(
            self.tokens + other.tokens,
            self.kept + other.kept,
            min(self.lowest, other.lowest),
            self.widened + other.widened,
            self.chose or other.chose,
        )

    @property
    def mean(self) -> float | None:
        """1.0 where nothing was read, None where it is unknown."""
        return None if math.isnan(self.kept) else self.kept / self.tokens if self.tokens else 1.0

    @property
    def least(self) -> float | None:
        """As `mean`, of the one probe and head that lost most."""
        return None if math.isnan(self.kept) else self.lowest

    @property
    def widened_share(self) -> float:
        return self.widened / self.tokens if self.tokens else 0.0


class Telemetry:
    """Keeps a small tensor or two per layer while a step runs; does the arithmetic once, after it."""

    def __init__(self, spec: CacheSpec, step: Step) -> None:
        self._spec = spec
        self._step = step
        self._counts: dict[int, Tensor | None] = {}
        self._kept: dict[int, tuple[Tensor, Tensor | None]] = {}

    def record(self, layer: int, selection: Selection) -> None:
        """Note what this layer chose; a complete selection costs nothing."""
        self._counts[layer] = None if selection.complete else selection.counts()
        if selection.coverage is not None and not selection.complete:
            self._kept[layer] = selection.coverage, selection.widened

    def density(self) -> Tensor:
        """[L, Hkv or Hq] fp32, share of the possible pairs per layer and head; 1 for layers with a window."""
        sparse = self._sparse()
        heads = max((counts.shape[1] for counts in sparse.values()), default=self._spec.num_kv_heads)
        density = torch.ones(self._spec.num_layers, heads)
        for layer, counts in sparse.items():
            chosen, possible = pairs(self._step, counts)
            density[layer] = (chosen.sum(0) / possible.sum()).float().repeat_interleave(heads // counts.shape[1]).cpu()
        return density

    def coverage(self) -> Tensor:
        """[L, Hkv or Hq, 2] fp32, the least and the mean mass that the probes of each layer and head kept.

        1 for layers that read everything and for layers with a window; NaN where nothing measured it.
        """
        heads = max((kept.shape[1] for kept, _ in self._kept.values()), default=self._spec.num_kv_heads)
        coverage = torch.ones(self._spec.num_layers, heads, 2)
        for layer, counts in self._sparse().items():
            if layer in self._kept:
                kept = self._kept[layer][0].clamp(max=1.0)  # [B, H]
                each = torch.stack([kept.amin(0), kept.mean(0)], -1)
                coverage[layer] = each.repeat_interleave(heads // kept.shape[1], 0).cpu()
            elif bool((counts <= self._step.last_pages[:, None]).any()):
                coverage[layer] = torch.nan
        return coverage

    def reads(self) -> list[Reads]:
        """What each sequence of the step read; waits for the device."""
        every = (self._step.last_pages + 1)[:, None].expand(-1, self._spec.num_kv_heads)  # [R, Hkv]
        layers = [every if counts is None else counts for counts in self._counts.values()]
        if not layers:  # every layer has a window
            return [Reads()] * len(self._step.spans)
        rows = [_row_reads(self._step, counts, self._spec.read_bytes) for counts in _by_heads(layers)]
        return [sum(parts, Reads()) for parts in zip(*(_by_sequence(self._step, row) for row in rows), strict=True)]

    def covered(self, reads: list[Reads]) -> list[Coverage]:
        """What each sequence's selections kept, given what they read; waits for the device.

        A decode step has one probe for each of its sequences; all probes of a prompt chunk belong to its one.
        """
        sparse = self._sparse()
        lost = [1.0 if read.chosen == read.possible else math.nan for read in reads]
        unknown = bool(sparse.keys() - self._kept.keys())
        measured = self._measured()  # [layers, B, 3]
        return [
            _coverage(
                span.length,
                len(self._counts),
                measured[:, b].tolist(),
                chose=bool(sparse),
                rest=lost[b] if unknown else 1.0,
            )
            for b, span in enumerate(self._step.spans)
        ]

    def _sparse(self) -> dict[int, Tensor]:
        """Page counts [R, H] of the layers that chose."""
        return {layer: counts for layer, counts in self._counts.items() if counts is not None}

    def _measured(self) -> Tensor:
        """[layers that measured, B, 3] on the host: mean and least kept mass and share widened, of each sequence."""
        rows = [_per_sequence(self._step, kept, widened) for kept, widened in self._kept.values()]
        return torch.stack(rows).cpu() if rows else torch.empty(0, len(self._step.spans), 3)


def _per_sequence(step: Step, kept: Tensor, widened: Tensor | None) -> Tensor:
    """[B, 3] of a layer's probes [B, H]; those of a prompt chunk are one sequence's."""
    kept = kept.float().clamp(max=1.0).reshape(len(step.spans), -1)
    wide = torch.zeros_like(kept) if widened is None else widened.float().reshape(kept.shape)
    return torch.stack([kept.mean(1), kept.amin(1), wide.mean(1)], -1)


def _coverage(tokens: int, layers: int, measured: list[list[float]], *, chose: bool, rest: float) -> Coverage:
    """One sequence's coverage of a step from its measured layers; each of the others kept `rest`."""
    if not chose:
        return Coverage(tokens, float(tokens))
    kept = sum(mean for mean, _, _ in measured) + rest * (layers - len(measured))
    widened = sum(wide for _, _, wide in measured)
    least = min((least for _, least, _ in measured), default=1.0)
    return Coverage(tokens, tokens * kept / layers, least, tokens * widened / layers, chose=True)


def _by_heads(layers: list[Tensor]) -> list[Tensor]:
    """Counts stacked [L, R, H], one tensor per number of heads."""
    groups: dict[int, list[Tensor]] = {}
    for counts in layers:
        groups.setdefault(counts.shape[1], []).append(counts)
    return [torch.stack([counts.long() for counts in group]) for group in groups.values()]


def _row_reads(step: Step, counts: Tensor, page_bytes: int) -> list[Reads]:
    chosen, possible = pairs(step, counts)  # [L, R, H], [R]
    pages = counts.sum((0, 2)).double()
    # A mean over heads: dense steps list pages by KV head, and would weigh less than those that list by query head.
    table = torch.stack([(chosen.sum(2) / counts.shape[2]).sum(0), possible * counts.shape[0], pages * page_bytes])
    return [Reads(chosen, possible, int(size)) for chosen, possible, size in table.T.tolist()]


def _by_sequence(step: Step, rows: list[Reads]) -> list[Reads]:
    return [sum(rows, Reads())] if step.phase is Phase.PREFILL else rows
