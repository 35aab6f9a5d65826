"""The CPU twin of `steady_pages`."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.kvcache.native.calls import SteadyCall, TopCall
from keysift.kvcache.native.cores import num_threads
from keysift.kvcache.native.library import kernels, level
from keysift.kvcache.ops.dispatch import UnsupportedCall

from ..top_pages.native import supports
from . import ONE, SteadyPages


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
    """See the reference; `UnsupportedCall` off the CPU, for other dtypes and for odd strides."""
    rows, num_heads, pages = masses.shape
    if not (supports(masses, firsts, lasts) and _supports(known, read, averages)):
        raise UnsupportedCall
    width, budget = min(pages, sinks + window + budget), min(budget, pages)
    result = _empty(rows, num_heads, heads, pages, width, min(queried, budget))
    top = TopCall.pack(
        masses=masses,
        firsts=firsts,
        lasts=lasts,
        out=result.pages,
        kept=result.kept,
        rows=rows,
        heads=num_heads,
        lists=heads,
        pages=pages,
        width=width,
        sinks=sinks,
        budget=budget,
        epsilon=0.0,
    )
    call = SteadyCall.pack(
        top=top,
        known=known,
        read=read,
        averages=averages,
        refused=result.refused,
        now_read=result.read,
        now_averages=result.averages,
        overlap=result.overlap,
        bound_exceeded=result.bound_exceeded,
        queried=min(queried, budget),
        most=most,
        refusable=int(epsilon * ONE),
        factor=factor,
        keep=keep,
    )
    kernels.keysift_steady_pages(call, level(), num_threads())
    return result


def _empty(rows: int, num_heads: int, heads: int, pages: int, width: int, queried: int) -> SteadyPages:
    lists = (rows, heads)
    return SteadyPages(
        pages=torch.empty((*lists, width), dtype=torch.int32),
        refused=torch.empty((*lists, queried), dtype=torch.int32),
        kept=torch.empty((rows, num_heads)),
        read=torch.empty((*lists, pages), dtype=torch.bool),
        averages=torch.empty((*lists, pages)),
        overlap=torch.empty(lists),
        bound_exceeded=torch.empty(lists, dtype=torch.bool),
    )


def _supports(known: Tensor, read: Tensor, averages: Tensor) -> bool:
    return (
        known.dtype == read.dtype == torch.bool
        and averages.dtype == torch.float32
        and all(tensor.is_cpu and tensor.is_contiguous() for tensor in (known, read, averages))
    )
