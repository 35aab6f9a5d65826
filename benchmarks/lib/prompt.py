"""One layer of a structured prompt in a paged cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.attention import Strategy
from keysift.attention.ops import paged_attention
from keysift.attention.probe import take
from keysift.kvcache import CacheSpec, Context, PagedCache, Selection, Span
from keysift.kvcache.selection import pairs

from .structured import structured

ROW = 64


@dataclass(frozen=True, slots=True)
class Prompt:
    """One layer of a prompt, cached, and its chunks as the strategies see them."""

    q: Tensor  # [T, Hq, D]
    k: Tensor  # [T, Hkv, D]
    v: Tensor
    contexts: list[Context]

    @classmethod
    def make(
        cls, shape: tuple[int, int, int], tokens: int, chunk: int, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> Prompt:
        torch.manual_seed(seed)
        with torch.device(device):
            q, k, v = structured(tokens, *shape, torch.bfloat16)
        spec = CacheSpec(num_layers=1, num_kv_heads=shape[1], head_dim=shape[2], dtype=torch.bfloat16)
        cache = PagedCache(spec, spec.pages_for(tokens), max_sequences=1, max_len=tokens, device=device)
        sequence, contexts = cache.open(), []
        cache.reserve(sequence, tokens)
        for start in range(0, tokens, chunk):
            step = cache.prefill(Span(sequence, start, min(chunk, tokens - start)), ROW, max(tokens - start - chunk, 0))
            cache.append(0, k[start : start + chunk], v[start : start + chunk], step)
            contexts.append(cache.context(0, step))
        return cls(q, k, v, contexts)

    def chunks(self) -> Iterator[tuple[Tensor, Context]]:
        for context in self.contexts:
            (span,) = context.step.spans
            yield self.q[span.start : span.stop], context

    def choose(self, strategy: Strategy) -> list[Selection]:
        return [strategy.prefill(q, context) for q, context in self.chunks()]

    def attend(self, selections: list[Selection]) -> None:
        for (q, context), selection in zip(self.chunks(), selections, strict=True):
            frames, step = context.fetch(selection), context.step
            paged_attention(
                q, frames.k, frames.v, frames.table, selection.pages, step.starts,
                queries_per_row=ROW, scale=context.spec.softmax_scale,
            )  # fmt: skip

    def density(self, selections: list[Selection]) -> float:
        both = [pairs(c.step, s.counts()) for c, s in zip(self.contexts, selections, strict=True)]
        return float(sum(chosen.mean(-1).sum() for chosen, _ in both) / sum(possible.sum() for _, possible in both))

    def coverage(self, selections: list[Selection]) -> tuple[float, float]:
        """Least (of a probe of 4 queries and a head) and mean."""
        kept, within = [], torch.tensor([5, 21, 37, 53], device=self.q.device)
        for (q, context), selection in zip(self.chunks(), selections, strict=True):
            picks = torch.arange(context.step.num_rows - 1, device=q.device)[:, None] * ROW + within
            evidence = take(q, context, picks)
            mask = selection.mask(context.step.max_pages)
            kept.append(evidence.kept(mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)))
        every = torch.cat(kept)
        return float(every.min()), float(every.mean())
