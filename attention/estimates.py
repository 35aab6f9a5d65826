"""Estimates of pages that are not read: their attention by mean keys and values, and a bound on their mass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from keysift.kvcache import Context
from keysift.kvcache.ops.page_masses import page_bounds

from .ops.paged_attention import paged_attention


def estimate(q: Tensor, context: Context, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [R, Hq, D] over full pages [R, H, P], each as S times its mean key and mean value: out and lse.

    By Jensen's inequality the mean of a page's scores is at most the logarithm of their mean exponential: a page with
    one good key is underestimated, and contributes its mean value, not that key's.
    """
    means, step = context.page_means(), context.step
    out, lse = paged_attention(
        q,
        means.k,
        means.v,
        means.table,
        pages,
        step.last_pages - 1,
        queries_per_row=1,
        scale=context.spec.softmax_scale,
    )
    return out, lse + math.log(step.page_size)


def bound(q: Tensor, context: Context, chosen: Tensor) -> Tensor:
    """[R, Hq], upper bound on the log mass of the pages outside the mask `chosen` [R, H, F], for q [R, Hq, D]."""
    described, starts = context.described(), context.step.starts
    bounds = page_bounds(
        q, *context.own_page(), described.summaries, described.table, starts, scale=context.spec.softmax_scale
    )
    per_head = chosen.repeat_interleave(q.shape[1] // chosen.shape[1], 1)
    return bounds.masked_fill(per_head, -torch.inf).logsumexp(-1)
