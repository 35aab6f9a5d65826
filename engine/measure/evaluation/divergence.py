"""Divergence of next-token distributions from those of dense attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DIGITS = 6


@dataclass(frozen=True, slots=True)
class Divergence:
    """Divergences at some positions, one list element for each."""

    kl: list[float]
    """KL(dense || strategy) in nats."""
    agrees: list[bool]
    """The likeliest token is the same."""
    loss: list[float]
    """Negative log-likelihood of the text's next token, less dense's, in nats."""

    @classmethod
    def of(cls, dense: Tensor, sparse: Tensor, followers: Tensor) -> Divergence:
        """Divergences between logs [n, V] of next-token probabilities, where tokens [n] follow in the text."""
        kl = (dense.exp() * (dense - sparse)).sum(-1).clamp(min=0)  # rounding can take it below
        rows = torch.arange(len(followers))
        loss = dense[rows, followers] - sparse[rows, followers]
        return cls(rounded(kl), (dense.argmax(-1) == sparse.argmax(-1)).tolist(), rounded(loss))


def logs(logits: Tensor) -> Tensor:
    """[n, V] fp32, logs of probabilities."""
    return torch.log_softmax(logits.float(), -1)


def rounded(values: Tensor) -> list[float]:
    """Values rounded to `DIGITS` significant digits, to keep files small."""
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
