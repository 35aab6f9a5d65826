"""The heaviest pages of each list by their log masses: a search for the threshold instead of a sort."""
# mypy: allow-untyped-calls

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .heaviest_kernels import MOST_PIECES, SHARE, heaviest_kernel, kept_kernel, piece_kernel, sums_kernel, tops_kernel

MAX_PAGES = 8192
"""So many live in the registers of one program: a longer list is one in pieces."""


class Pieces(NamedTuple):
    """What is known of lists in N pieces, each in its program."""

    tops: Tensor | None = None
    """[R, Hq, N] fp32, the highest log mass of each; infinite where any is no number."""
    sums: Tensor | None = None
    """[R, Hq, N] int64, their masses by the highest one of all."""
    found: Tensor | None = None
    """[R, H, N, W] int32, pages that the list may take, ascending; -1 pads the end of each piece's."""


def block_of(max_pages: int) -> int:
    """What a program holds of a list of `max_pages` pages."""
    return max(128, triton.next_power_of_2(max_pages))  # type: ignore[no-any-return]


def config(max_pages: int) -> dict[str, int]:
    """The block of a list of `max_pages` pages, and warps with which no target spills registers."""
    block = block_of(max_pages)
    return {"BLOCK_F": block, "num_warps": 8 if block > 512 else 1}


def fits(max_pages: int, width: int) -> bool:
    """Whether a program holds all pages, or `width` of every piece of them."""
    count = triton.cdiv(max_pages, MAX_PAGES)
    return bool(count <= 1 or (count <= MOST_PIECES.value and count * width <= MAX_PAGES))


def heaviest(
    masses: Tensor,
    zones: tuple[Tensor, Tensor] | None,
    *,
    lists: int,
    width: int,
    sinks: int = 0,
    budget: int,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Pages [R, lists, width] int32 and what they hold [R, Hq] fp32 of log masses [R, Hq, F]: see `top_pages`.

    One launch; of lists in pieces four, and a fifth for what they hold. The bits are the same.

    Args:
        zones: first page of the window and last page, [R] int32 each; None: there are no zones, masses end in -inf,
            and nothing is told of what the pages hold.
        width: see `fits`.
    """
    rows, heads, max_pages = masses.shape
    assert fits(max_pages, width)
    pages = masses.new_empty(rows, lists, width, dtype=torch.int32)
    kept = masses.new_empty(rows, heads) if max_pages else masses.new_zeros(rows, heads)
    firsts, lasts = (masses, masses) if zones is None else (zone.contiguous() for zone in zones)
    masses, count = masses.contiguous(), triton.cdiv(max_pages, MAX_PAGES)
    shape = {"H": lists, "G": heads // lists, "ZONES": zones is not None}
    spare = int(epsilon * SHARE.value) if epsilon else -1
    if rows and max_pages:
        pieces = Pieces()
        if count > 1:
            pieces = _pieces(masses, (firsts, lasts), shape, (count, width), (sinks, budget))
        heaviest_kernel[(rows * lists,)](
            *(masses, firsts, lasts, *pieces, pages, kept),
            *(max_pages, count, count * width, width, sinks, budget, spare),
            **shape,
            **config(max_pages if count == 1 else count * width),
        )
        if count > 1 and zones:
            _tell(masses, pieces, pages, kept)
    return pages, kept


def _pieces(
    masses: Tensor,
    zones: tuple[Tensor, Tensor],
    shape: dict[str, int | bool],
    sizes: tuple[int, int],
    limits: tuple[int, int],
) -> Pieces:
    """Three launches, each with a program for every piece: `sizes` are N and W, `limits` are sinks and budget."""
    rows, heads, max_pages = masses.shape
    (count, width), lists = sizes, shape["H"]
    tops = masses.new_empty(rows, heads, count)
    sums = masses.new_empty(rows, heads, count, dtype=torch.int64)
    found = masses.new_empty(rows, lists, count, width, dtype=torch.int32)
    each = {"HEADS": heads, "ZONES": shape["ZONES"]} | config(MAX_PAGES)
    tops_kernel[(rows * heads * count,)](masses, zones[1], tops, max_pages, count, **each)
    sums_kernel[(rows * heads * count,)](masses, zones[1], tops, sums, max_pages, count, **each)
    piece_kernel[(rows * lists * count,)](
        *(masses, *zones, tops, sums, found, max_pages, *sizes, *limits), **shape, **config(MAX_PAGES)
    )
    return Pieces(tops, sums, found)


def _tell(masses: Tensor, pieces: Pieces, pages: Tensor, kept: Tensor) -> None:
    """What the heads hold on pages of lists in pieces."""
    (rows, heads, max_pages), (_, lists, width) = masses.shape, pages.shape
    assert pieces.tops is not None
    kept_kernel[(rows * heads,)](
        *(masses, pieces.tops, pieces.sums, pages, kept, max_pages, pieces.tops.shape[2], width),
        G=heads // lists,
        **config(width),
    )
