"""The Triton twin of `steady_pages`."""
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from keysift.kvcache.ops.dispatch import UnsupportedCall
from keysift.kvcache.ops.heaviest import triton as heaviest
from keysift.kvcache.ops.heaviest.triton import Pieces, block_of, cut, fits
from keysift.kvcache.ops.triton import NO_SPILLS, Config, runs_here

from . import ONE, SteadyPages
from .kernels import average_kernel, steady_kernel

AVERAGES = Config({"BLOCK": 1024}, {"enable_fp_fusion": False})
"""Pages of a list in pieces whose averages one program computes; rounded as those of the reference."""


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
    """See the reference; `UnsupportedCall` for other dtypes, no pages, and a budget too large for so many pages.

    One launch for the reference's some sixty, five beyond 8,192 pages. A row's bits depend neither on the other rows
    nor on the length of the longest of them.
    """
    rows, query_heads, max_pages = masses.shape
    floats = masses.dtype == averages.dtype == torch.float32
    width = min(max_pages, sinks + window + budget)
    found = (
        2 * width
    )  # most pages of a piece: those read and those to read; half as many fit into registers as elsewhere
    if not runs_here(masses) or not floats or not max_pages or not fits(max_pages, 2 * found):
        raise UnsupportedCall
    widths = width, min(max_pages, queried, budget)
    made = _empty(masses, heads, widths)
    given = [_plain(each) for each in (masses, firsts, lasts, known, read, averages)]
    count, rates = triton.cdiv(max_pages, heaviest.MAX_PAGES), (keep, 1 - keep)
    with torch.cuda.device_of(masses):
        if rows:
            pieces = Pieces()
            if count > 1:
                pieces = _cut(given, made, width=found, sinks=sinks, budget=budget, rates=rates)
            steady_kernel[(rows * heads,)](
                *(*given, *pieces, *map(_plain, made)),
                *(max_pages, count, count * found, *widths),
                *(sinks, budget, queried, most, factor, *rates, int(epsilon * ONE)),
                **{"H": heads, "G": query_heads // heads},
                **(config(max_pages) if count == 1 else config(count * found, fewest=4)).all,
            )
    return made


def config(max_pages: int, amd: bool = torch.version.hip is not None, fewest: int = 1) -> Config:
    """For a list of `max_pages` pages, with at least `fewest` warps that spill registers on no target.

    Pages found by pieces take four warps at least; those of AMD are wider. Averages are rounded as the reference's.
    """
    block = block_of(max_pages)
    warps = min(8 if amd else 16, max(fewest, block // 512))
    options = NO_SPILLS if warps == 16 else {}
    return Config({"BLOCK_F": block}, {"num_warps": warps, "enable_fp_fusion": False, **options})


def _cut(
    given: Sequence[Tensor], made: SteadyPages, *, width: int, sinks: int, budget: int, rates: tuple[float, float]
) -> Pieces:
    """Lists in pieces, and the averages of all their pages."""
    masses, firsts, lasts, known, read, averages = given
    (rows, lists, max_pages), blocks = read.shape, triton.cdiv(read.shape[2], AVERAGES.constants["BLOCK"])
    count = triton.cdiv(max_pages, heaviest.MAX_PAGES)
    pieces = cut(masses, (firsts, lasts), (known, read), lists=lists, width=width, sinks=sinks, budget=budget)
    average_kernel[(rows * lists * blocks,)](
        *(masses, lasts, known, averages, pieces.tops, pieces.sums, _plain(made.read), made.averages),
        *(max_pages, count, blocks, *rates),
        **{"H": lists, "G": masses.shape[1] // lists},
        **AVERAGES.all,
    )
    return pieces


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, and booleans as bytes."""
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
