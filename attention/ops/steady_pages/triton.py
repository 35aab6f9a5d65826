"""The CUDA twin of `steady_pages`."""
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from keysift.kvcache.ops.heaviest import triton as whole
from keysift.kvcache.ops.heaviest.triton import Pieces, block_of, cut, fits
from keysift.kvcache.ops.triton import INTERPRETED

from . import ONE, SteadyPages
from .kernels import average_kernel, steady_kernel

BLOCK = 1024
"""Pages of a list in pieces whose averages one program makes."""
EXACT = {"enable_fp_fusion": False}
"""Averages are rounded as the reference's are, in every kernel."""


def config(max_pages: int, amd: bool = torch.version.hip is not None, fewest: int = 1) -> dict[str, int]:
    """The block of a list of `max_pages` pages, and warps with which no target spills registers; AMD's are wider.

    What pieces have found takes four warps at least.
    """
    block = block_of(max_pages)
    return {"BLOCK_F": block, "num_warps": min(8 if amd else 16, max(fewest, block // 512))}


def steady_pages(
    masses: Tensor,
    firsts: Tensor,
    lasts: Tensor,
    known: Tensor,
    read: Tensor,
    averages: Tensor,
    *,
    heads: int,
    sinks: int,
    window: int,
    budget: int,
    queried: int,
    most: int,
    factor: float,
    keep: float,
    epsilon: float,
) -> SteadyPages:
    """The twin of the reference of the same name, which documents it.

    One launch for the reference's some sixty, five beyond 8,192 pages. A row's bits do not depend on the other rows,
    nor on how many pages the longest of them has. A budget that is too large for so many pages is left to the
    reference.
    """
    rows, query_heads, max_pages = masses.shape
    floats = masses.dtype == averages.dtype == torch.float32
    width = min(max_pages, sinks + window + budget)
    found = 2 * width  # of a piece at most: what was read and what may be; half as many live in registers as elsewhere
    if not (masses.is_cuda or INTERPRETED) or not floats or not max_pages or not fits(max_pages, 2 * found):
        return NotImplemented  # type: ignore[no-any-return]
    widths = width, min(max_pages, queried, budget)
    made = _empty(masses, heads, widths)
    given = [_plain(each) for each in (masses, firsts, lasts, known, read, averages)]
    count, rates = triton.cdiv(max_pages, whole.MAX_PAGES), (keep, 1 - keep)
    with torch.cuda.device_of(masses):
        if rows:
            pieces = Pieces()
            if count > 1:
                pieces = _cut(given, made, width=found, sinks=sinks, budget=budget, rates=rates)
            steady_kernel[(rows * heads,)](
                *(*given, *pieces, *map(_plain, made)),
                *(max_pages, count, count * found, *widths),
                *(sinks, budget, queried, most, factor, *rates, int(epsilon * ONE)),
                **{"H": heads, "G": query_heads // heads} | EXACT,
                **(config(max_pages) if count == 1 else config(count * found, fewest=4)),
            )
    return made


def _cut(
    given: Sequence[Tensor], made: SteadyPages, *, width: int, sinks: int, budget: int, rates: tuple[float, float]
) -> Pieces:
    """Lists in pieces, and the averages of all their pages."""
    masses, firsts, lasts, known, read, averages = given
    (rows, lists, max_pages), blocks = read.shape, triton.cdiv(read.shape[2], BLOCK)
    count = triton.cdiv(max_pages, whole.MAX_PAGES)
    pieces = cut(masses, (firsts, lasts), (known, read), lists=lists, width=width, sinks=sinks, budget=budget)
    average_kernel[(rows * lists * blocks,)](
        *(masses, lasts, known, averages, pieces.tops, pieces.sums, _plain(made.read), made.averages),
        *(max_pages, count, blocks, *rates),
        **{"H": lists, "G": masses.shape[1] // lists, "BLOCK": BLOCK} | EXACT,
    )
    return pieces


def _plain(tensor: Tensor) -> Tensor:
    """Without gaps, and what is true or false as bytes."""
    return tensor.contiguous().view(torch.int8) if tensor.dtype == torch.bool else tensor.contiguous()


def _empty(masses: Tensor, heads: int, widths: tuple[int, int]) -> SteadyPages:
    rows, query_heads, count = masses.shape
    made = masses.new_empty
    return SteadyPages(
        pages=made(rows, heads, widths[0], dtype=torch.int32),
        refused=made(rows, heads, widths[1], dtype=torch.int32),
        kept=made(rows, query_heads),
        read=made(rows, heads, count, dtype=torch.bool),
        averages=made(rows, heads, count),
        overlap=made(rows, heads),
        bound_exceeded=made(rows, heads, dtype=torch.bool),
    )
