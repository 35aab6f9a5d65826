"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keysift.kvcache import Context, Selection

from ..strategy import Positive, Strategy, Tokens, option


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming(Strategy):
    """The first tokens and the last ones, in whole pages; the rest is never read.

    Cheap, as it depends on no query, and anything between is lost. Positions stay absolute, other than published, where
    they are those within the window.
    """

    source = "Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453"
    replayable = True
    sink: Tokens = option(128, "tokens at the start that every query reads")
    window: Positive = option(1024, "last tokens that every query reads, itself included")

    def prefill(self, q: Tensor, context: Context) -> Selection:
        return context.zones(sink=self.sink, window=self.window)
