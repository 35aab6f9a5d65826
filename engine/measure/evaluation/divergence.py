"""How far next-token distributions are from those of dense attention, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DIGITS = 6


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of some positions; every list has one number for each."""

    kl: list[float]
    """KL(dense || strategy) in nats."""
    agrees: list[bool]
    """The likeliest token is the same."""
    loss: list[float]
    """Negative log-likelihood of what really follows, less dense's, in nats."""

    @classmethod
    def of(cls, dense: Tensor, sparse: Tensor, followers: Tensor) -> Divergence:
        """From logs [n, V] of next-token probabilities, of which tokens [n] really follow."""
        kl = (dense.exp() * (dense - sparse)).sum(-1).clamp(min=0)  # rounding can take it below
        rows = torch.arange(len(followers))
        loss = dense[rows, followers] - sparse[rows, followers]
        return cls(rounded(kl), (dense.argmax(-1) == sparse.argmax(-1)).tolist(), rounded(loss))


def logs(logits: Tensor) -> Tensor:
    """[n, V] fp32, logs of probabilities."""
    return torch.log_softmax(logits.float(), -1)


def rounded(values: Tensor) -> list[float]:
    """As many digits as mean anything, so that a file of them stays small."""
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
