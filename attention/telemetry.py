"""Sparsity statistics of a step: pages and bytes read, attention kept, overlap with the previous token's pages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from keysift.kvcache import CacheSpec, Phase, Selection, Step
from keysift.kvcache.selection import pairs

from .totals import Coverage, Locality, Reads


class LayerRecord(NamedTuple):
    """Measurements of one layer's selection; None: not measured."""

    counts: Tensor | None = None
    """[R, H] int64, chosen pages; None: every page."""
    kept: Tensor | None = None
    """[B, Hq] fp32, share of each probe's attention that the chosen pages hold."""
    widened: Tensor | None = None
    """[B, Hq] bool, probes whose rows were widened."""
    estimated: Tensor | None = None
    """[R, Hq] fp32, share of the attention that came from page means."""
    dropped: Tensor | None = None
    """[R, Hq] fp32, upper bound of the share that dropped pages hold."""
    overlap: Tensor | None = None
    """[R, Hkv] fp32, share of the chosen pages that the previous token read, too; NaN: its pages are unknown."""
    bound_exceeded: Tensor | None = None
    """[R, Hkv] bool, lists that took in more pages than a locality bound allows."""

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerRecord:
        """The record with `change` applied to each of its tensors."""
        return LayerRecord(*(None if values is None else change(values) for values in self))


COMPLETE = LayerRecord()
"""The record of a layer that read everything."""


class Telemetry:
    """Statistics of one step: small tensors recorded layer by layer, evaluated once after the step."""

    def __init__(self, spec: CacheSpec, step: Step) -> None:
        self._spec = spec
        self._step = step
        self._layers: dict[int, LayerRecord] = {}

    def record(self, layer: int, selection: Selection, exact: Tensor | None = None, lse: Tensor | None = None) -> None:
        """Record a layer's selection without waiting for the device; a complete one costs nothing.

        `exact` and `lse` [T, Hq], log-sum-exps over the chosen pages alone and with the estimated ones, are required
        for a selection with estimated pages or a bound.
        """
        if selection.complete:
            self._layers[layer] = COMPLETE
            return
        device = self._step.starts.device  # layers may lie on several
        record = _measure(selection, self._step, exact, lse)
        self._layers[layer] = record.map(lambda values: values.to(device, non_blocking=True))

    def head(self, rows: int) -> Telemetry:
        """The statistics of a decode step's first `rows` rows; the others are padding."""
        first = Telemetry(self._spec, self._step.head(rows))
        first._layers = {layer: record.map(lambda values: values[:rows]) for layer, record in self._layers.items()}
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

    def reads(self) -> list[Reads]:
        """Pairs and bytes that each sequence of the step read; waits for the device."""
        every = (self._step.last_pages + 1)[:, None].expand(-1, self._spec.num_kv_heads)  # [R, Hkv]
        layers = [every if record.counts is None else record.counts for record in self._layers.values()]
        if not layers:  # every layer has a window
            return [Reads()] * len(self._step.spans)
        rows = [_row_reads(self._step, counts, self._spec.read_bytes) for counts in _by_heads(layers)]
        return [sum(parts, Reads()) for parts in zip(*(_by_sequence(self._step, row) for row in rows), strict=True)]

    def coverage(self, reads: list[Reads]) -> list[Coverage]:
        """Attention that each sequence's selections kept, given its `reads`; waits for the device.

        A decode step has one probe for each of its sequences; all probes of a prompt chunk belong to its one.
        """
        sparse, layers = self._sparse(), len(self._layers)
        if not sparse:
            return [Coverage(span.length, float(span.length)) for span in self._step.spans]
        measured, bounds = self._kept_shares(), self._dropped_shares()  # [layers, B, 4], [layers, B]
        kept_known, bound_known = len(measured) == len(sparse), len(bounds) == len(sparse)
        lost = [0.0 if read.chosen == read.possible else math.nan for read in reads]
        return [
            _coverage(
                span.length,
                layers,
                measured[:, b].tolist(),
                rest=layers - len(measured) + (0.0 if kept_known else lost[b]),
                bound=float(bounds[:, b].sum()) + (0.0 if bound_known else lost[b]),
            )
            for b, span in enumerate(self._step.spans)
        ]

    def locality(self) -> list[Locality]:
        """Overlap of each sequence's pages with the previous token's, of a decode step; waits for the device."""
        lists = [(each.overlap, each.bound_exceeded) for each in self._layers.values() if each.overlap is not None]
        return _locality(lists) if lists else [Locality()] * len(self._step.spans)

    def _sparse(self) -> dict[int, Tensor]:
        """Page counts [R, H] of the layers whose selection was not complete."""
        return {layer: record.counts for layer, record in self._layers.items() if record.counts is not None}

    def _kept_shares(self) -> Tensor:
        """[measured layers, B, 4] on the host: mean and least kept share, widened and estimated share."""
        groups: dict[torch.Size, list[LayerRecord]] = {}
        for record in self._layers.values():
            if record.kept is not None:
                groups.setdefault(record.kept.shape, []).append(record)
        count = len(self._step.spans)
        return torch.cat([_shares(group, count) for group in groups.values()] or [torch.empty(0, count, 4)]).cpu()

    def _dropped_shares(self) -> Tensor:
        """[bounded layers, B] on the host, upper bound of the share that each sequence's dropped pages hold."""
        count = len(self._step.spans)
        bounds = [record.dropped for record in self._layers.values() if record.dropped is not None]
        return torch.stack(bounds).reshape(len(bounds), count, -1).mean(-1).cpu() if bounds else torch.empty(0, count)


