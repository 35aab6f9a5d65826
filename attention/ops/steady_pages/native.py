"""The CPU twin of `keysift.attention.ops.steady_pages`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from keysift.kvcache.native.cores import num_threads
from keysift.kvcache.native.library import SteadyCall, TopCall, kernels, level

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
    """See the reference; `NotImplemented` off the CPU, for other dtypes and for odd strides."""
    rows, num_heads, pages = masses.shape
    if not (supports(masses, firsts, lasts) and _supports(known, read, averages)):
        return NotImplemented  # type: ignore[no-any-return]
    width, budget = min(pages, sinks + window + budget), min(budget, pages)
    result = _room(rows, num_heads, heads, pages, width, min(queried, budget))
    inputs = [tensor.data_ptr() for tensor in (masses, firsts, lasts)]
    past = [tensor.data_ptr() for tensor in (known, read, averages)]
    out, refused, kept, *rest = (tensor.data_ptr() for tensor in result)
    top = TopCall(*inputs, out, kept, rows, num_heads, heads, pages, width, sinks, budget, 0.0)
    call = SteadyCall(top, *past, refused, *rest, min(queried, budget), most, int(epsilon * ONE), factor, keep)
    kernels.keysift_steady_pages(ctypes.byref(call), level(), num_threads())
    return result


def _room(rows: int, num_heads: int, heads: int, pages: int, width: int, queried: int) -> SteadyPages:
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
