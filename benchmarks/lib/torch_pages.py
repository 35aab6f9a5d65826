"""Sparse decoding by torch ops alone: the peer in `benchmarks.ops.decode`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class TorchPages:
    """Keys and values in pages, page after page for each head: the layout that torch's ops like best.

    Tang et al., "Quest", arXiv 2406.10774, rank pages by these bounds; heads of a group share pages here too.
    """

    k: Tensor  # [Hkv, F, S, D], of the last page only the first token counts
    v: Tensor
    bounds: Tensor  # [Hkv, F - 1, 2 D], greatest and least key of each full page
    sinks: int
    window: int  # full pages
    count: int  # full pages to read, sinks and window included

    @classmethod
    def make(cls, k: Tensor, v: Tensor, *, sink: int, window: int, budget: int) -> TorchPages:
        """Sizes are in tokens, rounded out to pages."""
        size, full = k.shape[2], k[:, :-1]
        sinks, last = -(-sink // size), -(-window // size)
        count = min(sinks + last + budget // size, full.shape[1])
        return cls(k, v, torch.cat([full.amax(2), full.amin(2)], -1).contiguous(), sinks, last, count)

    def choose(self, q: Tensor) -> Tensor:
        """Pages [Hkv, P] for q [Hkv, G, D], the own one last."""
        either = torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)
        scores = (either @ self.bounds.transpose(1, 2)).amax(1)  # [Hkv, F - 1]
        scores[:, : self.sinks] = torch.inf
        scores[:, scores.shape[1] - self.window :] = torch.inf
        best = scores.topk(self.count, sorted=False).indices
        own = best.new_full((len(best), 1), scores.shape[1])
        return torch.cat([best, own], 1)

    def attend(self, q: Tensor, pages: Tensor) -> Tensor:
        """[Hkv, G, D]"""
        heads, count, size, _ = self.k.shape
        where = (pages + torch.arange(heads)[:, None] * count).flatten()
        tokens = (pages.shape[1] - 1) * size + 1  # one of the last page
        keys, values = (
            x.flatten(0, 1).index_select(0, where).view(heads, -1, x.shape[-1])[:, :tokens] for x in (self.k, self.v)
        )
        return scaled_dot_product_attention(q[None], keys[None], values[None])[0]
