"""Tracing of transfers: pages that a tier moves to where ops read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor

from keysift.attention import Spans
from keysift.kvcache import Frames, Selection, Step, Tier


def watched_tier(tier: Tier, spans: Spans) -> Tier:
    """A proxy of the tier that traces every transfer with `spans`."""
    return cast(Tier, _WatchedTier(tier, spans))


class _WatchedTier:
    def __init__(self, tier: Tier, spans: Spans) -> None:
        self._tier, self._spans = tier, spans

    def __getattr__(self, name: str) -> Any:
        """Everything that moves no pages is the tier's own."""
        return getattr(self._tier, name)

    def resident(self, layer: int, selection: Selection, step: Step) -> Frames:
        with self._spans("transfer", layer):
            return self._tier.resident(layer, selection, step)

    def own(self, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        with self._spans("transfer", layer):
            return self._tier.own(layer, step)

    def parts(self, layer: int, selection: Selection, step: Step) -> Iterator[tuple[Selection, Frames]]:
        """Traces only the transfer of each part, not the caller's work between two parts."""
        parts = iter(self._tier.parts(layer, selection, step))
        while True:
            with self._spans("transfer", layer):
                part = next(parts, None)
            if part is None:
                return
            yield part

    def prefetch(self, layer: int, pages: Tensor, step: Step) -> None:
        with self._spans("transfer", layer):
            self._tier.prefetch(layer, pages, step)