def _measure(selection: Selection, step: Step, exact: Tensor | None, lse: Tensor | None) -> LayerRecord:
    """A sparse selection's record, where its layer is: see `Telemetry.record`."""
    evidence, counts = selection.evidence, selection.counts()
    kept, estimated, dropped = evidence.coverage, None, None
    if selection.estimated is not None and exact is not None and lse is not None:
        whole = counts + (selection.estimated >= 0).sum(-1) > step.last_pages.to(counts.device)[:, None]  # [R, H]
        kept, estimated = _split_mass(exact, lse, whole, kept)
    if evidence.dropped_bound is not None and lse is not None:
        dropped = torch.sigmoid(evidence.dropped_bound - lse)
    return LayerRecord(counts, kept, evidence.widened, estimated, dropped, evidence.overlap, evidence.bound_exceeded)


def _split_mass(exact: Tensor, lse: Tensor, whole: Tensor, coverage: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shares [R, Hq] of the attention that came from chosen pages and from page means.

    Rows and heads `whole` [R, H] dropped nothing: theirs are the shares that the op weighed, by the log-sum-exps. Else
    only the ratio of the two is; the first is the selection's `coverage`, if it has one, or NaN, the second then 0.
    """
    read = torch.exp(exact - lse)
    whole = whole.repeat_interleave(read.shape[1] // whole.shape[1], 1)
    kept = torch.where(whole, read, torch.full_like(read, torch.nan) if coverage is None else coverage)
    estimated = torch.minimum(kept * (torch.exp(lse - exact) - 1), 1 - kept)
    return kept, estimated.nan_to_num(0.0).clamp(min=0.0)


def _shares(records: list[LayerRecord], sequences: int) -> Tensor:
    """[layers, B, 4] of layers whose probes have one shape: see `Telemetry._kept_shares`."""
    kept = torch.stack([record.kept for record in records if record.kept is not None]).float().clamp(max=1.0)
    widened = _stacked([record.widened for record in records], kept)
    estimated = _stacked([record.estimated for record in records], kept)
    kept, widened, estimated = (each.reshape(len(records), sequences, -1) for each in (kept, widened, estimated))
    return torch.stack([kept.mean(-1), kept.amin(-1), widened.mean(-1), estimated.mean(-1)], -1)


def _stacked(parts: list[Tensor | None], like: Tensor) -> Tensor:
    """fp32 in the shape of `like` [layers, ...], zeros for a layer without a part."""
    if all(part is None for part in parts):
        return torch.zeros(1, device=like.device).expand_as(like)
    return torch.stack([torch.zeros_like(like[0]) if part is None else part.float() for part in parts])


def _coverage(tokens: int, layers: int, measured: list[list[float]], *, rest: float, bound: float) -> Coverage:
    """One sequence's coverage of a step from its measured layers; the others kept `rest` layers' worth together."""
    kept, widened, estimated = (sum(row[i] for row in measured) for i in (0, 2, 3))
    least = min((row[1] for row in measured), default=1.0)
    share = tokens / layers
    return Coverage(tokens, share * (kept + rest), least, share * widened, share * estimated, share * bound, chose=True)


def _locality(lists: list[tuple[Tensor, Tensor | None]]) -> list[Locality]:
    """Totals of each sequence from `overlap` and `bound_exceeded` [B, H] of some layers; waits for the device."""
    overlap = torch.cat([part for part, _ in lists], 1).double()  # [B, choices]
    exceeded = torch.cat([torch.zeros_like(part) if more is None else more.float() for part, more in lists], 1)
    compared = (~overlap.isnan()).double()
    sums = torch.stack([compared.sum(1), overlap.nansum(1), (exceeded * compared).sum(1)], 1)
    return [Locality(int(count), *rest) for count, *rest in sums.tolist()]


def _by_heads(layers: list[Tensor]) -> list[Tensor]:
    """Page counts stacked [L, R, H], one tensor for each number of heads."""
    groups: dict[int, list[Tensor]] = {}
    for counts in layers:
        groups.setdefault(counts.shape[1], []).append(counts)
    return [torch.stack([counts.long() for counts in group]) for group in groups.values()]


def _row_reads(step: Step, counts: Tensor, page_bytes: int) -> list[Reads]:
    """Reads of each row over layers of page counts [L, R, H]."""
    chosen, possible = pairs(step, counts)  # [L, R, H], [R]
    pages = counts.sum((0, 2)).double()
    # A mean over heads: dense steps list pages by KV head, and would weigh less than those that list by query head.
    table = torch.stack([(chosen.sum(2) / counts.shape[2]).sum(0), possible * counts.shape[0], pages * page_bytes])
    return [Reads(chosen, possible, int(size)) for chosen, possible, size in table.T.tolist()]


def _by_sequence(step: Step, rows: list[Reads]) -> list[Reads]:
    """Reads of each sequence: all rows of a prompt chunk are one sequence's, a decode step has one row for each."""
    return [sum(rows, Reads())] if step.phase is Phase.PREFILL else rows
