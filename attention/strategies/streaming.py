"""StreamingLLM's pattern: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keysift.kvcache import Context, Selection

from ..strategy import Positive, Strategy, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming(Strategy):
    """The first tokens and the last ones, in whole pages; the rest is never read.

    Cheap and blind: what lies between is lost. Xiao et al., "Efficient Streaming Language Models with Attention
    Sinks", arXiv 2309.17453. Positions stay absolute here: the window slides over the true positions.
    """

    replayable = True
    sink: Tokens = 128
    """Tokens at the start that every query reads."""
    window: Positive = 1024
    """Last tokens that every query reads, itself included."""

    def prefill(self, q: Tensor, context: Context) -> Selection:
        return context.zones(sink=self.sink, window=self.window)
