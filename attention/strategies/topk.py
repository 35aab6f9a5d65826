"""Exact top-k: pages of the keys with the greatest scores, a yardstick for token strategies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import Context, Phase, Selection

from ..strategy import Count, Dense, Positive, Strategy, Tokens, option


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK(Strategy):
    """Sinks, window, and for each query head the pages of the `top_k` keys between them with the greatest scores.

    Slower than dense, as every key is scored first. With pages of one token it is exact top-k attention.
    """

    yardstick = True
    replayable = True
    sink: Tokens = option(128, "tokens at the start that every token reads")
    window: Positive = option(512, "last tokens that every token reads, itself included")
    top_k: Count = option(100, "keys of each query head besides")

    @property
    def scans(self) -> bool:
        return True

    def prefill(self, q: Tensor, context: Context) -> Selection:
        return context.all()

    def decode(self, q: Tensor, context: Context) -> Selection:
        scores = self._between(_scores(q, context), context)  # [R, Hq, F, S]
        best = scores.flatten(2).sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
        hit = torch.zeros_like(scores.flatten(2), dtype=torch.bool).scatter_(-1, best, True).view_as(scores)
        found = Selection.from_mask((hit & ~scores.isneginf()).any(-1))
        zones = context.zones(sink=self.sink, window=self.window)
        mask = zones.mask(context.step.max_pages).repeat_interleave(q.shape[1] // context.spec.num_kv_heads, 1)
        return Selection.from_mask(mask | found.mask(context.step.max_pages))

    def part(self, phase: Phase) -> Strategy:
        return self if phase is Phase.DECODE else Dense()

    def _between(self, scores: Tensor, context: Context) -> Tensor:
        """Scores [R, Hq, F, S] with -inf in the zones and after the query."""
        token = torch.arange(scores.shape[2] * scores.shape[3], device=scores.device).view(scores.shape[2:])
        ends = context.step.starts[:, None, None] - min(self.window, 2**30) + 1
        return scores.masked_fill(((token < self.sink) | (token >= ends))[:, None], -torch.inf)


def _scores(q: Tensor, context: Context) -> Tensor:
    """[R, Hq, F, S] fp32, scores of queries [R, Hq, D] with every key."""
    frames = context.fetch(context.all())
    heads = torch.arange(context.spec.num_kv_heads, device=q.device)[:, None]
    keys = frames.k[frames.table.long(), heads].float()  # [R, Hkv, F, S, D]
    grouped = torch.unflatten(q.float(), 1, (context.spec.num_kv_heads, -1))
    return torch.einsum("rkgd,rkfsd->rkgfs", grouped, keys).flatten(1, 2) * context.spec.softmax_scale
