"""What a search among single keys found, and what that says about pages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Hits(NamedTuple):
    """The best keys that a search found, by exact score, the best first."""

    keys: Tensor
    """[R, Hq, K] int32, positions in the row's sequence, each once; -1 pads the end."""
    scores: Tensor
    """[R, Hq, K] fp32, ``scale * q . key``; -inf pads."""
    scanned: Tensor
    """[R, Hq] int32, keys and stand-ins of keys, such as centroids, that were multiplied with the query."""


def masses_of(hits: Hits, page_size: int, num_pages: int) -> Tensor:
    """[R, Hq, F] fp32, log mass of each page by the keys that were found on it; -inf where none was."""
    found = hits.keys >= 0
    best = hits.scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)  # [R, Hq, 1]
    weights = torch.where(found, (hits.scores - best).exp(), 0.0)
    pages = torch.where(found, hits.keys // page_size, 0).long()
    return (
        hits.keys.new_zeros(*hits.keys.shape[:2], num_pages, dtype=torch.float32).scatter_add_(2, pages, weights).log()
        + best
    )
