"""A strategy that is wrong on purpose."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keysift.attention import Strategy
from keysift.kvcache import Context, Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong(Strategy):
    """Reads the row's own pages and nothing else."""

    def prefill(self, q: Tensor, context: Context) -> Selection:
        return context.zones(sink=0, window=1)
