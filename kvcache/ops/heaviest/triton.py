"""The heaviest pages of each list by their log masses: a search for the threshold instead of a sort."""
# mypy: allow-untyped-calls

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..triton import Config
from .kernels import MOST_PIECES, SHARE, heaviest_kernel, kept_kernel, piece_kernel, sums_kernel, tops_kernel

MAX_PAGES = 8192
"""Pages that fit into the registers of one program; a longer list is cut into pieces."""


class Pieces(NamedTuple):
    """Results over lists in N pieces, a program for each."""

    tops: Tensor | None = None
    """[R, Hq, N] fp32, the highest log mass of each; infinite if any is NaN."""
    sums: Tensor | None = None
    """[R, Hq, N] int64, their masses relative to the highest one of all, in fixed point."""
    found: Tensor | None = None
    """[R, H, N, W] int32, pages that the list may take, ascending; -1 pads the end of each piece's."""


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
    """Pages [R, lists, width] int32 and their share [R, Hq] fp32 of log masses [R, Hq, F]: see `top_pages`.

    One launch; for lists in pieces four, and a fifth for the shares. The bits are the same.

    Args:
        zones: first page of the window and last page, [R] int32 each; None: there are no zones, masses end in -inf,
            and shares are not written.
        width: see `fits`.
    """
    rows, heads, max_pages = masses.shape
    assert fits(max_pages, width)
    pages = masses.new_empty(rows, lists, width, dtype=torch.int32)
    kept = masses.new_empty(rows, heads) if max_pages else masses.new_zeros(rows, heads)
    masses, count = masses.contiguous(), triton.cdiv(max_pages, MAX_PAGES)
    zones = zones and (zones[0].contiguous(), zones[1].contiguous())
    spare = int(epsilon * SHARE.value) if epsilon else -1
    if rows and max_pages:
        several = count > 1
        pieces = cut(masses, zones, lists=lists, width=width, sinks=sinks, budget=budget) if several else Pieces()
        heaviest_kernel[(rows * lists,)](
            *(masses, *(zones or (masses, masses)), *pieces, pages, kept),
            *(max_pages, count, count * width, width, sinks, budget, spare),
            **{"H": lists, "G": heads // lists, "ZONES": zones is not None},
            **config(count * width if several else max_pages).all,
        )
        if several and zones:
            _write_kept(masses, pieces, pages, kept)
    return pages, kept


def cut(
    masses: Tensor,
    zones: tuple[Tensor, Tensor] | None,
    past: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    *,
    lists: int,
    width: int,
    sinks: int,
    budget: int,
) -> Pieces:
    """Lists of more pages than one program holds, in pieces: three launches with a program for each.

    Args:
        past: rows with a history, [R] bytes, and the pages that they have read, [R, lists, F] bytes, found as well.
        width: most pages that a piece finds: see `fits`.
    """
    rows, heads, max_pages = masses.shape
    count = triton.cdiv(max_pages, MAX_PAGES)
    firsts, lasts = zones or (masses, masses)
    tops = masses.new_empty(rows, heads, count)
    sums = masses.new_empty(rows, heads, count, dtype=torch.int64)
    found = masses.new_empty(rows, lists, count, width, dtype=torch.int32)
    shape = {"ZONES": zones is not None} | config(MAX_PAGES).all
    for kernel, made in ((tops_kernel, (tops,)), (sums_kernel, (tops, sums))):
        kernel[(rows * heads * count,)](masses, lasts, *made, max_pages, count, HEADS=heads, **shape)
    piece_kernel[(rows * lists * count,)](
        *(masses, firsts, lasts, *past, tops, sums, found, max_pages, count, width, sinks, budget),
        **{"H": lists, "G": heads // lists},
        **shape,
    )
    return Pieces(tops, sums, found)


def config(max_pages: int) -> Config:
    """For a list of `max_pages` pages, with warps that spill registers on no target."""
    block = block_of(max_pages)
    return Config({"BLOCK_F": block}, {"num_warps": 8 if block > 512 else 1})


def block_of(max_pages: int) -> int:
    """Block of a program for a list of `max_pages` pages."""
    return max(128, triton.next_power_of_2(max_pages))  # type: ignore[no-any-return]


def fits(max_pages: int, width: int) -> bool:
    """True if one program holds all pages, or `width` of every piece of them."""
    count = triton.cdiv(max_pages, MAX_PAGES)
    return bool(count <= 1 or (count <= MOST_PIECES.value and count * width <= MAX_PAGES))


def _write_kept(masses: Tensor, pieces: Pieces, pages: Tensor, kept: Tensor) -> None:
    """Write the share of each head on the pages of lists in pieces."""
    (rows, heads, max_pages), (_, lists, width) = masses.shape, pages.shape
    assert pieces.tops is not None
    kept_kernel[(rows * heads,)](
        *(masses, pieces.tops, pieces.sums, pages, kept, max_pages, pieces.tops.shape[2], width),
        G=heads // lists,
        **config(width).all,
    )
