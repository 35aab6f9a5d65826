"""What a step's selections amount to: density and coverage per layer and head, bytes read, attention kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import CacheSpec, Phase, Selection, Step
from keysift.kvcache.selection import pairs

from .locality import Locality, moved


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
    estimated: float = 0.0
    """Share of the attention that pages contributed by their means, times the tokens; what is neither was dropped."""
    bound: float = 0.0
    """The most that dropped pages can hold, times the tokens; NaN once nobody had told it."""
    chose: bool = False
    """Some layer was asked to choose, whatever it chose."""

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(
            self.tokens + other.tokens,
            self.kept + other.kept,
            min(self.lowest, other.lowest),
            self.widened + other.widened,
            self.estimated + other.estimated,
            self.bound + other.bound,
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

    @property
    def estimated_share(self) -> float:
        return self.estimated / self.tokens if self.tokens else 0.0

    @property
    def dropped_bound(self) -> float | None:
        """The most of the attention that was dropped: mean over layers, heads and tokens; None where it is unknown."""
        return None if math.isnan(self.bound) else self.bound / self.tokens if self.tokens else 0.0


class Telemetry:
    """Keeps a small tensor or two per layer while a step runs; does the arithmetic once, after it."""

    def __init__(self, spec: CacheSpec, step: Step) -> None:
        self._spec = spec
        self._step = step
        self._counts: dict[int, Tensor | None] = {}
        self._kept: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._estimated: dict[int, Tensor] = {}
        self._bounds: dict[int, Tensor] = {}
        self._moves: list[tuple[Tensor, Tensor | None]] = []

    def record(self, layer: int, selection: Selection, exact: Tensor | None = None, lse: Tensor | None = None) -> None:
        """Note what this layer chose; a complete selection costs nothing.

        `exact` and `lse` [T, Hq], log-sum-exps over the chosen pages and with those that stand in by their means, are
        needed where there are such pages or a bound.
        """
        self._counts[layer] = None if selection.complete else self._home(selection.counts())
        if selection.complete:
            return
        evidence = selection.evidence
        if selection.estimated is not None and exact is not None and lse is not None:
            kept, estimated = self._parts(selection, exact, lse)
            self._kept[layer], self._estimated[layer] = (self._home(kept), None), self._home(estimated)
        elif evidence.coverage is not None:
            widened = evidence.widened
            self._kept[layer] = self._home(evidence.coverage), None if widened is None else self._home(widened)
        if evidence.overlap is not None:
            bound_exceeded = evidence.bound_exceeded
            self._moves.append(
                (self._home(evidence.overlap), None if bound_exceeded is None else self._home(bound_exceeded))
            )
        if evidence.dropped_bound is not None and lse is not None:
            self._bounds[layer] = self._home(torch.sigmoid(evidence.dropped_bound - lse))

    def _home(self, told: Tensor) -> Tensor:
        """Where the step is: layers may lie on several devices."""
        return told.to(self._step.starts.device, non_blocking=True)

    def _parts(self, selection: Selection, exact: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Shares [R, Hq] of the attention that was read, and that came from means.

        Where nothing was dropped the two are what the op weighed; else they are to each other as it weighed them, and
        the selection tells the first, if anything does.
        """
        assert selection.estimated is not None
        read = torch.exp(exact - lse)
        pages = selection.counts() + (selection.estimated >= 0).sum(-1)  # [R, H]
        group = read.shape[1] // pages.shape[1]
        whole = (pages > self._step.last_pages.to(pages.device)[:, None]).repeat_interleave(group, 1)
        coverage = selection.evidence.coverage
        told = torch.full_like(read, torch.nan) if coverage is None else coverage
        kept = torch.where(whole, read, told)
        estimated = torch.minimum(kept * (torch.exp(lse - exact) - 1), 1 - kept)
        return kept, estimated.nan_to_num(0.0).clamp(min=0.0)

    def head(self, rows: int) -> Telemetry:
        """Of a decode step's first rows alone."""
        first = Telemetry(self._spec, self._step.head(rows))
        first._counts = {layer: None if each is None else each[:rows] for layer, each in self._counts.items()}
        first._kept = {
            layer: (kept[:rows], None if widened is None else widened[:rows])
            for layer, (kept, widened) in self._kept.items()
        }
        first._estimated = {layer: each[:rows] for layer, each in self._estimated.items()}
        first._bounds = {layer: each[:rows] for layer, each in self._bounds.items()}
        first._moves = [
            (each[:rows], None if bound_exceeded is None else bound_exceeded[:rows])
            for each, bound_exceeded in self._moves
        ]
        return first

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
        sparse, layers = self._sparse(), len(self._counts)
        if not sparse:
            return [Coverage(span.length, float(span.length)) for span in self._step.spans]
        lost = [0.0 if read.chosen == read.possible else math.nan for read in reads]
        measured = self._measured()  # [layers, B, 4]
        bounds = self._bound_shares()  # [layers, B]
        kept_rest, bound_rest = (len(sparse.keys() - known.keys()) for known in (self._kept, self._bounds))
        return [
            _coverage(
                span.length,
                layers,
                measured[:, b].tolist(),
                rest=layers - len(measured) + (kept_rest and lost[b]),
                bound=float(bounds[:, b].sum()) + (bound_rest and lost[b]),
            )
            for b, span in enumerate(self._step.spans)
        ]

    def locality(self) -> list[Locality]:
        """How little each sequence of a decode step changed what it read; waits for the device."""
        return moved(self._moves) if self._moves else [Locality()] * len(self._step.spans)

    def _sparse(self) -> dict[int, Tensor]:
        """Page counts [R, H] of the layers that chose."""
        return {layer: counts for layer, counts in self._counts.items() if counts is not None}

    def _measured(self) -> Tensor:
        """[layers that measured, B, 4] on the host: mean and least kept mass, shares widened and estimated."""
        empty = [torch.empty(0, len(self._step.spans), 4)]
        return torch.cat([self._shares(layers) for layers in self._alike()] or empty).cpu()

    def _alike(self) -> list[list[int]]:
        """Layers whose probes [B, H] have one shape."""
        groups: dict[torch.Size, list[int]] = {}
        for layer, (kept, _) in self._kept.items():
            groups.setdefault(kept.shape, []).append(layer)
        return list(groups.values())

    def _shares(self, layers: list[int]) -> Tensor:
        """[layers, B, 4] of probes [layers, B, H]; those of a prompt chunk are one sequence's."""
        kept = torch.stack([self._kept[layer][0] for layer in layers]).float().clamp(max=1.0)
        widened = _stacked([self._kept[layer][1] for layer in layers], kept)
        estimated = _stacked([self._estimated.get(layer) for layer in layers], kept)
        shape = (len(layers), len(self._step.spans), -1)
        kept, widened, estimated = (each.reshape(shape) for each in (kept, widened, estimated))
        return torch.stack([kept.mean(-1), kept.amin(-1), widened.mean(-1), estimated.mean(-1)], -1)

    def _bound_shares(self) -> Tensor:
        """[layers that told it, B] on the host, the most that each sequence's dropped pages can hold."""
        if not self._bounds:
            return torch.empty(0, len(self._step.spans))
        shares = torch.stack(list(self._bounds.values()))  # [layers, R, Hq]
        return shares.reshape(len(shares), len(self._step.spans), -1).mean(-1).cpu()


def _stacked(parts: list[Tensor | None], like: Tensor) -> Tensor:
    """[layers, B, H] fp32 as `like`; zeros where a layer has nothing."""
    if all(part is None for part in parts):
        return torch.zeros(1, device=like.device).expand_as(like)
    return torch.stack([torch.zeros_like(like[0]) if part is None else part.float() for part in parts])


def _coverage(tokens: int, layers: int, measured: list[list[float]], *, rest: float, bound: float) -> Coverage:
    """One sequence's coverage of a step from its measured layers; the others kept `rest` layers' worth together."""
    kept, widened, estimated = (sum(row[i] for row in measured) for i in (0, 2, 3))
    least = min((row[1] for row in measured), default=1.0)
    share = tokens / layers
    return Coverage(tokens, share * (kept + rest), least, share * widened, share * estimated, share * bound, chose=True)


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
