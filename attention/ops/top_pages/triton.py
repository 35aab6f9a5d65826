"""The Triton twin of `top_pages`."""
# mypy: allow-untyped-calls

from __future__ import annotations

import torch
from torch import Tensor

from keysift.kvcache.ops.dispatch import UnsupportedCall
from keysift.kvcache.ops.heaviest.triton import fits, heaviest
from keysift.kvcache.ops.triton import runs_here

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
    """See the reference; `UnsupportedCall` for masses that are not fp32 and a budget too large for so many pages.

    One launch for the dozens of the reference, whose two sorts do not wait for the device either; five beyond 8,192
    pages. A row's bits depend neither on the other rows nor on the length of the longest of them.
    """
    max_pages = masses.shape[2]
    width = min(max_pages, sinks + window + budget)
    if not runs_here(masses) or masses.dtype != torch.float32 or not fits(max_pages, width):
        raise UnsupportedCall
    with torch.cuda.device_of(masses):
        zones = (firsts, lasts)
        return TopPages(*heaviest(masses, zones, lists=heads, width=width, sinks=sinks, budget=budget, epsilon=epsilon))
