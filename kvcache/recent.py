"""What a token leaves to the one after it: the pages that it read, and what each has been worth of late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import CacheSpec
from .step import Phase, Span, Step

NEVER = -1
GRAIN = 256
"""Pages by which the memory of a layer grows."""


class Past(NamedTuple):
    """What the tokens before those of some rows have left."""

    known: Tensor
    """[R] bool; the others may hold anything."""
    read: Tensor
    """[R, Hkv, F] bool, the pages that were chosen."""
    averages: Tensor
    """[R, Hkv, F] fp32, the moving average of each page's share of the attention."""


@dataclass(slots=True)
class _Layer:
    """Of one layer; places are 2 * sequence, and one more for odd positions."""

    following: Tensor
    """[places] int64, position of the token that each place is kept for."""
    read: Tensor
    """[places, Hkv, pages] bool"""
    averages: Tensor
    """[places, Hkv, pages] fp32"""
    written: dict[int, int]
    """Pages of each place that may hold anything but zeros."""


class Recent:
    """What the last token of each sequence has left, in the layers that asked to have it kept.

    It is kept twice, for even and for odd positions: what a token leaves replaces what the token two before it left. So
    a step that failed and runs once more finds what it found at first, layer by layer and sequence by sequence, as
    long as it runs one token of each. What some other token left, a later one or one long before, is unknown.

    Nothing is allocated until the first token that leaves anything, and all is freed with the last sequence that did.
    Between, a layer takes 10 bytes for each page and KV head of the longest sequence, in whole `GRAIN`s, times
    the greatest number of sequences: a quarter of a percent of pages of 16 tokens with 64 channels in bf16.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self._heads = spec.num_kv_heads
        self._layers: dict[int, _Layer] = {}
        self._left: set[int] = set()
        self._last: tuple[Step, Sequence[int], Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Allocated."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self._layers.values()
            for tensor in (layer.following, layer.read, layer.averages)
        )

    def previous(self, layer: int, step: Step, rows: Sequence[int]) -> Past:
        """What the tokens right before those of these rows have left."""
        held, pages = self._room(layer, step), step.max_pages
        places, positions, _, _ = self._where(step, rows)
        return Past(
            held.following.index_select(0, places) == positions,
            held.read[..., :pages].index_select(0, places),
            held.averages[..., :pages].index_select(0, places),
        )

    def remember(self, layer: int, step: Step, rows: Sequence[int], read: Tensor, averages: Tensor) -> None:
        """Keep what the tokens of these rows, no two of one sequence, leave: [R, Hkv, F] each, as `Past` has it."""
        held, pages = self._room(layer, step), step.max_pages
        _, _, places, following = self._where(step, rows)
        held.following.index_copy_(0, places, following)
        held.read[..., :pages].index_copy_(0, places, read)
        held.averages[..., :pages].index_copy_(0, places, averages)
        spans = [step.spans[row] for row in rows]
        if any(held.written.get(_place(span, 0), 0) > pages for span in spans):
            held.read[..., pages:].index_fill_(0, places, False)
            held.averages[..., pages:].index_fill_(0, places, 0.0)
        held.written.update((_place(span, 0), pages) for span in spans)
        self._left.update(span.sequence for span in spans)

    def drop(self, sequence: int) -> None:
        """Forget the sequence."""
        if sequence not in self._left:
            return
        self._left.discard(sequence)
        if not self._left:
            self._layers.clear()
            self._last = None
        for held in self._layers.values():
            held.following[2 * sequence : 2 * sequence + 2].fill_(NEVER)

    def _where(self, step: Step, rows: Sequence[int]) -> Tensor:
        """[4, R] int64: places that the rows' tokens look into and their positions, those they write to and the next.

        On the device, without waiting for it; all layers of a step ask for the same.
        """
        if self._last is None or self._last[0] is not step or self._last[1] != rows:
            spans = [step.spans[row] for row in rows]
            numbers = [(_place(span, 1), span.start, _place(span, 0), span.stop) for span in spans]
            self._last = step, rows, torch.tensor(numbers).T.contiguous().to(step.starts.device, non_blocking=True)
        return self._last[2]

    def _room(self, layer: int, step: Step) -> _Layer:
        """The layer's memory, with a place for every sequence and page of the step."""
        assert step.phase is Phase.DECODE, "prompts leave nothing"
        held = self._layers.get(layer)
        places, pages = (0, 0) if held is None else (held.read.shape[0], held.read.shape[2])
        wanted = 2 + 2 * max(span.sequence for span in step.spans)
        if held is None or wanted > places or step.max_pages > pages:
            pages = max(pages, -(-step.max_pages // GRAIN) * GRAIN)
            held = self._grown(held, max(places, wanted), pages, step.starts.device)
            self._layers[layer] = held
        return held

    def _grown(self, old: _Layer | None, places: int, pages: int, device: torch.device) -> _Layer:
        with torch.inference_mode(False):  # else nobody outside of it could write to them
            new = _Layer(
                torch.full((places,), NEVER, device=device),
                torch.zeros(places, self._heads, pages, dtype=torch.bool, device=device),
                torch.zeros(places, self._heads, pages, device=device),
                {} if old is None else old.written,
            )
            if old is not None:
                count, width = old.read.shape[0], old.read.shape[2]
                new.following[:count].copy_(old.following)
                new.read[:count, :, :width].copy_(old.read)
                new.averages[:count, :, :width].copy_(old.averages)
        return new


def _place(span: Span, ago: int) -> int:
    """Of what the token so many before the span's has left."""
    return 2 * span.sequence + (span.start - ago) % 2


def turns(step: Step) -> list[list[int]]:
    """The rows of a decode step, each sequence's tokens one after another: no list has two of one sequence."""
    found: list[list[int]] = []
    before: dict[int, int] = {}
    for row, span in enumerate(step.spans):
        turn = before.get(span.sequence, 0)
        before[span.sequence] = turn + 1
        if turn == len(found):
            found.append([])
        found[turn].append(row)
    return found
