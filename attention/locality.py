"""How little tokens change what is read from one to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Locality:
    """How little one sequence's tokens changed what they read: sums over choices, one for each layer and KV head.

    Only choices count that were compared with those of the token before.
    """

    choices: int = 0
    overlap: float = 0.0
    """Shares of the pages that the token before had read."""
    bound_exceeded: float = 0.0
    """Choices that took more pages than a locality bound allows."""

    def __add__(self, other: Locality) -> Locality:
        return Locality(
            self.choices + other.choices, self.overlap + other.overlap, self.bound_exceeded + other.bound_exceeded
        )

    @property
    def mean_overlap(self) -> float | None:
        """None where nothing was compared."""
        return self.overlap / self.choices if self.choices else None

    @property
    def bound_exceeded_share(self) -> float:
        return self.bound_exceeded / self.choices if self.choices else 0.0


def moved(choices: list[tuple[Tensor, Tensor | None]]) -> list[Locality]:
    """Of each sequence, from overlap and bound_exceeded [B, H] of some layers' selections; waits for the device."""
    overlap = torch.cat([each for each, _ in choices], 1).double()  # [B, choices]
    bound_exceeded = torch.cat(
        [torch.zeros_like(each) if opened is None else opened.float() for each, opened in choices], 1
    )
    compared = (~overlap.isnan()).double()
    sums = torch.stack([compared.sum(1), overlap.nansum(1), (bound_exceeded * compared).sum(1)], 1)
    return [Locality(int(count), *rest) for count, *rest in sums.tolist()]
