"""Decode history: the pages that the last tokens selected, and a moving average of each page's share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import CacheSpec
from .step import Phase, Step
from .transfer import to_device

NEVER = NULL_SEQUENCE = -1
GRAIN = 256
"""Pages by which the history of a layer grows."""


class Past(NamedTuple):
    """History of the tokens right before those of some rows."""

    known: Tensor
    """[R] bool, rows that have a history; the others may hold anything."""
    read: Tensor
    """[R, Hkv, F] bool, the selected pages."""
    averages: Tensor
    """[R, Hkv, F] fp32, the moving average of each page's share of the attention."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """History of one layer, by `place`."""

    following: Tensor
    """[places] int32, position after that of the token recorded in each place; `NEVER`: none is."""
    read: Tensor
    """[places, Hkv, pages] bool"""
    averages: Tensor
    """[places, Hkv, pages] fp32"""


class Recent:
    """Decode history of every sequence, in the layers that record one.

    It is kept twice, for even and for odd positions: a record replaces that of the token two positions before. So a
    step that failed and runs again finds the same history, layer by layer and sequence by sequence, as long as it runs
    one token of each. The record of any other token, a later one or an earlier one, counts as unknown.

    Nothing is allocated until the first record. A layer takes 10 bytes for each page and KV head of the longest
    sequence, in whole `GRAIN`s, times a power of two that is greater than the greatest number of sequences: of one,
    half a percent of pages of 16 tokens with 64 channels in bf16. All of it is freed with the last sequence, unless it
    is pinned.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self._heads = spec.num_kv_heads
        self._page_size = spec.page_size
        self._layers: dict[int, _Layer] = {}
        self._recorded: set[int] = set()
        self._pinned = False
        self.version = 0
        """Grows whenever memory is allocated or freed: CUDA graphs captured before that use the old memory."""

    @property
    def bytes(self) -> int:
        """Bytes that are allocated."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self._layers.values()
            for tensor in (layer.following, layer.read, layer.averages)
        )

    def pin(self) -> None:
        """Free nothing from now on, so that CUDA graphs can be replayed for later sequences."""
        self._pinned = True

    def prepare(self, step: Step) -> None:
        """Make room for a decode step in the layers that have a history, and clear the pages that the step begins.

        Steps are expected in the order in which they run. This is no part of the step's own work on the device, which
        is the same for any tokens, so that a CUDA graph can capture it.
        """
        held = [self._room(layer, step) for layer in self._layers]
        new = [span for span in step.active_spans if span.start % self._page_size == 0]
        if not held or not new:
            return
        index = [(place(span.sequence, span.start - 1), span.start // self._page_size) for span in new]
        for layer in held:
            places, pages = to_device(index, layer.read.device).unbind(1)
            layer.read[places, :, pages] = layer.read.new_zeros(())
            layer.averages[places, :, pages] = layer.averages.new_zeros(())

    def previous(self, layer: int, step: Step, rows: Tensor | None) -> Past:
        """History of the tokens right before those of rows [n], None: of all rows.

        Pages after a row's own may hold anything.
        """
        held, pages = self._room(layer, step), step.max_pages
        places, positions = (each if rows is None else each[rows] for each in (step.places ^ 1, step.starts))
        return Past(
            held.following.index_select(0, places) == positions,
            held.read[..., :pages].index_select(0, places),
            held.averages[..., :pages].index_select(0, places),
        )

    def remember(self, layer: int, step: Step, rows: Tensor | None, read: Tensor, averages: Tensor) -> None:
        """Record [n, Hkv, F] each, as in `Past`, for the tokens of rows [n], no two of one sequence."""
        held, pages = self._room(layer, step), step.max_pages
        places, following = (each if rows is None else each[rows] for each in (step.places, step.starts + 1))
        held.following.index_copy_(0, places, following)
        held.read[..., :pages].index_copy_(0, places, read)
        held.averages[..., :pages].index_copy_(0, places, averages)
        self._recorded.update(span.sequence for span in step.active_spans)

    def drop(self, sequence: int) -> None:
        """Forget the sequence."""
        if not self._pinned and sequence not in self._recorded:
            return
        self._recorded.discard(sequence)
        if not self._recorded and not self._pinned and self._layers:
            self._layers.clear()
            self.version += 1
        for held in self._layers.values():
            held.following[place(sequence, 0) :][:2].fill_(NEVER)  # an empty slice if there is no such place yet

    def _room(self, layer: int, step: Step) -> _Layer:
        """The layer's history, with a place for every sequence and page of the step."""
        assert step.phase is Phase.DECODE, "prompts have no history"
        held = self._layers.get(layer)
        places, pages = (0, 0) if held is None else (held.read.shape[0], held.read.shape[2])
        wanted = place(max(span.sequence for span in step.active_spans), 0) + 2
        if held is None or wanted > places or step.max_pages > pages:
            pages = max(pages, -(-step.max_pages // GRAIN) * GRAIN)
            device = step.starts.device if held is None else held.read.device
            held = self._grown(held, max(places, 1 << (wanted - 1).bit_length()), pages, device)
            self._layers[layer] = held
            self.version += 1
        return held

    def _grown(self, old: _Layer | None, places: int, pages: int, device: torch.device) -> _Layer:
        with torch.inference_mode(False):  # else they could not be written outside of it
            new = _Layer(
                torch.full((places,), NEVER, dtype=torch.int32, device=device),
                torch.zeros(places, self._heads, pages, dtype=torch.bool, device=device),
                torch.zeros(places, self._heads, pages, device=device),
            )
            if old is not None:
                count, width = old.read.shape[0], old.read.shape[2]
                new.following[:count].copy_(old.following)
                new.read[:count, :, :width].copy_(old.read)
                new.averages[:count, :, :width].copy_(old.averages)
        return new


def place(sequence: int, position: int) -> int:
    """Place of the record of the sequence's token at this position; that of the token before it is ``place ^ 1``."""
    return 2 * (sequence + 1) + position % 2


def turns(step: Step) -> list[list[int]]:
    """Rows of a decode step in groups that have one token of each sequence at most, in the order of its tokens.

    Padding rows are in the first group.
    """
    found: list[list[int]] = []
    before: dict[int, int] = {}
    for row, span in enumerate(step.active_spans):
        turn = before.get(span.sequence, 0)
        before[span.sequence] = turn + 1
        if turn == len(found):
            found.append([])
        found[turn].append(row)
    found[0].extend(range(len(step.active_spans), step.num_rows))
    return found
