"""One forward pass: its tokens, rows and page tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from .contents import Contents


class Phase(Enum):
    """Kind of a step."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``start ... start + length - 1`` of one sequence."""

    sequence: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.length


class PaddedShape(NamedTuple):
    """Size that decode steps are padded to, so that many steps have tensors of one shape."""

    rows: int
    pages: int


PADDED = ("positions", "slots", "starts", "lasts", "last_pages", "places")
"""Fields with one number for each row of a decode step."""


@dataclass(frozen=True, slots=True)
class Step:
    """A block-aligned chunk of one prompt, or one token of every running sequence.

    Row r holds queries ``r * queries_per_row`` and on of the packed tokens; only the last row may be short.
    """

    phase: Phase
    spans: tuple[Span, ...]
    positions: Tensor
    """[T] int64, position of each token in its sequence."""
    slots: Tensor
    """[T] int64, slot of each token's key and value."""
    table: Tensor
    """[R, Hkv, F] int32, page -> frame of each row's sequence; head and row axes may have stride 0."""
    starts: Tensor
    """[R] int32, position of each row's first query."""
    lasts: Tensor
    """[R] int32, position of each row's last query."""
    last_pages: Tensor
    """[R] int32, page of each row's last query."""
    places: Tensor
    """[R] int64 of a decode step, place of the record of each row's token: see `Recent`."""
    filled: Tensor
    """[*] int64, frames that become full in this step; of a padded one [R], the null sequence's frame if none does."""
    page_size: int
    queries_per_row: int
    max_pages: int
    """F, as a host integer."""
    held: tuple[Sequence[int], ...] = ()
    """Frames of each span's sequence as host integers, page by page: for tiers, which move pages by them."""
    rows_left: int = 0
    """Rows of the same prompt in later steps."""
    num_padding_rows: int = 0
    """Rows of the null sequence at the end of a padded decode step."""

    @property
    def num_rows(self) -> int:
        """R, padding rows included."""
        return self.starts.shape[0]

    @property
    def active_spans(self) -> tuple[Span, ...]:
        """Spans without those of padding rows."""
        return self.spans[: len(self.spans) - self.num_padding_rows]

    def contents(self, row: int, first: int, stop: int) -> Contents:
        """Identity of what pages `first` to `stop` of a span's sequence hold; they are full."""
        return Contents(self.held[row][first:stop])

    def on(self, device: torch.device) -> Step:
        """The step with its tensors on this device, itself if they are there; copies do not block."""
        if self.positions.device == device:
            return self
        names = (*PADDED, "filled")
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        table = self.table[:, :1].to(device, non_blocking=True).expand(self.table.shape)  # heads share one
        return replace(self, table=table, **tensors)

    def copy_(self, other: Step) -> None:
        """Copy the tensors of another padded step of the same shape, in place; host integers stay."""
        for name in (*PADDED, "filled"):
            getattr(self, name).copy_(getattr(other, name))
        self.table[:, :1].copy_(other.table[:, :1])  # heads share a table

    def head(self, rows: int) -> Step:
        """The first rows of a decode step, with their spans; `filled` stays that of the whole step."""
        tensors = {name: getattr(self, name)[:rows] for name in (*PADDED, "table")}
        padding = max(0, self.num_padding_rows + rows - self.num_rows)
        return replace(self, spans=self.spans[:rows], held=self.held[:rows], num_padding_rows=padding, **tensors)
