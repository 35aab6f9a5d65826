"""One layer of a long sequence in a cache, about to decode its next token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from structured import MIX, structured
from torch import Tensor

from keysift.attention import Strategy
from keysift.attention.ops import paged_attention
from keysift.kvcache import CacheSpec, Context, PagedCache, Selection, Span, Step

CHUNK, ROW = 2048, 64


@dataclass(frozen=True, slots=True)
class Source:
    """Keys and queries of a layer. Where it has many heads, some are others with signs of channels flipped.

    Such a head's scores are the other's, so it reads the same pages, but of its own.
    """

    q: Tensor  # [T, heads, D] fp32
    k: Tensor  # [T, KV heads, D] fp32
    signs: Tensor  # [Hkv, D]

    @classmethod
    def make(cls, shape: tuple[int, int, int], tokens: int) -> Source:
        heads, num_kv_heads, dim = shape
        group = heads // num_kv_heads
        distinct = min(num_kv_heads, -(-len(MIX) // group))  # every kind of head once
        q, k, _ = structured(tokens, distinct * group, distinct, dim, torch.float32)
        return cls(q, k, torch.randint(2, (num_kv_heads, dim)) * 2.0 - 1.0)

    def part(self, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q [n, Hq, D], k and v [n, Hkv, D]; values are random."""
        distinct, wanted = self.k.shape[1], len(self.signs)
        which = torch.arange(wanted) % distinct
        q = torch.unflatten(self.q[start:stop], 1, (distinct, -1))[:, which] * self.signs[:, None]
        k = self.k[start:stop, which] * self.signs
        return q.flatten(1, 2).to(dtype), k.to(dtype), torch.randn(k.shape).to(dtype)


@dataclass(frozen=True, slots=True)
class Layer:
    """A filled cache of one layer, and the token that comes next."""

    cache: PagedCache
    step: Step
    q: Tensor  # [1, Hq, D]
    k: Tensor  # [1, Hkv, D]
    v: Tensor

    @classmethod
    def make(cls, source: Source, dtype: torch.dtype, tokens: int, strategies: Iterable[Strategy]) -> Layer:
        """The first `tokens` tokens of the source, a multiple of the page size, so that the next one begins a page."""
        spec = CacheSpec(num_layers=1, num_kv_heads=len(source.signs), head_dim=source.k.shape[2], dtype=dtype)
        cache = PagedCache(spec, spec.pages_for(tokens + 1), max_sequences=1, max_len=tokens + 1)
        _scatter(cache)
        for index in filter(None, (strategy.make_index() for strategy in strategies)):
            cache.index(index)
        sequence = cache.open()
        cache.reserve(sequence, tokens + 1)
        for start in range(0, tokens, CHUNK):
            stop = min(start + CHUNK, tokens)
            step = cache.prefill(Span(sequence, start, stop - start), ROW, tokens - stop)
            _write(cache, step, *source.part(start, stop, dtype))
        step = cache.decode([Span(sequence, tokens, 1)])
        q, k, v = source.part(tokens, tokens + 1, dtype)
        _write(cache, step, q, k, v)
        return cls(cache, step, q, k, v)

    def context(self, strategy: Strategy) -> Context:
        return self.cache.context(0, self.step, strategy.make_index())

    def attend(self, selection: Selection) -> Tensor:
        context = self.cache.context(0, self.step)
        frames = context.fetch(selection)
        out, _ = paged_attention(
            self.q, frames.k, frames.v, frames.table, selection.pages, self.step.starts,
            queries_per_row=1, scale=context.spec.softmax_scale,
        )  # fmt: skip
        return out

    def in_a_row(self) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv, F, S, D] of all pages in order; unused slots are 0."""
        context = self.cache.context(0, self.step)
        frames = context.fetch(context.all())
        heads = torch.arange(self.k.shape[1])[:, None]
        k, v = (x[self.step.table[0].long(), heads] for x in (frames.k, frames.v))
        for x in (k, v):
            x[:, -1, 1:] = 0.0
        return k, v


def _scatter(cache: PagedCache) -> None:
    """Frames are handed out in random order from now on."""
    frames = cache.allocator.take(cache.free_pages)
    for place in torch.randperm(len(frames)).tolist():
        cache.allocator.release(frames[place])


def _write(cache: PagedCache, step: Step, q: Tensor, k: Tensor, v: Tensor) -> None:
    cache.append(0, k, v, step)
    cache.observe(0, q, step)
