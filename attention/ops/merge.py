"""Attention over disjoint parts of a context, joined into attention over all of it."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [..., D] and natural-log log-sum-exps [...] of two disjoint parts -> those of their union.

    Associative and commutative up to rounding; (0, -inf) is the empty part and changes no bit. The parts must not
    share a token: it would count twice. A few elementwise torch operations, which no twin would improve on.
    """
    both = torch.logaddexp(lse, other_lse)
    base = both.masked_fill(both.isneginf(), 0.0)  # -inf - -inf would be NaN
    weight, other_weight = (torch.exp(part - base)[..., None] for part in (lse, other_lse))
    return (out.float() * weight + other.float() * other_weight).to(out.dtype), both
