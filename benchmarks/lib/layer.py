"""One layer of long sequences in a cache, about to decode the next token of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.attention import Strategy
from keysift.attention.ops import paged_attention
from keysift.kvcache import CacheSpec, Context, PagedCache, Selection, Span, Step

from .structured import MIX, structured

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
        which = torch.arange(wanted, device=self.k.device) % distinct
        q = torch.unflatten(self.q[start:stop], 1, (distinct, -1))[:, which] * self.signs[:, None]
        k = self.k[start:stop, which] * self.signs
        return q.flatten(1, 2).to(dtype), k.to(dtype), torch.randn(k.shape, device=k.device).to(dtype)


@dataclass(frozen=True, slots=True)
class Layer:
    """A filled cache of one layer, and the token that comes next in each of its sequences."""

    cache: PagedCache
    step: Step
    q: Tensor  # [B, Hq, D]
    k: Tensor  # [B, Hkv, D]
    v: Tensor

    @classmethod
    def make(
        cls,
        source: Source,
        dtype: torch.dtype,
        tokens: int,
        strategies: Iterable[Strategy],
        *,
        batch: int = 1,
        shared: bool = False,
        new: int = 1,
        chunk: int = CHUNK,
    ) -> Layer:
        """The first `tokens` tokens of the source, a multiple of the page size, so that the next one begins a page.

        All sequences have the same keys, each in pages of its own, or, where they are shared, in those of the first.
        There is room for `new` tokens more; everything is where the source is.
        """
        spec = CacheSpec(num_layers=1, num_kv_heads=len(source.signs), head_dim=source.k.shape[2], dtype=dtype)
        own = spec.pages_for(tokens + new)
        frames = own + (batch - 1) * (own - tokens // spec.page_size if shared else own)
        cache = PagedCache(spec, frames, max_sequences=batch, max_len=tokens + new, device=source.k.device)
        _scatter(cache)
        indexes = {index for strategy in strategies if (index := strategy.index_spec()) is not None}
        sequences = [cache.open(*indexes) for _ in range(batch)]
        for sequence in sequences[:1] if shared else sequences:
            cache.reserve(sequence, tokens + new)
            _fill(cache, source, sequence, tokens, chunk)
        if shared:
            _share(cache, sequences, tokens, new)
        return cls._at(cache, source, sequences, tokens)

    @classmethod
    def _at(cls, cache: PagedCache, source: Source, sequences: list[int], position: int) -> Layer:
        step = cache.decode([Span(sequence, position, 1) for sequence in sequences])
        q, k, v = (x.repeat(len(sequences), 1, 1) for x in source.part(position, position + 1, cache.spec.dtype))
        _write(cache, step, q, k, v)
        return cls(cache, step, q, k, v)

    def after(self, source: Source) -> Layer:
        """The layer one token later."""
        spans = self.step.spans
        return self._at(self.cache, source, [span.sequence for span in spans], spans[0].stop)

    def context(self, strategy: Strategy) -> Context:
        return self.cache.context(0, self.step, strategy.index_spec())

    def attend(self, selection: Selection) -> Tensor:
        context = self.cache.context(0, self.step)
        frames = context.fetch(selection)
        out, _ = paged_attention(
            self.q, frames.k, frames.v, frames.table, selection.pages, self.step.starts,
            queries_per_row=1, scale=context.spec.softmax_scale,
        )  # fmt: skip
        return out

    def in_a_row(self, row: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv, F, S, D] of all pages of a sequence in order; unused slots are 0."""
        context = self.cache.context(0, self.step)
        frames = context.fetch(context.all())
        heads = torch.arange(self.k.shape[1], device=self.k.device)[:, None]
        k, v = (x[self.step.table[row].long(), heads] for x in (frames.k, frames.v))
        for x in (k, v):
            x[:, -1, self.step.spans[row].start % self.step.page_size + 1 :] = 0.0
        return k, v


def _scatter(cache: PagedCache) -> None:
    """Frames are handed out in random order from now on."""
    frames = cache.allocator.take(cache.free_pages)
    for place in torch.randperm(len(frames)).tolist():
        cache.allocator.release(frames[place])


def _fill(cache: PagedCache, source: Source, sequence: int, tokens: int, chunk: int) -> None:
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        step = cache.prefill(Span(sequence, start, stop - start), ROW, tokens - stop)
        _write(cache, step, *source.part(start, stop, cache.spec.dtype))


def _share(cache: PagedCache, sequences: list[int], tokens: int, new: int) -> None:
    """Give all sequences the full pages of the first, and pages of their own for what is new."""
    first = cache.decode([Span(sequences[0], tokens, 1)])
    for sequence in sequences[1:]:
        cache.share(sequence, first.held[0][: tokens // cache.spec.page_size])
        cache.reserve(sequence, tokens + new)


def _write(cache: PagedCache, step: Step, q: Tensor, k: Tensor, v: Tensor) -> None:
    cache.append(0, k, v, step)
    cache.observe(0, q, step)
