"""The CUDA twin of `top_pages`."""
# mypy: allow-untyped-calls

from __future__ import annotations

import torch
from torch import Tensor

from keysift.kvcache.ops.heaviest.triton import fits, heaviest
from keysift.kvcache.ops.triton import INTERPRETED

from . import TopPages


def top_pages(
    masses: Tensor,
    firsts: Tensor,
    lasts: Tensor,
    *,
    heads: int,
    sinks: int,
    window: int,
    budget: int,
    epsilon: float,
) -> TopPages:
    """The twin of the reference of the same name, which documents it.

    One launch for the dozens that the reference's two sorts and its many passes take; five beyond 8,192 pages. A row's
    bits do not depend on the other rows, nor on how many pages the longest of them has. A budget that is too large for
    so many pages is left to the reference, which does not wait for the device either.
    """
    max_pages = masses.shape[2]
    width = min(max_pages, sinks + window + budget)
    if not (masses.is_cuda or INTERPRETED) or masses.dtype != torch.float32 or not fits(max_pages, width):
        return NotImplemented  # type: ignore[no-any-return]
    with torch.cuda.device_of(masses):
        zones = (firsts, lasts)
        return TopPages(*heaviest(masses, zones, lists=heads, width=width, sinks=sinks, budget=budget, epsilon=epsilon))
