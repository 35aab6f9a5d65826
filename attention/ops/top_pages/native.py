"""The CPU twin of `top_pages`."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.kvcache.native.calls import TopCall
from keysift.kvcache.native.cores import num_threads
from keysift.kvcache.native.library import kernels, level
from keysift.kvcache.ops.dispatch import UnsupportedCall

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
    """See the reference; `UnsupportedCall` off the CPU, for other dtypes and for odd strides."""
    rows, num_heads, pages = masses.shape
    if not supports(masses, firsts, lasts):
        raise UnsupportedCall
    width = min(pages, sinks + window + budget)
    out = torch.empty((rows, heads, width), dtype=torch.int32)
    kept = torch.empty((rows, num_heads))
    call = TopCall.pack(
        masses=masses,
        firsts=firsts,
        lasts=lasts,
        out=out,
        kept=kept,
        rows=rows,
        heads=num_heads,
        lists=heads,
        pages=pages,
        width=width,
        sinks=sinks,
        budget=min(budget, pages),
        epsilon=epsilon,
    )
    kernels.keysift_top_pages(call, level(), num_threads())
    return TopPages(out, kept)


def supports(masses: Tensor, firsts: Tensor, lasts: Tensor) -> bool:
    return (
        all(tensor.is_cpu for tensor in (masses, firsts, lasts))
        and masses.dtype == torch.float32
        and firsts.dtype == lasts.dtype == torch.int32
        and masses.is_contiguous()
        and firsts.is_contiguous()
        and lasts.is_contiguous()
    )
